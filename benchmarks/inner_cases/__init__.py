"""What `benchmarks/inner.py` measures: its cases, what they share, and what each figure is to be."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reporting import Report

PATIENCE = 300.0  # seconds for one run of ours or of a peer's
SETTLE = 1.0  # seconds for whatever ended to be gone, before the next is timed
Samples = dict[str, list[float]]


class Absent(Exception):
    """What a figure needs is not there; the words say what, and the figure is left out."""


@dataclass(frozen=True, slots=True)
class Size:
    """The GPT and how it is trained: ``batch`` windows of ``length`` bytes a step, over all ranks."""

    width: int
    layers: int
    heads: int
    length: int
    batch: int
    steps: int  # of a run whose speed is measured
    warm: int  # of them that do not count

    @property
    def shape(self) -> dict[str, int]:
        return {
            "vocabulary": 256,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "length": self.length,
        }

    @property
    def tokens(self) -> int:
        return self.batch * self.length


FULL = Size(width=384, layers=6, heads=6, length=128, batch=8, steps=30, warm=5)  # 10.9 M parameters
QUICK = Size(width=128, layers=2, heads=4, length=64, batch=8, steps=12, warm=4)


@dataclass(frozen=True, slots=True)
class Ran:
    """One training run: when it was asked for, and when each step was done, on the clock of the machine."""

    asked: float
    done: tuple[float, ...]
    loss: float  # mean over the run: runs of one job have about the same

    @property
    def start(self) -> float:
        return self.done[0] - self.asked

    def rate(self, size: Size) -> float:
        """Return tokens a second after the warm-up."""
        return size.tokens * (len(self.done) - size.warm) / (self.done[-1] - self.done[size.warm - 1])


@dataclass(frozen=True, slots=True)
class Bench:
    """What each case is given."""

    report: Report
    home: Path
    size: Size
    repeats: int

    def folder(self, name: str) -> Path:
        """Return a new folder for one run."""
        number = 0
        while (path := self.home / f"{name}-{number}").exists():
            number += 1
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure is to be: at least or at most so much."""

    bound: float
    least: bool
    what: str

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound

    def __str__(self) -> str:
        return f"{'at least' if self.least else 'at most'} {self.bound:g}"


GOALS: Mapping[str, Goal] = {
    "throughput_local": Goal(0.98, True, "tokens/s of local ranks over torchrun's"),
    "throughput_ray": Goal(0.98, True, "tokens/s of Ray actors over torchrun's"),
    "start_local": Goal(0.8, False, "seconds to the first step, local ranks over torchrun"),
    "start_ray": Goal(1.2, False, "seconds to the first step, Ray actors over torchrun"),
    "start_vs_ray_train": Goal(3.0, True, "seconds to the first step, Ray Train over our Ray actors"),
    "survivor_pause_s": Goal(0.5, False, "seconds that a killed rank costs the other, beyond its step"),
    "steps_lost": Goal(0, False, "steps done again or left out because of the kill, most of all repeats"),
    "rejoin_s": Goal(4.0, False, "seconds from the kill to the replacement's first step, done"),
    "mesh_recovery_s": Goal(4.0, False, "seconds from the kill to the next step of a sharded or piped mesh"),
    "mirror_overhead_percent": Goal(3.0, False, "percent that mirroring adds to a step"),
    "checkpoint_block_ratio": Goal(5.0, True, "seconds that torch.save blocks a step over ours"),
    "uneven_gain": Goal(1.25, True, "tokens/s with measured shares over even ones, one rank slowed"),
}


def spread(values: list[float]) -> tuple[float, float]:
    """Return the first and third quartile."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def worst(of: Iterable[list[float]]) -> list[float]:
    """Return the samples with the highest median."""
    return max(of, key=statistics.median)


Case = Callable[[Bench, frozenset[str]], Samples]  # of those of its keys that are wanted
