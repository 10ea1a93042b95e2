"""What the agent does to an update before it leaves, and in which order."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from atoll.spec.document import Document


class Transform(Document):
    """One step of what the agent does to an update before it leaves, in the order of `ORDER`; all but clip once.

    clip: scale the whole update to an L2 norm of at most `value`.
    noise: add to each number Gaussian noise, of a standard deviation that is `value` times the clip's bound; where the
    update is masked too, each site adds its part of it, and their sum has so much.
    topk: of each chunk, keep the `share` of elements that are largest in magnitude; the others are sent as nothing.
    bfloat16, int8, int4: round each number: to 8 significant bits, to 127 steps a side per block of 1024, to 7 steps
    a side per block of 64. The stated errors are in `atoll.outer.formats`.
    zstd: compress without loss, at `level` (1 when left out).
    mask: hide each number, so that the hub reads the sum of all sites' updates and no single one; after a clip, whose
    bound says how large a number may be (`atoll.outer.secret`).

    `feedback`, of what loses something: the site adds what was lost to its next update (Seide et al., 2014).
    """

    kind: Literal["clip", "noise", "topk", "bfloat16", "int8", "int4", "zstd", "mask"]
    value: PositiveFloat | None = None
    share: float | None = Field(default=None, gt=0, lt=1)
    level: int | None = Field(default=None, ge=1, le=19)
    feedback: bool = True

    @property
    def lossy(self) -> bool:
        return self.kind in ("topk", "bfloat16", "int8", "int4")

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> Self:
        if self.kind == "clip" and self.value is None:
            raise ValueError("clip needs a bound; set value: 1.0")
        if self.kind == "noise" and self.value is None:
            raise ValueError("noise needs a multiple of the clip's bound; set value: 1.0")
        if self.kind == "topk" and self.share is None:
            raise ValueError("topk needs the share to keep; set share: 0.01")
        for field, owners in (("value", ("clip", "noise")), ("share", ("topk",)), ("level", ("zstd",))):
            if self.kind not in owners and getattr(self, field) is not None:
                raise ValueError(f"{self.kind} takes no {field}; remove it")
        if not self.feedback and not self.lossy:
            raise ValueError(f"{self.kind} has nothing to feed back; remove feedback")
        return self


# Of the wire: at most one of each, and clips.
ORDER = (("clip",), ("noise",), ("topk",), ("bfloat16", "int8", "int4", "mask"), ("zstd",))


def disorder(wire: tuple[Transform, ...]) -> str | None:
    """Return what is wrong with the order of transforms, and the mend; None for an order that can be carried out."""
    rank = {kind: place for place, kinds in enumerate(ORDER) for kind in kinds}
    for before, after in pairwise(step.kind for step in wire):
        if rank[before] > rank[after]:
            return f"{after} cannot follow {before}; put {after} before {before}"
        if rank[before] == rank[after] and before != "clip":
            return f"{after} follows {before}, and a wire takes one of {', '.join(ORDER[rank[after]])}; remove one"
    kinds = [step.kind for step in wire]
    if "noise" in kinds and "clip" not in kinds:
        return "noise is a multiple of a clip's bound; put clip before it"
    if "mask" in kinds and not {"clip", "mask"} <= set(kinds) <= {"clip", "noise", "mask"}:
        return "mask is of clipped numbers as they are; put clip before it, and nothing else but noise"
    return None


def _in_order(wire: tuple[Transform, ...]) -> tuple[Transform, ...]:
    if words := disorder(wire):
        raise ValueError(words)
    return wire


Wire = Annotated[tuple[Transform, ...], AfterValidator(_in_order)]


def clipped(wire: tuple[Transform, ...]) -> float:
    """Return the L2 norm that a wire's clips hold an update to; 0 when it has none."""
    return min((step.value for step in wire if step.kind == "clip" and step.value is not None), default=0.0)


def noised(wire: tuple[Transform, ...]) -> float:
    """Return the standard deviation of a wire's noise over the clip's bound; 0 without noise."""
    return next((step.value for step in wire if step.kind == "noise" and step.value is not None), 0.0)
