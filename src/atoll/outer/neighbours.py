"""With whom a site has masks and shares in common: with all others, or of many with as few as are safe.

Bell, Bonawitz, Gascon, Lepoint and Raykova, "Secure single-server aggregation with (poly)logarithmic overhead" (2020):
a regular graph, drawn anew for each sum, in which it is all but certain that no site has too many hostile neighbours
and that none loses too many.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from atoll.spec.secret import CROWD, GONE

_HOSTILE = 0.10  # share of the sites, with which and with those who are gone a graph is safe
# Of any site's: that its update could be told by hostile ones and the hub together, that a sum must be begun anew.
_TOLD, _AGAIN = 2.0**-40, 2.0**-20


@dataclass(frozen=True, slots=True)
class Degree:
    """How many neighbours each site has; it and they hold shares, of which ``threshold`` give a secret back.

    Hostile holders who tell the hub both secrets of a site must be fewer than ``2 * threshold - neighbours - 1``.
    """

    neighbours: int
    threshold: int


@cache
def degree(sites: int) -> Degree:
    """Return the fewest neighbours that are safe among so many sites, three or more."""
    if sites > CROWD:
        hostile, gone = math.floor(sites * _HOSTILE), math.floor(sites * GONE)
        for near in range(4, sites - 1, 2):
            for threshold in range(near // 2 + 1, near + 1):
                if sites * _at_least(sites - 1, hostile, near, 2 * threshold - near - 1) > _TOLD:
                    continue
                if sites * _at_least(sites - 1, gone, near, near - threshold + 1) <= _AGAIN:
                    return Degree(near, threshold)
                break  # a higher one only loses more
    return Degree(sites - 1, math.ceil(2 * sites / 3))


def neighbours(sites: Sequence[str], seed: bytes, near: int) -> dict[str, tuple[str, ...]]:
    """Return each site's ``near`` neighbours, sorted: the same for whoever knows the sites and the ``seed``.

    Sites lie on a circle in an order that the seed draws, and have those for neighbours that are next to them.
    """
    if near >= len(sites) - 1:
        return {site: tuple(other for other in sorted(sites) if other != site) for site in sites}
    drawn = _slowly(seed)
    circle = sorted(sites, key=lambda site: hashlib.sha256(drawn + b"\0" + site.encode()).digest())
    steps = [step for step in range(-near // 2, near // 2 + 1) if step]
    return {site: tuple(sorted(circle[(at + step) % len(circle)] for step in steps)) for at, site in enumerate(circle)}


@lru_cache(maxsize=8)
def _slowly(seed: bytes) -> bytes:
    """Return what only some 50 ms of one core and 16 MiB make of a seed (scrypt, RFC 7914).

    Whoever speaks last, or chooses who is left out, may try seeds until a graph is to its liking: each try costs this.
    """
    return hashlib.scrypt(seed, salt=b"atoll secure sum", n=2**14, r=8, p=1)


def _at_least(population: int, marked: int, drawn: int, least: int) -> float:
    """Return the chance that of some that are drawn at ``least`` so many are marked (hypergeometric)."""
    found = range(max(least, 0), min(marked, drawn) + 1)
    ways = sum(math.comb(marked, each) * math.comb(population - marked, drawn - each) for each in found)
    return ways / math.comb(population, drawn)
