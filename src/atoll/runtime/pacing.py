"""What a site makes of its ranks' paces: one pace, who holds the others up, and each rank's share of the next batches.

Pure functions of what was measured. Ranks wait for each other in every step, so the slowest sets the pace of all; with
fewer examples than the others it does so no more.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import median_low

from atoll.spec.document import Document
from atoll.spec.pace import MOST, Pace
from atoll.spec.plan import Layout

_SLOW = 1.3  # times the median, from which on a rank is told of
_LEAST_STEPS = 3  # that a judgement rests on
_LEAST_SECONDS = 0.5  # that these took: what some milliseconds show is chance
_GAIN = 1.05  # times as fast: for less nothing is changed, since sums over other shares are rounded otherwise
_DAMPING = 0.7  # of the way to what was measured: the next round is never quite like the last
_ALIKE = 1.1  # times as slow as another rank of its share, up to which one is as fast
_LEAST_SHARE = 4  # examples for each on average: of fewer, one more or less is too much


class Balance(Document):
    """How batches are cut from some round on; without ``shares`` evenly."""

    shares: tuple[int, ...] = ()
    straggler: str = ""


def joined(paces: Iterable[Pace | None]) -> Pace | None:
    """Return the pace of a site's ranks together, given in rank order; None where none of them told any.

    They have stepped together, each for its part of it: rates are added, and memory is that of the fullest.
    """
    known = [pace for pace in paces if pace is not None]
    if not known:
        return None
    flops, mfu = _sum(one.flops_per_second for one in known), None
    if flops and all(one.mfu for one in known):
        mfu = flops / sum((one.flops_per_second or 0.0) / one.mfu for one in known if one.mfu)
    return Pace(
        steps=min(one.steps for one in known),
        examples_per_second=_sum(one.examples_per_second for one in known) or 0.0,
        tokens_per_second=_sum(one.tokens_per_second for one in known),
        flops_per_second=flops,
        mfu=mfu,
        memory_bytes=max(one.memory_bytes for one in known),
        memory_peak_bytes=max(one.memory_peak_bytes for one in known),
        step_seconds=tuple(seconds for one in known for seconds in one.step_seconds[:1]),
        loss=known[0].loss,
        nodes=tuple(node for one in known for node in one.nodes[:1]),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    """Return a sum, and None where not all know their part: bounded, for it is the word of user code's processes."""
    parts = list(values)
    return None if None in parts else min(sum(part for part in parts if part is not None), MOST)


def told(pace: Pace | None, balance: Balance) -> Pace | None:
    """Return what of a pace leaves the site: who is slow is named, and the names of its other machines stay."""
    return pace and pace.model_copy(update={"nodes": (), "straggler": balance.straggler})


def shares(speeds: Sequence[float], batch: int, least: int = 1) -> tuple[int, ...]:
    """Cut ``batch`` examples into integers in proportion to speeds, none below ``least``, that sum to it.

    By largest remainders (Hamilton), the earlier first where they are equal. Speeds are above 0, and the batch has
    at least ``least`` for each.
    """
    assert batch >= least * len(speeds), "there is a least share for each"
    wanted = [batch * speed / sum(speeds) for speed in speeds]
    low = {number for number, want in enumerate(wanted) if want < least}
    if low:  # they have the least, and the others the rest, in proportion
        others = [speed for number, speed in enumerate(speeds) if number not in low]
        rest = iter(shares(others, batch - least * len(low), least))
        return tuple(least if number in low else next(rest) for number in range(len(speeds)))
    made = [math.floor(want) for want in wanted]
    by_remainder = sorted(range(len(speeds)), key=lambda number: (made[number] - wanted[number], number))
    for number in by_remainder[: batch - sum(made)]:
        made[number] += 1
    return tuple(made)


