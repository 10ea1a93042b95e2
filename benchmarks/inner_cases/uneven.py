"""Two nodes, one at half its speed: tokens a second with measured shares of a batch against even ones."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.runtime.local import LocalExecutor
from atoll.runtime.pacing import Balance, fitting, rebalanced
from atoll.spec.plan import Layout
from inner_cases import Absent, Bench, Samples
from inner_cases.notes import Call, taken
from inner_cases.site import Site, Training

KEYS = ("uneven_gain",)
_LAYOUT = Layout(data=2)
_BATCH = 12  # a third of it is a whole number
_ROUND = 12  # steps
_FIRST = 3  # rounds by which the shares are found
_BUSY = """
import os, sys, time
parent, until = os.getppid(), time.monotonic() + float(sys.argv[1])
while time.monotonic() < until and os.getppid() == parent:
    sum(range(100_000))
"""
_LONGEST = 900.0  # seconds that a core is kept busy, at most


def measure(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Find shares as an agent does, from the pace of a round; then take rounds of either kind by turns."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Absent("there is one core, and two are needed")
    site, samples = Site(bench), Samples({key: [] for key in wanted})
    executor = LocalExecutor()
    try:
        with site.training(executor, _LAYOUT, size=_BATCH) as training, busy(cores[1]):
            shares = _found(training, cores)
            for _ in range(bench.repeats):
                even, _ = _round(training, ())
                uneven, pace = _round(training, shares)
                bench.report.say(
                    f"  even {even:.2f} examples/s, {shares} {uneven:.2f}: {uneven / even:.2f} times; "
                    f"seconds a step of each rank then {[round(each, 2) for each in pace]}"
                )
                samples["uneven_gain"].append(uneven / even)
                samples.setdefault("uneven_share_of_slow", []).append(shares[1] / _BATCH if shares else 0.5)
    finally:
        executor.close()
    return samples


def _found(training: Training, cores: list[int]) -> tuple[int, ...]:
    """Bind each rank to a core of its own and return the shares that some rounds have led to."""
    balance, bound = Balance(), False
    for _ in range(_FIRST + 1):
        training.begin(_ROUND, shares=fitting(balance, _LAYOUT, _BATCH))
        pace = training.reply().pace
        if bound:  # the first round is not measured under it
            balance = rebalanced(balance, _LAYOUT, _BATCH, pace)
        else:
            bound = _bind(training.calls(), cores)
    return balance.shares


def _bind(calls: list[Call], cores: list[int]) -> bool:
    for rank, pid in {call.rank: call.pid for call in calls}.items():
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {cores[rank]})
    return True


def _round(training: Training, shares: tuple[int, ...]) -> tuple[float, tuple[float, ...]]:
    """Return examples a second after the round's first step, and each rank's own seconds a step."""
    first = training.done
    training.begin(_ROUND, shares=shares)
    pace = training.reply().pace
    calls = [call for call in training.calls() if call.rank == 0 and call.step >= first]
    steps = taken(calls, calls[0].pid)[1:]
    return _BATCH * len(steps) / (steps[-1].ended - steps[0].began), pace.step_seconds if pace else ()


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Keep a core busy, so that whoever else is bound to it has half of it."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(_LONGEST)])
    try:
        os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        process.kill()
        process.wait()
