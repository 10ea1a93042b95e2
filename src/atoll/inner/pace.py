"""A rank's measuring of its own steps: rates, memory, its own seconds, and the share of its device's peak."""

import os
import platform
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import median

from atoll.inner.flops import Demand, Load, Precision, peak_flops
from atoll.inner.mesh import Mesh
from atoll.inner.steps import Step
from atoll.spec.pace import Pace

_WINDOW = 65  # steps: what is told is of the newest, so that a change shows
_SETTLED = 1.0  # seconds of training before a processor's peak is measured: short rounds would be mostly that
_PAGE = os.sysconf("SC_PAGE_SIZE")
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage(2)


@dataclass(frozen=True, slots=True)
class _Taken:
    at: float  # when it ended, on this process's clock
    steps: int
    own: float  # seconds, of one step
    load: Load
    flops: float | None


class Meter:
    """One rank's, for one round: `step` after each step, `pace` whenever it is to be told."""

    def __init__(
        self,
        mesh: Mesh,
        demand: Demand | None,
        precision: Precision = "float32",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``demand`` is the model's (`atoll.inner.flops.demand`); None for a task that steps by itself."""
        self._mesh, self._demand = mesh, demand
        self._precision: Precision = precision
        self._clock = clock
        self._began = self._last = clock()
        self._taken: deque[_Taken] = deque(maxlen=_WINDOW)
        self._loss, self._examples = 0.0, 0

    def step(self, step: Step) -> None:
        """Take note of a step, at its end."""
        now = self._clock()
        if step.load is None:  # all of a task that steps by itself
            load, steps, flops = Load(step.examples, None, 1, False), step.number + 1, None
        else:
            load, steps, flops = step.load, 1, self._demand.of(step.load) if self._demand is not None else None
        # Of one rank alone that does not tell: it waits for nobody.
        own = step.seconds if step.load is not None else (now - self._last) / steps
        self._taken.append(_Taken(now, steps, own, load, flops))
        self._last = now
        self._loss, self._examples = self._loss + step.loss * step.examples, self._examples + step.examples

    def pace(self) -> Pace:
        """Return this rank's part of the site's pace: examples and tokens of a share are one rank's to tell.

        The first step of a round warms up, and does not count as soon as there are others.
        """
        if not self._taken:
            return Pace()
        several = len(self._taken) > 1
        start = self._taken[0].at if several else self._began
        counted = list(islice(self._taken, several, None))
        seconds = max(counted[-1].at - start, 1e-9)
        told = counted if self._mesh.speaks else []
        now = resident()  # the kernel brings the peak up to date later
        tokens = [one.load.tokens for one in counted if one.load.tokens is not None]
        flops = [one.flops for one in counted if one.flops is not None]
        done = sum(flops) / self._apart() / seconds if len(flops) == len(counted) else None
        return Pace(
            steps=sum(one.steps for one in counted),
            examples_per_second=short(sum(one.load.examples for one in told) / seconds),
            tokens_per_second=short(sum(tokens) * self._mesh.speaks / seconds) if tokens else None,
            flops_per_second=short(done) if done is not None else None,
            mfu=self._mfu(done),
            memory_bytes=now,
            memory_peak_bytes=max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT),
            step_seconds=(short(median(one.own for one in counted)),),
            loss=short(self._loss / self._examples) if self._examples else None,
            nodes=(platform.node()[:64],),
        )

    def _apart(self) -> int:
        """Return over how many ranks each operation of a share is spread: those of a stage take different layers."""
        layout = self._mesh.layout
        return 1 if self._mesh.device is None else layout.tensor * layout.context

    def _mfu(self, done: float | None) -> float | None:
        if done is None or self._demand is None:
            return None
        if self._demand.device.type == "cpu" and self._last - self._began < _SETTLED:
            return None
        peak = peak_flops(self._demand.device, self._precision)
        return short(done / peak) if peak else None


def resident() -> int:
    """Return the bytes of memory that this process has now; where that is not told, the most that it ever had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def short(value: float) -> float:
    """Return a number with four digits: no measuring is better, and each of them is journalled."""
    return float(f"{value:.4g}")
