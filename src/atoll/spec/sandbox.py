"""What processes that run user code may use of a machine: whether they live in a sandbox, and how much of what."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, field_validator

from atoll.spec.document import Document

# off: never; on: where one can be had, else without, and the log says so; required: no sandbox, no user code.
# YAML takes both words for truth values (1.1, https://yaml.org/type/bool.html).
Mode = Annotated[
    Literal["off", "on", "required"],
    BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value),
]


class Limits(Document):
    """Of each process, and of each that it starts; left out, the machine's own."""

    memory_bytes: Annotated[int, Field(ge=1 << 20)] | None = None  # private, and as much in files in memory
    cpu_seconds: Annotated[int, Field(ge=1)] | None = None  # of processor, in all its life
    file_bytes: Annotated[int, Field(ge=1 << 20)] | None = None  # of one file that it writes
    order_seconds: PositiveFloat | None = None  # by the clock, for one order: a round, an evaluation, a probe
    nice: int = Field(default=0, ge=0, le=19)  # how far behind the machine's other processes


class ReplicasFile(Document):
    """How a hub runs the code of the models that it answers with: `replicas.yaml` of its folder."""

    sandbox: Mode = "on"
    limits: Limits = Field(default=Limits(), examples=[{}])

    @field_validator("limits")
    @classmethod
    def _no_orders(cls, limits: Limits) -> Limits:
        if limits.order_seconds is not None:
            raise ValueError(
                "order_seconds is for who takes orders, and a replica answers while it is asked; remove it"
            )
        return limits
