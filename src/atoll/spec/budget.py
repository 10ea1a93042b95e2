"""What differential privacy a run promises about a dataset, and what of its owner's budget that uses up.

Two datasets are neighbours when one has one unit more than the other (add or remove one). Of unit `record` that is a
row, of unit `site` all of a site's rows.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from atoll.spec.document import Document, Name

Unit = Literal["record", "site"]
Accountant = Literal["rdp", "pld"]
Epsilon = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Delta = Annotated[float, Field(ge=0, lt=1)]


class Mechanism(Document):
    """Gaussian noise on a sum of clipped vectors, `steps` times over."""

    # Its standard deviation over the clipping norm. Below 0.2 a single step costs epsilon 30 and more, and no promise.
    multiplier: float = Field(ge=0.2, le=1e6)
    steps: PositiveInt
    # The chance with which each unit takes part in a step, by itself (Poisson sampling); 1: all take part in each.
    sampling: float = Field(default=1.0, gt=0, le=1)


class Budget(Document):
    """The most that all runs together may use of a dataset; its owner sets it."""

    unit: Unit = "record"
    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: Delta = 0.0

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:g}, delta {self.delta:g} of each {self.unit}"


class Guarantee(Document):
    """(epsilon, delta) of a mechanism about one unit, by an accountant: what a model's card states."""

    unit: Unit
    epsilon: Epsilon
    delta: Delta
    mechanism: Mechanism
    accountant: Accountant

    @property
    def brief(self) -> str:
        least = math.ceil(self.epsilon * 1e4) / 1e4  # a promise is not to look smaller than it is
        return f"{self.unit}-level (epsilon {least:g}, delta {self.delta:.2g})"

    def __str__(self) -> str:
        mechanism = self.mechanism
        drawn = f"Poisson sampling {mechanism.sampling:.3g}" if mechanism.sampling < 1 else "no sampling"
        steps = f"{mechanism.steps:,} steps of noise {mechanism.multiplier:.4g}"
        return f"{self.brief}: {steps}, {drawn}, {self.accountant.upper()} accountant"


NO_PROMISE = "no privacy promise"


def stated(promises: Mapping[str, Guarantee | None], brief: bool = False) -> tuple[str, ...]:
    """Return what sites are promised, by name, in words: one line for all that are promised the same."""
    told: dict[str, list[str]] = {}
    for site, one in promises.items():
        words = NO_PROMISE if one is None else one.brief if brief else str(one)
        told.setdefault(words, []).append(site)
    if set(told) == {NO_PROMISE}:
        return (NO_PROMISE,)
    return tuple(f"{words} at {at[0] if len(at) == 1 else f'{len(at)} sites'}" for words, at in told.items())


class PrivacyReserved(Document):
    """A run may use so much of a dataset's budget; until it is released all of it counts as used."""

    kind: Literal["privacy.reserved"] = "privacy.reserved"
    dataset: Name
    run: Name
    guarantee: Guarantee


class PrivacyCharged(Document):
    """A run has used so much in all: written before what uses it leaves the site, so that no crash forgets it."""

    kind: Literal["privacy.charged"] = "privacy.charged"
    dataset: Name
    run: Name
    epsilon: Epsilon
    delta: Delta
    steps: NonNegativeInt = 0  # of its mechanism so far


class PrivacyReleased(Document):
    """A run is over: what it reserved and was not charged is free again."""

    kind: Literal["privacy.released"] = "privacy.released"
    dataset: Name
    run: Name


PrivacyEvent = PrivacyReserved | PrivacyCharged | PrivacyReleased


class RunUse(Document):
    """What a run reserved of a dataset's privacy, and was charged so far."""

    run: Name
    reserved: Guarantee
    epsilon: Epsilon
    delta: Delta
    steps: NonNegativeInt  # of the mechanism, that it was charged for
    over: bool


class DatasetUse(Document):
    """What all runs used of a dataset's privacy, and of its budget where it has one."""

    site: Name
    dataset: Name
    budget: Budget | None
    epsilon: Epsilon  # used
    delta: Delta
    reserved: Epsilon  # by runs that go on, beyond what they used
    left: Epsilon | None  # of the budget
    left_delta: Delta | None
    runs: tuple[RunUse, ...]
