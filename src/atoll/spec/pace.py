"""How fast a site computes: what its ranks measure of themselves while they train, each number with its unit."""

from typing import Annotated

from pydantic import Field

from atoll.spec.document import Document

MOST = 1e30  # of anything a second
_RANKS = 4096
Rate = Annotated[float, Field(ge=0, le=MOST)]  # by the wall clock
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]


class Pace(Document):
    """A site's pace over its newest steps; or one rank's, until those of all are joined (`atoll.runtime.pacing`).

    The formulae and their sources are in docs/progress.md. None is what cannot be known of this task or machine. It is
    the word of processes that run user code: bounded here, and believed for nothing but speed.
    """

    steps: int = Field(default=0, ge=0, le=1 << 40)  # that it was measured over
    examples_per_second: Rate = 0.0
    tokens_per_second: Rate | None = None
    flops_per_second: Rate | None = None  # floating point operations that the model needs, whatever else was computed
    mfu: float | None = Field(default=None, ge=0, le=1e6)  # those as a share of what the devices can do at most
    memory_bytes: Bytes = 0  # resident now, at the rank that has most
    memory_peak_bytes: Bytes = 0  # the most that a rank ever had
    step_seconds: Annotated[tuple[Seconds, ...], Field(max_length=_RANKS)] = ()  # of each rank, without its waiting
    loss: float | None = None  # mean over the examples of the round so far
    nodes: Annotated[tuple[Annotated[str, Field(max_length=64)], ...], Field(max_length=_RANKS)] = ()  # of each rank
    straggler: str = Field(default="", max_length=300)  # which rank holds the others up, and by how much
