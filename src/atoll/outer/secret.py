"""Sums that hide their terms: a hub learns what updates add up to, and of no site what its own was.

The protocol of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (2017), against
a hub that does not keep to it, over the graph of Bell et al. (2020). A site's update, in the ring, is masked twice: by
a mask of its own, and by one for each neighbour that the neighbour takes off again. Both secrets are shared among the
neighbours: of who stays they open the own mask, of who leaves in mid-sum the key of the others, and never both.

A site goes through `Party`: keys, shares, masks, agreement, unsealing. Its documents go to the others through the hub,
which is trusted with their delivery and nothing else; what takes the masks off is `unmasking`.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from atoll.errors import Corrupt, Denied
from atoll.outer import shares
from atoll.outer.masks import Masks
from atoll.outer.neighbours import degree, neighbours
from atoll.outer.ring import Ring, Words
from atoll.outer.wire import Chunk
from atoll.spec.document import canonical, digest, sha256
from atoll.spec.secret import Agreed, Dealt, Keys, Terms, Unsealed

_NONCE = bytes(12)  # a key seals one text
_ROUNDED = 1.001  # the ring's rounding, beside the bound
_OPENED = "secure sum: another sum of these updates was opened; submit the job again"
Sign = Callable[[bytes], bytes]
# (site, its public key, bytes, signature): raises `Denied` unless that is the site's key, and made the signature.
Verify = Callable[[str, str, bytes, bytes], None]


def ring_of(terms: Terms) -> Ring:
    """Return the ring of a sum: each of its sites may be the heaviest."""
    return Ring(len(terms.sites), terms.bound, terms.heaviest)


@dataclass(frozen=True, slots=True)
class Circle:
    """Those who gave keys for a sum, and who is whose neighbour among them. All who have the same keys see the same."""

    terms: Terms
    keys: Mapping[str, Keys]
    near: Mapping[str, tuple[str, ...]]
    places: Mapping[str, int]  # of shares: 1 and on
    threshold: int
    drawn: str  # digest of the terms and all keys

    @staticmethod
    def of(terms: Terms, keys: Collection[Keys]) -> "Circle":
        """Raises `Denied` for keys of others than the terms' sites, for two of one, and for too few.

        How many shares open a secret follows from the sites that were asked, and not from whose keys are shown: else a
        hub would show each few sites a circle of their own, and have the same secret opened in two of them.
        """
        named = {each.site: each for each in keys}
        if len(named) < len(keys) or not named.keys() <= set(terms.sites):
            raise Denied("secure sum: keys of a site that is not asked, or twice of one; nothing was sent")
        if len(named) < terms.enough:
            raise Denied(
                f"secure sum: {len(named)} of {len(terms.sites)} sites are there, and {terms.enough} hide each other's "
                "updates; nothing was sent"
            )
        drawn = sha256(canonical([digest(terms), [named[site].model_dump(mode="json") for site in sorted(named)]]))
        asked = degree(len(terms.sites))
        near = neighbours(list(named), drawn.encode(), asked.neighbours)
        places = {site: number for number, site in enumerate(sorted(named), 1)}
        return Circle(terms, named, near, places, asked.threshold, drawn)

    def holders(self, site: str) -> tuple[str, ...]:
        """Return who holds shares of a site's secrets: its neighbours and itself."""
        return (*self.near[site], site)


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a sum of updates is under: its terms, and masks whose `apply` takes off what is left of them on it."""

    terms: Terms
    masks: Masks

    def mean(self, offset: int, words: Words, weight: float) -> npt.NDArray[np.float32]:
        """Return the mean that a window of the sum stands for, whose updates' weights add up to ``weight``.

        Raises `Corrupt` for what no updates within the terms' bound add up to; the window's words are changed.
        """
        self.masks.apply(offset, words)
        mean = ring_of(self.terms).lowered(words) * (self.terms.heaviest / weight)
        # A number of a mean of clipped updates is within their bound; one that still has a mask on it is anywhere.
        if mean.size and float(np.abs(mean).max()) > self.terms.bound * _ROUNDED:
            raise Corrupt(
                f"secure sum: it is none of updates clipped to {self.terms.bound:g}; a site's masks are wrong"
            )
        return mean.astype(np.float32)


class Party:
    """A site's side of one sum, in memory alone: a site that starts again is not in it, nor does it sign for it again.

    Each method is one step, and checks what the hub gave it; a refusal is a `Denied` or `Corrupt`, and sends nothing.
    What a step was once told is what holds: told the same again it says the same, and told otherwise it refuses.
    """

    def __init__(
        self, terms: Terms, site: str, signer: str, sign: Sign, verify: Verify, before: Collection[str] = ()
    ) -> None:
        """``before`` are the sites of an earlier sum of the same updates that this one helped to open, if there was
        one: what another sum differs in from it would be somebody's own."""
        self._terms, self._site, self._sign, self._verify = terms, site, sign, verify
        self._before = tuple(sorted(before))
        self._sealing, self._masking, self._own = os.urandom(32), os.urandom(32), os.urandom(32)
        sealing, masking = _public(self._sealing), _public(self._masking)
        keys = Keys(site=site, signer=signer, sealing=sealing, masking=masking, own=sha256(self._own))
        self._keys = keys.model_copy(update={"signature": sign(_said_of_keys(terms, keys)).hex()})
        self._circle: Circle | None = None
        self._shared: Dealt | None = None
        self._held = b""  # this site's share of its own mask
        self._dealt: dict[str, str] | None = None  # neighbour -> what it sealed for this site
        self._survivors: tuple[str, ...] | None = None

    def keys(self) -> Keys:
        """Return the public keys, signed with the site's own name for this sum alone."""
        return self._keys

    def deal(self, keys: Collection[Keys]) -> Dealt:
        """Return shares of this site's secrets, sealed for its neighbours among those who gave keys."""
        circle = Circle.of(self._terms, keys)
        if self._circle is not None and self._shared is not None:
            if circle != self._circle:
                raise Denied("secure sum: two lists of the sites' keys; nothing was sent")
            return self._shared
        self._check_before(circle.keys)
        if circle.keys.get(self._site) != self._keys:
            raise Denied("secure sum: this site's own keys are not among those that came back; nothing was sent")
        for one in keys:
            check_keys(self._terms, one, self._verify)
        self._circle = circle
        places = [circle.places[site] for site in circle.holders(self._site)]
        own = shares.split(self._own, circle.threshold, places)
        masking = shares.split(self._masking, circle.threshold, places)
        sealed: dict[str, str] = {}
        for near in circle.near[self._site]:
            text = own[circle.places[near]] + masking[circle.places[near]]
            sealed[near] = self._sealer(near, self._site, near).encrypt(_NONCE, text, None).hex()
        self._held = own[circle.places[self._site]]
        self._shared = Dealt(site=self._site, sealed=sealed)
        return self._shared

    def mask(self, sealed: Mapping[str, str]) -> Masks:
        """Return the masks for this site's update; ``sealed`` is what neighbours dealt it, of those who did.

        Those who did not are left out of the sum. With too few the update could not be unmasked, and is not sent.
        """
        circle = self._known()
        if not sealed.keys() <= set(circle.near[self._site]):
            raise Denied("secure sum: shares of a site that is no neighbour; nothing was sent")
        if len(sealed) + 1 < circle.threshold:
            raise Denied(f"secure sum: {len(sealed)} neighbours are left, too few to hide an update; nothing was sent")
        self._check_before({self._site, *sealed, *(circle.keys.keys() - set(circle.near[self._site]))})
        if self._dealt not in (None, dict(sealed)):
            raise Denied("secure sum: two lists of who dealt shares; nothing was sent")
        for near, text in sealed.items():
            self._opened(near, text)
        self._dealt = dict(sealed)
        common = {near: _met(self._masking, circle.keys[near].masking, b"mask", self._terms) for near in sealed}
        added = [self._own, *(key for near, key in common.items() if self._site < near)]
        return Masks(added, [key for near, key in common.items() if self._site > near])

    def agree(self, survivors: Collection[str]) -> Agreed:
        """Return this site's signature of whose updates are in the sum; the first list that it is shown is the last."""
        circle, found = self._known(), tuple(sorted(survivors))
        if self._survivors not in (None, found):
            raise Denied("secure sum: two lists of whose updates are there; nothing was sent")
        if self._site not in found or not set(found) <= circle.keys.keys():
            raise Denied("secure sum: the list of whose updates are there is not this sum's; nothing was sent")
        if len(found) < self._terms.enough:
            raise Denied(
                f"secure sum: {len(found)} of {len(self._terms.sites)} updates are there, and {self._terms.enough} "
                "hide each other; nothing was sent"
            )
        # A mask that this site lacks is on its neighbour's update alone: who was shown another list of dealers.
        if self._dealt is None or not set(found) & set(circle.near[self._site]) <= self._dealt.keys():
            raise Denied("secure sum: an update is there whose site dealt this one no shares; nothing was sent")
        if self._before not in ((), found):
            raise Denied(_OPENED)
        self._survivors = found
        return Agreed(site=self._site, signature=self._sign(_said_of_list(circle, found)).hex())

    def unseal(self, agreed: Collection[Agreed]) -> Unsealed:
        """Return the shares that this site holds: of who stayed the own mask's, of who left the key's.

        Not before as many of each survivor's holders have signed the very list as are needed to open a secret: two
        lists can then not both be signed by as many, and no site has both of its secrets opened.
        """
        circle, survivors, dealt = self._known(), self._survivors, self._dealt
        if survivors is None or dealt is None:
            raise Denied("secure sum: nobody has said whose updates are there; nothing was sent")
        there = {one.site for one in agreed if one.site in survivors and self._has_signed(one)}
        concerned = [self._site, *dealt]
        if any(len(there & set(circle.holders(site))) < circle.threshold for site in concerned):
            raise Denied("secure sum: too few sites have signed whose updates are there; nothing was sent")
        texts = {near: self._opened(near, text) for near, text in dealt.items()}
        own = {near: text[: shares.BYTES].hex() for near, text in texts.items() if near in survivors}
        masking = {near: text[shares.BYTES :].hex() for near, text in texts.items() if near not in survivors}
        return Unsealed(site=self._site, own={**own, self._site: self._held.hex()}, masking=masking)

    def _check_before(self, there: Collection[str]) -> None:
        """Refuse a sum that cannot be the one which was opened before, ahead of any update's leaving."""
        if not set(self._before) <= set(there):
            raise Denied(_OPENED)

    def _has_signed(self, one: Agreed) -> bool:
        """Tell whether a site signed the list that this one did. A wrong word of one of them stops no other."""
        circle, survivors = self._known(), self._survivors or ()
        said = _said_of_list(circle, survivors)
        try:
            self._verify(one.site, circle.keys[one.site].signer, said, bytes.fromhex(one.signature))
        except Denied:
            return False
        return True

    def _known(self) -> Circle:
        if self._circle is None:
            raise Denied("secure sum: the sites' keys are not here yet; nothing was sent")
        return self._circle

    def _sealer(self, other: str, sender: str, receiver: str) -> ChaCha20Poly1305:
        names = sender.encode(), receiver.encode()
        return ChaCha20Poly1305(_met(self._sealing, self._known().keys[other].sealing, b"seal", self._terms, *names))

    def _opened(self, near: str, text: str) -> bytes:
        try:
            return self._sealer(near, near, self._site).decrypt(_NONCE, bytes.fromhex(text), None)
        except InvalidTag:
            raise Corrupt(f"secure sum: what {near} sealed for this site is not that; nothing was sent") from None


