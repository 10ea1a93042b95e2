"""What sites say to each other, through a hub, so that it learns the sum of their updates and no single one."""

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints

from atoll.spec.document import Digest, Document, Name

MOST = 1000  # sites under one sum: the keys of all of them are one message
CROWD = 50  # sites up to which everyone has everyone for a neighbour
GONE = 0.15  # share of more sites than that which may leave in mid-sum
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), Field(examples=["00" * 32])]
Signer = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/=_.-]{1,200}$")]  # a public key, as journals spell it
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$"), Field(examples=["00" * 64])]  # Ed25519
# A number below 2^521, and two of them sealed with a tag of 16 bytes.
Share = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{132}$"), Field(examples=["00" * 66])]
Sealed = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{296}$"), Field(examples=["00" * 148])]


def fewest(sites: int) -> int:
    """Return how many of the sites that are asked must be in a sum: so many that no hub has two lists of them signed,
    each by others, with fewer hostile sites than are told to learn nothing."""
    return max(3, math.ceil(2 * sites / 3) if sites <= CROWD else sites - math.floor(sites * GONE))


class Terms(Document):
    """Of one sum: which it is, whose updates it is of, and the numbers that all of them are held to.

    Every key and signature is for the terms' digest: none is good for another sum, nor for another attempt at it.
    """

    run: Name
    position: int = Field(ge=0)  # of the run's stages
    attempt: int = Field(ge=0)
    sites: tuple[Name, ...] = Field(min_length=3, max_length=MOST, examples=[["a", "b", "c"]])
    bound: PositiveFloat  # of each number's magnitude: the update's L2 norm, to which it is clipped
    heaviest: PositiveInt  # the largest weight that a site may have, in examples
    least: PositiveInt  # of the sites must be in it: into so many parts their noise is cut

    @property
    def enough(self) -> int:
        """How many sites a sum must be of, that neither a single update nor too little noise is left to be seen."""
        return max(fewest(len(self.sites)), self.least)


class Keys(Document):
    """What a site begins a sum with: public keys (X25519) for what is sealed and for masks, its own mask's digest."""

    kind: Literal["keys"] = "keys"
    site: Name
    signer: Signer
    sealing: Key
    masking: Key
    own: Digest
    signature: Signature = "00" * 64


class Dealt(Document):
    """A site's shares of its two secrets, sealed for each of its neighbours."""

    kind: Literal["dealt"] = "dealt"
    site: Name
    sealed: dict[Name, Sealed] = Field(max_length=MOST)


class Agreed(Document):
    """A site's signature of whose updates are there, among those who gave the keys that it saw."""

    kind: Literal["agreed"] = "agreed"
    site: Name
    signature: Signature


class Unsealed(Document):
    """The shares that a site holds: of own masks of those whose updates are in the sum, of the others' keys."""

    kind: Literal["unsealed"] = "unsealed"
    site: Name
    own: dict[Name, Share] = Field(max_length=MOST)
    masking: dict[Name, Share] = Field(max_length=MOST)


class Everyone(Document):
    """The keys of all who gave some."""

    kind: Literal["everyone"] = "everyone"
    keys: tuple[Keys, ...] = Field(max_length=MOST)


class Inbox(Document):
    """What a site's neighbours sealed for it, of those who did."""

    kind: Literal["inbox"] = "inbox"
    sealed: dict[Name, Sealed] = Field(max_length=MOST)


class There(Document):
    """The sites whose updates are here, and no others will be in the sum."""

    kind: Literal["there"] = "there"
    sites: tuple[Name, ...] = Field(max_length=MOST)


class Signed(Document):
    """Who has signed that list."""

    kind: Literal["signed"] = "signed"
    agreed: tuple[Agreed, ...] = Field(max_length=MOST)


Said = Annotated[Keys | Dealt | Agreed | Unsealed, Field(discriminator="kind")]
Told = Annotated[Everyone | Inbox | There | Signed, Field(discriminator="kind")]
