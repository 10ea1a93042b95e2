"""What secure sums cost beside plain ones: a round's time over mutual TLS on loopback, and its bytes.

Both rounds clip, so that the difference is the sum's own: agreeing on keys, masking at each site, unmasking at the hub.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import rounds
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from reporting import Figure, Report, fresh

from atoll.errors import Denied
from atoll.outer.neighbours import degree
from atoll.outer.secret import Circle, Party, ring_of, unmasking
from atoll.spec.document import Document
from atoll.spec.secret import Everyone, Inbox, Signed, Terms, There

KEYS = ("secure_time_ratio", "secure_bytes_ratio")
_TIME, _BYTES = 2.0, 1.1  # goals, at most
_SITES, _SIZE = 8, 25 * rounds.MB
_MANY, _ELEMENTS = 100, 10_000  # of the sum that sites leave, without a network


def measure(report: Report, quick: bool) -> dict[str, Figure]:
    """Print and return the ratios of a masked round to a plain one, by turns, and a sum of 100 sites of which 10 go."""
    home = fresh("secure")
    ratios: list[float] = []
    for _ in range(1 if quick else 5):
        plain, masked = (
            rounds.run(home, rounds.Case(_SIZE, _SITES, wire=wire, rounds=3 if quick else 5)).seconds
            for wire in ("clip", "mask")
        )
        ratios.append(masked / plain)
        report.say(f"{_SIZE // rounds.MB} MB x {_SITES}: plain {plain:.3f} s a round, masked {masked:.3f} s")
    told, _ = _summed(_SITES, 0)
    update = _SITES * _SIZE
    bytes_ratio = (update + told) / update
    report.say(f"What the sites of a sum say and are told: {told:,} bytes of a round with {update:,} of updates.")
    many, seconds = _summed(_MANY, _MANY // 10)
    near = degree(_MANY)
    report.say(
        f"{_MANY} sites of which {_MANY // 10} leave after they dealt shares: the sum of the others, right, in "
        f"{seconds:.1f} s of this one process; {near.neighbours} neighbours each, {near.threshold} shares open one, "
        f"{many / _MANY:,.0f} bytes a site beside its update."
    )
    ratio = statistics.median(ratios)
    for name, value, goal in (("time", ratio, _TIME), ("bytes", bytes_ratio, _BYTES)):
        report.say(f"{name}: {value:.3f} times a plain round's, goal {goal:g}: {'met' if value <= goal else 'MISSED'}.")
    return {
        "secure_time_ratio": round(ratio, 3),
        "secure_bytes_ratio": round(bytes_ratio, 4),
        "secure_100_sites_10_gone_s": round(seconds, 2),
    }


def _summed(count: int, gone: int) -> tuple[int, float]:
    """Return the bytes of all messages of a sum among so many, of which the last ``gone`` send no update, and the
    seconds that all its parties take together. Raises `SystemExit` for a wrong sum."""
    names = [f"s{number:03}" for number in range(count)]
    terms = Terms(run="r", position=1, attempt=0, sites=tuple(names), bound=1.0, heaviest=1, least=3)
    ring, rng = ring_of(terms), np.random.default_rng(0)
    updates = {name: rng.uniform(-1, 1, _ELEMENTS).astype(np.float32) for name in names}
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    began = time.monotonic()
    parties = {name: Party(terms, name, name, keys[name].sign, _verifier(keys)) for name in names}
    given = [party.keys() for party in parties.values()]
    circle = Circle.of(terms, given)
    dealt = {name: party.deal(given) for name, party in parties.items()}
    inboxes = {
        name: {near: dealt[near].sealed[name] for near in circle.near[name]}  # each has dealt
        for name in names
    }
    there = tuple(names[: count - gone])
    sums = np.zeros(_ELEMENTS, np.uint32)
    for name in names:
        masks = parties[name].mask(inboxes[name])
        if name in there:
            words = ring.lifted(updates[name], 1)
            masks.apply(0, words)
            sums += words
    agreed = [parties[name].agree(there) for name in there]
    shown = [parties[name].unseal(agreed) for name in there]
    unmasking(circle, names, there, shown).apply(0, sums)
    seconds = time.monotonic() - began
    off = np.abs(ring.lowered(sums) - sum(updates[name].astype(np.float64) for name in there)).max()
    if off > 1e-4:
        raise SystemExit(f"secure sums: {off:g} off the sum of the updates")
    everyone, signed, list_ = Everyone(keys=tuple(given)), Signed(agreed=tuple(agreed)), There(sites=there)
    told = count * _size(everyone) + sum(_size(Inbox(sealed=inbox)) for inbox in inboxes.values())
    told += len(there) * (_size(signed) + _size(list_))
    return told + sum(_size(one) for one in (*given, *dealt.values(), *agreed, *shown)), seconds


def _size(document: Document) -> int:
    return len(document.model_dump_json())


def _verifier(keys: dict[str, Ed25519PrivateKey]) -> Callable[[str, str, bytes, bytes], None]:
    def verify(site: str, signer: str, said: bytes, signature: bytes) -> None:
        if signer != site:
            raise Denied(f"{site}: signer")
        keys[site].public_key().verify(signature, said)

    return verify
