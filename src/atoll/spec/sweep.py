"""What is searched: the fields of a job that its trials differ in, how many there are, and which of them end early."""

import itertools
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, JsonValue, PositiveFloat, PositiveInt, Tag, model_validator

from atoll.spec.document import Document, Label, Name, canonical, near_miss

Parameters = dict[str, JsonValue]  # a field of the job by its path, such as optimiser.rate -> its value in one trial
# What a trial may differ in. Not in its data or its seed, which draws the held-out rows: trials are compared by them.
SEARCHED = ("task.params", "steps", "batch", "optimiser", "sync", "layout", "compute")
_CORNERS = 64  # combinations of ends that are tried out as jobs before anything starts


class Choice(Document):
    """One of these values, in no order."""

    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len({canonical(value) for value in self.choice}) < len(self.choice):
            raise ValueError("choice: a value is there twice; leave one of them out")
        return self

    @property
    def ends(self) -> tuple[JsonValue, ...]:
        return self.choice

    @property
    def points(self) -> tuple[JsonValue, ...]:
        """The values that a grid has of it."""
        return self.choice


class Range(Document):
    """A number from `low` to `high`, both included: every `step`, whole, or as likely in each power of ten (`log`)."""

    low: float
    high: float
    log: bool = False
    step: PositiveFloat | None = None
    integer: bool = False

    @model_validator(mode="after")
    def _goes_from_low_to_high(self) -> Self:
        low, high, step = self.low, self.high, self.step
        if high <= low:
            raise ValueError(f"high: {high:g} is not above low: {low:g}; set high: {2 * low if low > 0 else low + 1:g}")
        if self.log and low <= 0:
            raise ValueError(f"low: {low:g} has no logarithm; set low: {high / 1000:g}, or log: false")
        if self.log and step is not None:
            raise ValueError(f"step: {step:g} says nothing where log is set; leave one of them out")
        if self.integer and any(value % 1 for value in (low, high, step or 1.0)):
            raise ValueError("integer: low, high and step are to be whole; set integer: false, or round them")
        if step is not None and _below(low, high, step) != high:
            raise ValueError(f"high: {high:g} is no whole number of steps above low; set high: {_below(*self._all):g}")
        return self

    @property
    def _all(self) -> tuple[float, float, float]:
        return self.low, self.high, self.step or 1.0

    @property
    def ends(self) -> tuple[JsonValue, ...]:
        return (int(self.low), int(self.high)) if self.integer else (self.low, self.high)

    @property
    def points(self) -> tuple[JsonValue, ...] | None:
        """The values that a grid has of it; None where they cannot be counted."""
        if self.step is None and (self.log or not self.integer):
            return None
        low, high, step = (Decimal(str(value)) for value in self._all)
        made = (low + number * step for number in range(int((high - low) / step) + 1))
        return tuple(int(value) if self.integer else float(value) for value in made)


def _form(value: Any) -> str:
    return "choice" if isinstance(value, Choice) or (isinstance(value, dict) and "choice" in value) else "range"


Space = Annotated[Annotated[Choice, Tag("choice")] | Annotated[Range, Tag("range")], Discriminator(_form)]


class Pruner(Document):
    """Which trials end early, by their train loss a round.

    asha: after `min_rounds` rounds, and each time `factor` times as many, a trial goes on that is among the best
    1/`factor` of all that came so far (Li et al., 2020; Optuna's SuccessiveHalvingPruner). none: every trial goes on.
    """

    kind: Literal["asha", "none"] = "asha"
    min_rounds: PositiveInt = 1
    factor: int = Field(default=3, ge=2, le=10)


