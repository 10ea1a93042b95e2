"""What a train job promises about a dataset that it trains on, as its site counts it: of single rows, or of the site.

Of the site it is the noise on each update that leaves: so many times over as the run has rounds, for a site sends one
update in each at most. With fragments that is of a part of the model, clipped by itself. Under masks all sites' noise
together is meant, on the sum that alone is seen (docs/noise.md). Of rows it is `atoll.policy.private`.
"""

import math
from functools import lru_cache

from atoll.policy.accounting import epsilon, guarantee
from atoll.policy.private import private_steps
from atoll.spec.budget import Budget, Guarantee, Mechanism
from atoll.spec.policy import Promise

DELTA = 1e-5  # of noise on the wire, which asks for none, at a dataset whose owner has not set one
_LEAST = 0.2  # a mechanism's multiplier: with less noise there is nothing to promise
_FINE = 0.3  # of a multiplier over the root of the steps: below it loss distributions take seconds
_HALVINGS = 30


def guaranteed(promise: Promise, rows: int, budget: Budget | None) -> Guarantee | None:
    """Return what a run costs a dataset of which it trains on so many rows, in the unit that its budget counts.

    None for one that promises nothing. Rounds that are not planned yet are forecast as one. Raises `Invalid` for a
    promise that cannot be kept with so many rows, `Unavailable` without the extra `privacy`.
    """
    hidden = promise.noise >= _LEAST
    if promise.job.privacy is None or (hidden and budget is not None and budget.unit == "site"):
        limits = (budget.epsilon, budget.delta) if budget is not None else None
        return _of_site(promise.noise, max(1, promise.rounds), limits) if hidden else None
    found = private_steps(promise.job, rows)
    return found[1] if found is not None else None


def so_far(whole: Guarantee, steps: int) -> float:
    """Return the epsilon of the first so many steps of a mechanism, at its delta: by Renyi divergences, a bound that is
    some percent higher and is found at once, and never more than that of all of them."""
    if steps >= whole.mechanism.steps:
        return whole.epsilon
    done = whole.mechanism.model_copy(update={"steps": steps})
    return min(whole.epsilon, epsilon(done, whole.delta, "rdp")) if steps else 0.0


@lru_cache(maxsize=64)
def _of_site(noise: float, rounds: int, limits: tuple[float, float] | None) -> Guarantee:
    mechanism = Mechanism(multiplier=noise, steps=rounds)
    accountant = "pld" if noise / math.sqrt(rounds) >= _FINE else "rdp"
    return guarantee("site", mechanism, _shared(mechanism, *limits) if limits else DELTA, accountant)


def _shared(mechanism: Mechanism, budgeted: float, most: float) -> float:
    """Return the delta at which a run takes the same share of a budget's delta as of its epsilon: noise has an epsilon
    for each delta, and so neither runs out before the other. All of it where even that is too little."""
    most = most or DELTA

    def more(delta: float) -> bool:
        return epsilon(mechanism, delta, "rdp") / budgeted > delta / most

    low, high = math.log(most) - 30.0, math.log(most)
    if more(most):
        return most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if more(math.exp(middle)) else (low, middle)
    return math.exp(high)
