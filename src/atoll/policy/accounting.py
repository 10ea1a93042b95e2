"""How much privacy a mechanism costs, by the accountants of Google's dp-accounting (the extra `privacy`).

rdp: Renyi divergences of the sampled Gaussian mechanism (Mironov et al., 2019), turned into (epsilon, delta) as in
Canonne et al. (2020). pld: its privacy loss distribution, discretised to an upper bound (Doroshenko et al., 2022): it
costs a second where the other takes a tenth, and finds less epsilon for the same noise, so that less noise will do.
"""

import logging
import math
from functools import lru_cache
from typing import Any, cast

from atoll.errors import Invalid, Unavailable
from atoll.spec.budget import Accountant, Guarantee, Mechanism, Unit

_LEAST, _MOST = 0.2, 1e6  # multipliers, as `Mechanism` takes them
_CLOSE = 1e-4  # how near to the smallest multiplier `multiplier` comes, as a share of it


def guarantee(unit: Unit, mechanism: Mechanism, delta: float, accountant: Accountant = "pld") -> Guarantee:
    """Return what a mechanism promises about a unit; raise as `epsilon` does."""
    spent = epsilon(mechanism, delta, accountant)
    return Guarantee(unit=unit, epsilon=spent, delta=delta, mechanism=mechanism, accountant=accountant)


def epsilon(mechanism: Mechanism, delta: float, accountant: Accountant = "pld") -> float:
    """Return the epsilon that a mechanism costs at this delta, never less than its true one.

    Raises `Invalid` for a delta not between 0 and 1 (Gaussian noise has none at 0), `Unavailable` without the extra.
    """
    if not 0 < delta < 1:
        raise Invalid(f"delta: {delta}: must be above 0 and below 1; set it below one over the number of units")
    return _epsilon(mechanism.multiplier, mechanism.steps, mechanism.sampling, delta, accountant)


@lru_cache(maxsize=1024)  # a run asks in each round
def _epsilon(size: float, steps: int, sampling: float, delta: float, accountant: Accountant) -> float:
    library = _library()
    step = library.GaussianDpEvent(size)
    if sampling < 1:
        step = library.PoissonSampledDpEvent(sampling, step)
    counting = library.rdp.RdpAccountant() if accountant == "rdp" else library.pld.PLDAccountant()
    counted = counting.compose(library.SelfComposedDpEvent(step, steps))
    return max(0.0, float(counted.get_epsilon(delta)))


def multiplier(wanted: float, delta: float, steps: int, sampling: float = 1.0, accountant: Accountant = "pld") -> float:
    """Return the least noise multiplier, to 0.01 %, whose epsilon is at most `wanted`; raise as `epsilon` does."""
    if not 0 < wanted < math.inf:
        raise Invalid(f"epsilon: {wanted}: must be above 0 and finite; set epsilon: 4.0")

    def cost(size: float) -> float:
        """How much more than wanted it is, as a logarithm: that is close to a line in the logarithm of the size."""
        found = epsilon(Mechanism(multiplier=size, steps=steps, sampling=sampling), delta, accountant)
        return math.log(max(found, wanted * 1e-3) / wanted)

    low, high, over = _LEAST, 1.0, math.inf
    while (under := cost(high)) > 0:
        low, high, over = high, 2 * high, under
        if high > _MOST:
            raise Invalid(
                f"epsilon: {wanted:g}: no noise reaches it in {steps} steps; take fewer steps or a larger one"
            )
    while high > low * (1 + _CLOSE):
        middle = _between(low, high, over, under)
        found = cost(middle)
        low, high, over, under = (low, middle, over, found) if found <= 0 else (middle, high, found, under)
    return high


def _between(low: float, high: float, over: float, under: float) -> float:
    """Return where to look next between a size that costs too much and one that does not, by how much each does: just
    beyond where a line meets what is wanted, on the side of the farther end, so that both ends come close. Each look
    may take a second, and halving takes sixteen of them."""
    share = 0.5 if math.isinf(over) else over / (over - under)
    width = math.log(high / low)
    nudge = 0.4 * _CLOSE / width
    share = min(max(share + (nudge if share < 0.5 else -nudge), nudge), 1 - nudge)
    return low * math.exp(share * width)


def _library() -> Any:
    """Return dp-accounting, which takes seconds to import and has no types."""
    try:
        import dp_accounting  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
        import dp_accounting.pld  # pyright: ignore[reportMissingImports, reportMissingTypeStubs, reportUnusedImport]
        import dp_accounting.rdp  # pyright: ignore[reportMissingImports, reportMissingTypeStubs, reportUnusedImport]
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{error.name}: is not installed, and a privacy budget is counted by it; pip install 'atoll[privacy]'"
        ) from None
    # It warns of each order of divergences that it leaves out: the bound holds without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return cast("Any", dp_accounting)
