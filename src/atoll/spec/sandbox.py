"""What a site's workers may use of its machine: whether they live in a sandbox, and how much of what they may take."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from atoll.spec.document import Document

# off: never; on: where one can be had, else without, and the log says so; required: no sandbox, no user code.
Mode = Literal["off", "on", "required"]


class Limits(Document):
    """Of each worker process, and of each that it starts; left out, the machine's own."""

    memory_bytes: Annotated[int, Field(ge=1 << 20)] | None = None  # private, and as much in files in memory
    cpu_seconds: Annotated[int, Field(ge=1)] | None = None  # of processor, in all its life
    file_bytes: Annotated[int, Field(ge=1 << 20)] | None = None  # of one file that it writes
    order_seconds: PositiveFloat | None = None  # by the clock, for one order: a round, an evaluation, a probe
    nice: int = Field(default=0, ge=0, le=19)  # how far behind the machine's other processes