class Sweep(Document):
    """A search for the best values of some fields of a job: each trial is a run of the job with other values.

    `objective` is a metric of the result, or `loss`: the task's own metric of that name, else the last train loss.
    """

    parameters: Annotated[dict[str, Space], Field(min_length=1, max_length=32)]
    trials: int = Field(default=20, ge=1, le=1000)
    concurrent: int = Field(default=2, ge=1, le=64)  # trials under way at the same time
    objective: Label = "loss"
    direction: Literal["minimise", "maximise"] = "minimise"
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    seed: int = Field(default=0, ge=0)
    pruner: Pruner = Pruner()

    @model_validator(mode="after")
    def _fields_that_may_differ(self) -> Self:
        for path in self.parameters:
            if not any(path == known or path.startswith(f"{known}.") for known in SEARCHED):
                near = near_miss(path.partition(".")[0], list(SEARCHED))
                raise ValueError(f"parameters: {path!r} is no field that trials may differ in{near}")
        return self

    @model_validator(mode="after")
    def _enough_trials(self) -> Self:
        if self.concurrent > self.trials:
            raise ValueError(f"concurrent: {self.concurrent}: of {self.trials} trials; set concurrent: {self.trials}")
        if self.objective == "loss" and self.direction == "maximise":
            raise ValueError("direction: 'maximise': a loss is to be small; set direction: minimise")
        if self.sampler != "grid":
            return self
        endless = [path for path, one in self.parameters.items() if one.points is None]
        if endless:
            raise ValueError(f"parameters: {endless[0]!r} has no points for a grid; give it a step or a choice")
        size = math.prod(len(one.points or ()) for one in self.parameters.values())
        if self.trials > size:
            raise ValueError(f"trials: {self.trials}: the grid has {size} points; set trials: {size}")
        return self

    def corners(self) -> Iterator[Parameters]:
        """Yield what is tried out before anything starts: all combinations of ends and choices where they are few,
        otherwise each end and choice once."""
        ends = {path: one.ends for path, one in self.parameters.items()}
        if math.prod(map(len, ends.values())) <= _CORNERS:
            yield from (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
            return
        first: Parameters = {path: values[0] for path, values in ends.items()}
        yield from ({**first, path: value} for path, values in ends.items() for value in values)


class Trial(Document):
    """Which trial of a sweep a run is, from 1 on, and its values."""

    sweep: Name
    number: PositiveInt
    parameters: Parameters


class TrialView(Document):
    """One trial as it is now. `loss`: of its newest round; `objective`: of a finished one."""

    number: int
    run: Name
    parameters: Parameters
    state: Literal["planning", "running", "interrupted", "finished", "pruned", "failed", "cancelled"]
    round: int = 0
    rounds: int = 0
    loss: float | None = None
    objective: float | None = None
    model: str | None = None  # registered, for it was the best when it ended
    words: str = ""

    def without_results(self) -> "TrialView":
        """Return how far it is; why one was pruned, or not registered, is told by its loss."""
        words = "" if self.state in ("finished", "pruned") else self.words
        return self.model_copy(update={"loss": None, "objective": None, "words": words})


class SweepView(Document):
    """A sweep's trials as they are now, in their order, and the number of the best of them."""

    objective: str
    direction: Literal["minimise", "maximise"]
    asked: int  # trials that there will be
    trials: tuple[TrialView, ...] = ()
    best: int | None = None

    @property
    def bests(self) -> tuple[float, ...]:
        """The best objective after each trial that has one, in the order of their numbers."""
        found = [one.objective for one in self.trials if one.objective is not None]
        return tuple(itertools.accumulate(found, min if self.direction == "minimise" else max))

    def without_results(self) -> "SweepView":
        """Return how far its trials are, and nothing of how well they did."""
        return self.model_copy(update={"trials": tuple(one.without_results() for one in self.trials), "best": None})


def placed(fields: Mapping[str, Any], values: Parameters) -> dict[str, Any]:
    """Return a job's fields with these values at their paths, what is above a path first."""
    made = dict(fields)
    for path, value in sorted(values.items()):
        made = _placed(made, path.split("."), value, path)
    return made


def _placed(table: Mapping[str, Any], keys: list[str], value: JsonValue, path: str) -> dict[str, Any]:
    key, below = keys[0], keys[1:]
    if not below:
        return {**table, key: value}
    inner: Any = table.get(key) or {}
    if isinstance(inner, str):
        inner = {"preset": inner}  # `sync: fedavg` is short for `sync: {preset: fedavg}`
    if not isinstance(inner, dict):
        raise ValueError(f"sweep.parameters: {path!r}: {key!r} has no fields; leave out what follows it")
    return {**table, key: _placed(cast("dict[str, Any]", inner), below, value, path)}


def _below(low: float, high: float, step: float) -> float:
    """Return the last whole number of steps above ``low`` that is not above ``high``."""
    first, last, width = (Decimal(str(value)) for value in (low, high, step))
    return float(first + (last - first) // width * width)