def stragglers(seconds: Sequence[float], steps: int) -> dict[int, float]:
    """Return those that take 1.3 times the median or longer for the same work, and how many times, after 3 steps.

    The median of an even number is the lower one of the middle two: of two ranks the slow is held to the fast.
    """
    if steps < _LEAST_STEPS or len(seconds) < 2 or min(seconds) <= 0:
        return {}
    middle = median_low(seconds)
    return {rank: each / middle for rank, each in enumerate(seconds) if each >= _SLOW * middle}


def rebalanced(before: Balance, layout: Layout, batch: int, pace: Pace | None) -> Balance:
    """Return how to cut the batches of the next round, and who was slow in this one, whose ``pace`` under ``before``
    is given. What is too short to be judged changes nothing."""
    if pace is None or len(pace.step_seconds) != layout.ranks or layout.ranks == 1 or min(pace.step_seconds) <= 0:
        return before
    if pace.steps < _LEAST_STEPS or pace.steps * max(pace.step_seconds) < _LEAST_SECONDS:
        return before
    even = _even(layout.shares, batch)
    used = fitting(before, layout, batch) or even
    found = _recut(used, layout, batch, pace)
    return Balance(shares=() if found == even else found, straggler=_slowest(before, used, layout, pace))


def fitting(balance: Balance, layout: Layout, batch: int) -> tuple[int, ...]:
    """Return the shares to take: none, which are even ones, unless they are of such batches and so many."""
    found = balance.shares
    return found if len(found) == layout.shares and sum(found) == batch and min(found) > 0 else ()


def _recut(used: tuple[int, ...], layout: Layout, batch: int, pace: Pace) -> tuple[int, ...]:
    # A pipeline's micro-batches must be equal, and its stages are unequal by nature.
    if layout.pipeline > 1 or batch < _LEAST_SHARE * layout.shares:
        return used
    ranks: list[list[float]] = [[] for _ in used]
    for rank, seconds in enumerate(pace.step_seconds):
        ranks[share_of(layout, rank)].append(seconds)
    if any(max(one) > _ALIKE * min(one) for one in ranks):
        return used  # with fewer examples for all of a share the fast ones among them would idle, too
    slowest = [max(one) for one in ranks]
    speeds = [taken / seconds for taken, seconds in zip(used, slowest, strict=True)]
    goal = [batch * speed / sum(speeds) for speed in speeds]
    found = shares([now + _DAMPING * (then - now) for now, then in zip(used, goal, strict=True)], batch)
    predicted = max(taken / speed for taken, speed in zip(found, speeds, strict=True))
    return found if max(slowest) >= _GAIN * predicted else used


def _slowest(before: Balance, used: Sequence[int], layout: Layout, pace: Pace) -> str:
    """Return the sentence about the slowest of those that hold others up, "" without one; as before, if it is the same
    one, so that it is told once."""
    each, (times, slow) = layout.ranks // layout.pipeline, (0.0, -1)
    for first in range(0, layout.ranks, each):  # stage by stage: others have other layers
        # For an example, so that one who is given fewer is still seen.
        found = [pace.step_seconds[rank] / used[share_of(layout, rank)] for rank in range(first, first + each)]
        for number, ratio in stragglers(found, pace.steps).items():
            times, slow = max((times, slow), (ratio, first + number))
    if slow < 0:
        return ""
    where = f" on {pace.nodes[slow]}" if slow < len(pace.nodes) and pace.nodes[slow] else ""
    who = f"rank {slow}{where} takes "
    if before.straggler.startswith(who):
        return before.straggler
    return f"{who}{times:.1f} times the median for an example"


def _even(count: int, batch: int) -> tuple[int, ...]:
    """Return equal shares, as `atoll.data.batches` cuts them where it is told none."""
    return tuple((number + 1) * batch // count - number * batch // count for number in range(count))


def share_of(layout: Layout, rank: int) -> int:
    """Return which share of a batch is a rank's, as `atoll.inner.mesh.Mesh.share`: tensor and context lie innermost."""
    return rank // (layout.tensor * layout.context) % layout.shares
