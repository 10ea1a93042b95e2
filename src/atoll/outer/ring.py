"""Numbers as integers modulo 2^32, the fixed point in which updates are masked: sums of them are exact, or refused."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from atoll.errors import Invalid, TaskFailed

Words = npt.NDArray[np.uint32]
_HALF = 2**31  # words from here on stand for negative numbers
_COARSEST = 2**16  # units that a number at its bound has at least; a thousandth of a percent of it is lost then


@dataclass(frozen=True, slots=True)
class Ring:
    """Weighted numbers of at most ``terms`` sites, each number within ``bound`` and each weight at most ``heaviest``.

    A number is rounded to a multiple of ``bound * terms / 2^31``: with 8 sites, to 28 bits of what it may be.
    """

    terms: int
    bound: float
    heaviest: float

    def __post_init__(self) -> None:
        if self.bound * self._units < _COARSEST:
            raise Invalid(f"sync.wire: mask: {self.terms} sites are too many for sums of 32 bits; ask fewer")

    @property
    def _units(self) -> float:
        # Each term may be rounded up by a half.
        return (_HALF - 1 - self.terms) / (self.terms * self.bound)

    def lifted(self, window: npt.NDArray[np.float32], weight: float) -> Words:
        """Return the words of weight times the numbers of a window, one each, rounded to the nearest.

        Raises `TaskFailed` where a number is beyond the bound, or not finite.
        """
        if not 0 <= weight <= self.heaviest:
            raise TaskFailed(f"examples: {weight:g} in a round, and the order lets {self.heaviest:g} count")
        if window.size and not float(np.abs(window).max()) <= self.bound:
            raise TaskFailed(f"update: a number is beyond {self.bound:g}, to which the order clips it; report this")
        units = np.rint(window.astype(np.float64) * (weight / self.heaviest * self._units))
        return units.astype(np.int64).astype(np.uint32)

    def lowered(self, words: Words) -> npt.NDArray[np.float64]:
        """Return the sums that words stand for, in multiples of the heaviest weight."""
        return words.view(np.int32) / self._units
