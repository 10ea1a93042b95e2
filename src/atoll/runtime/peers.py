"""By which keys a site knows the others: those of its first secure sum at first sight, all others by its owner's word.

What the others say in a sum comes through the hub, which could make sites up. Names that were asked with this site in
its first sum are believed at first sight, as SSH does; from then on, and from the owner's first word on, a name that is
new, or another key of one that is known, is refused until the owner confirms its fingerprint.
"""

import fcntl
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from atoll.durable import sync_folder
from atoll.errors import Corrupt, Denied, Invalid, Unavailable
from atoll.journal.key import PublicKey
from atoll.runtime.disk import appearing
from atoll.spec.document import Name

FILE = "sites.json"  # in a site's folder
Standing = Literal["first seen", "refused", "confirmed"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another site: its public key, or as much of it as is known (`atoll/NAME/FINGERPRINT`, or nothing yet)."""

    key: str
    standing: Standing

    @property
    def fingerprint(self) -> str:
        return self.key.partition("+")[0].rpartition("/")[2]

    def has(self, key: str) -> bool:
        """Tell whether this may be the public key of the site."""
        return self.key in (key, key.partition("+")[0]) or (not self.key and self.standing == "first seen")


_KEY_NAME = re.compile(r"atoll/[a-z0-9][a-z0-9_.-]{0,62}/[0-9a-f]{16}")
_TABLE: TypeAdapter[dict[Name, Peer]] = TypeAdapter(dict[Name, Peer])


def check_signed(site: str, signer: str, said: bytes, signature: bytes) -> None:
    """Raise `Denied` unless the public key is one of this site's name, and made the signature."""
    if not _is_key_of(site, signer) or not PublicKey.read(signer).signed(said, signature):
        raise Denied(f"secure sum: what is said to be of {site} is not signed by it; nothing was sent")


def _is_key_of(site: str, signer: str) -> bool:
    try:
        return PublicKey.read(signer).owner == site
    except Invalid:
        return False


class Peers:
    """The other sites' keys, in a file by name. The agent and the owner's commands may write to it at once."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE

    def known(self) -> dict[str, Peer]:
        """Return who is known, by name. Raises `Corrupt`."""
        return dict(sorted((self._read() or {}).items()))

    def meet(self, asked: Collection[str], keys: Mapping[str, str]) -> None:
        """Raise `Denied` unless each site's key is the one that it is known by; ``asked`` are all sites of the sum.

        Once it returns, what was seen for the first time is on the disk.
        """
        for site, key in keys.items():
            if not _is_key_of(site, key):
                raise Denied(f"secure sum: what is said to be of {site} is not signed by it; nothing was sent")
        with self._turn():
            known = self._read()
            if known is None:  # the first sum: whoever is late in it is believed at first sight, too
                known = {site: Peer("", "first seen") for site in asked}
            told = dict(known)
            strange = {site: key for site, key in keys.items() if not _believed(known.get(site), key)}
            for site, key in keys.items():
                if site not in strange and told[site].key != key:
                    told[site] = Peer(key, told[site].standing)
                    log.warning("secure sum: %s is seen for the first time, as %s", site, _named(key))
            new = {site: Peer(key, "refused") for site, key in strange.items() if not _is_known(known.get(site))}
            if new:  # of those who were refused only the newest are listed: a hub may make up as many as it likes
                told = {site: peer for site, peer in told.items() if _is_known(peer)} | new
            if told != known or not self._path.exists():
                self._write(told)
        for site, key in strange.items():
            log.warning("secure sum: %s is not believed: it signs as %s", site, _named(key))
        if strange:
            raise Denied(self._refusal(told, strange))

    def confirm(self, site: str, fingerprint: str) -> Peer:
        """Believe the site of this name by this fingerprint, also ahead of its first sum, and by no other. Raises
        `Invalid` for what is none."""
        known = f"atoll/{site}/{Peer(fingerprint, 'confirmed').fingerprint}"  # also of a whole key, or of its name
        if not _KEY_NAME.fullmatch(known):
            raise Invalid(f"fingerprint: {fingerprint!r} of {site!r} is none; it is 16 of 0-9 and a-f")
        with self._turn():
            peers = self._read() or {}
            was = peers.get(site)
            key = was.key if was is not None and was.key.partition("+")[0] == known else known
            made = Peer(key, "confirmed")
            self._write({**peers, site: made})
        return made

    def _refusal(self, known: Mapping[str, Peer], strange: Mapping[str, str]) -> str:
        site, key = next(iter(strange.items()))
        other = known[site].standing != "refused"
        what = "signs with another key than before" if other else "is new here"
        more = f" (so do {len(strange) - 1} others)" if len(strange) > 1 else ""
        fingerprint = Peer(key, "refused").fingerprint
        return (
            f"secure sum: {site} {what}{more}; ask its owner for the fingerprint, and if it is {fingerprint} say: "
            f"atoll site confirm {site} {fingerprint}"
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_suffix(".lock").open("w")
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot be written ({error.strerror}); free some space") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by closing, also when the process dies
            yield

    def _read(self) -> dict[str, Peer] | None:
        """Return who is known, None where no sum was ever begun. Who cannot be read is not forgotten: that would be to
        believe anybody."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Corrupt(f"{self._path}: the other sites' keys cannot be read ({error.strerror}); mend it") from None
        try:
            return dict(_TABLE.validate_json(text))
        except ValidationError as error:
            where = "/".join(str(part) for part in error.errors()[0]["loc"]) or "the file"
            raise Corrupt(f"{self._path}: the other sites' keys cannot be read: {where} is wrong; mend it") from None

    def _write(self, peers: Mapping[str, Peer]) -> None:
        text = json.dumps({site: asdict(peer) for site, peer in peers.items()}, indent=1, sort_keys=True)
        try:
            with appearing(self._path, durable=True) as file:
                file.write(text.encode())
            sync_folder(self._path.parent)
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot be written ({error.strerror}); free some space") from None


def _is_known(peer: Peer | None) -> bool:
    return peer is not None and peer.standing != "refused"


def _believed(peer: Peer | None, key: str) -> bool:
    return peer is not None and peer.standing != "refused" and peer.has(key)


def _named(key: str) -> str:
    return key.partition("+")[0]