def check_keys(terms: Terms, keys: Keys, verify: Verify) -> None:
    """Raise `Denied` for keys that their site has not signed for this sum, or with which no secret can be had."""
    verify(keys.site, keys.signer, _said_of_keys(terms, keys), bytes.fromhex(keys.signature))
    for key in (keys.sealing, keys.masking):
        try:
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(key)))
        except ValueError:  # a point with which everybody's secret comes to the same
            raise Denied(f"secure sum: a public key of {keys.site} is none; nothing was sent") from None


def concealed(chunk: Chunk, ring: Ring, weight: float, masks: Masks) -> Chunk:
    """Return a chunk of clipped float32 as what is sent of it: weight times its numbers in the ring, masked."""
    words = ring.lifted(np.frombuffer(chunk.data, np.dtype("<f4")), weight)
    masks.apply(chunk.offset, words)
    return Chunk(chunk.offset, chunk.length, words.data.cast("B"))


def unmasking(
    circle: Circle, dealt: Collection[str], survivors: Collection[str], opened: Collection[Unsealed]
) -> Masks:
    """Return what takes the masks off the sum of the survivors' updates; ``dealt`` are those who dealt shares.

    Raises `Corrupt` while shares are too few, and for shares that are not of what their owner announced.
    """
    added: list[bytes] = []
    taken: list[bytes] = []
    for site in sorted(survivors):
        own = _joined(circle, site, {one.site: one.own[site] for one in opened if site in one.own})
        if sha256(own) != circle.keys[site].own:
            raise Corrupt(f"secure sum: the shares of {site}'s own mask are not what it announced; the sum is lost")
        taken.append(own)
    for site in sorted(set(dealt) - set(survivors)):
        key = _joined(circle, site, {one.site: one.masking[site] for one in opened if site in one.masking})
        if _public(key) != circle.keys[site].masking:
            raise Corrupt(f"secure sum: the shares of {site}'s key are not what it announced; the sum is lost")
        for near in set(circle.near[site]) & set(survivors):
            common = _met(key, circle.keys[near].masking, b"mask", circle.terms)
            (taken if near < site else added).append(common)  # as the neighbour has added it, or taken it
    return Masks(added, taken)


def _joined(circle: Circle, site: str, found: Mapping[str, str]) -> bytes:
    holders = set(circle.holders(site))
    given = {circle.places[holder]: bytes.fromhex(share) for holder, share in found.items() if holder in holders}
    return shares.joined(given, circle.threshold)


def _said_of_keys(terms: Terms, keys: Keys) -> bytes:
    return canonical(["secure sum: keys", digest(terms), keys.model_dump(mode="json", exclude={"signature"})])


def _said_of_list(circle: Circle, survivors: tuple[str, ...]) -> bytes:
    return canonical(["secure sum: survivors", circle.drawn, list(survivors)])


def _private(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(seed)


def _public(seed: bytes) -> str:
    return _private(seed).public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def _met(seed: bytes, other: str, what: bytes, terms: Terms, *names: bytes) -> bytes:
    """Return a key that two sites have in common, each from its own secret and the other's public key (RFC 7748)."""
    met = _private(seed).exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other)))
    said = b"\0".join([b"atoll secure sum", what, digest(terms).encode(), *names])
    return HKDF(hashes.SHA256(), 32, None, said).derive(met)
