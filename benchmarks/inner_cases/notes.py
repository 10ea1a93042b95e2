"""What the ranks noted: when each began which step; and what follows from it when one of them was killed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class Call:
    """A rank was asked for a step's loss: the one before it is done then."""

    at: float  # seconds of the machine's monotonic clock
    processor: float  # seconds that the process had used
    pid: int
    rank: int
    rows: int
    step: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A step from its beginning to that of the next one, at one process."""

    step: int
    rows: int
    began: float
    ended: float
    processor: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Loss:
    """What a killed rank has cost. ``rejoined`` is None where nobody took its place before the end."""

    pause: float  # of the first step that a survivor began afterwards: seconds until it was done, but for its own
    next: float  # seconds until that
    lost: int
    rejoined: float | None


def steps_of(order: np.ndarray, size: int) -> dict[int, int]:
    """Return each row's step, where batches of ``size`` take the rows in this order."""
    return {int(row): at // size for at, row in enumerate(order)}


def read(folder: Path, steps: Mapping[int, int]) -> list[Call]:
    """Return all calls in the order of their time."""
    found: list[Call] = []
    for path in folder.iterdir():
        for at, kind, *rest in _lines(path):
            if kind == "step":
                processor, rank, rows, row = rest
                found.append(Call(float(at), float(processor), int(path.name), int(rank), int(rows), steps[int(row)]))
    return sorted(found, key=lambda call: call.at)


def held(folder: Path, pid: int) -> list[float]:
    """Return for each step of a process but its last the seconds that mirroring and saving it kept its thread from the
    next one: of what is done after the step, and of the wait before the next one's gradients are put to use."""
    each: list[float] = []
    for _, kind, *rest in _lines(folder / str(pid)):
        if kind == "step":
            each.append(0.0)
        elif len(each) > 1 or kind == "keep":
            each[-1 if kind == "keep" else -2] += float(rest[0])
    return each[:-1]


def _lines(path: Path) -> list[list[str]]:
    """Return the words of all lines that are whole."""
    text = path.read_text(encoding="ascii")
    return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]


def taken(calls: Sequence[Call], pid: int, broken: float = math.inf) -> list[Taken]:
    """Return the steps that a process has done. What it had begun before the instant ``broken`` it begins anew."""
    mine = [call for call in calls if call.pid == pid]
    # A pipeline's rank is asked several times for a step, for its micro-batches: the first of them counts.
    firsts = mine[:1] + [
        call for before, call in pairwise(mine) if call.step != before.step or before.at < broken <= call.at
    ]
    return [
        Taken(one.step, one.rows, one.at, other.at, other.processor - one.processor)
        for one, other in pairwise(firsts)
        if other.step > one.step
    ]


def after_kill(calls: Sequence[Call], killed: int, at: float, warm: int) -> Loss:
    """Return what became of the run in which a process was killed at an instant. Raises `ValueError` where it ended."""
    before = {call.pid for call in calls if call.at < at}
    survivors = [taken(calls, pid, at) for pid in sorted(before - {killed})]
    newcomers = [taken(calls, pid) for pid in sorted({call.pid for call in calls} - before)]
    all_taken = [step for steps in survivors for step in steps]
    first = min((step for step in all_taken if step.began > at), key=lambda step: step.ended, default=None)
    if first is None:
        raise ValueError("no survivor has begun and ended a step after the kill")
    usual = [step for step in all_taken if warm <= step.step and step.ended < at]
    after = [step.seconds for step in all_taken if step.began > first.ended and step.rows == first.rows]
    alone = statistics.median(step.seconds for step in usual) * first.rows / usual[0].rows
    own = min(alone, statistics.median(after)) if after else alone
    last = max(call.step for call in calls if call.at < at)
    again = min(call.step for call in calls if call.at > at)
    steps = {call.step for call in calls}
    missing = max(steps) + 1 - len(steps)
    rejoined = min((steps[0].ended - at for steps in newcomers if steps), default=None)
    return Loss(max(0.0, first.ended - at - own), first.ended - at, max(0, last - again) + missing, rejoined)
