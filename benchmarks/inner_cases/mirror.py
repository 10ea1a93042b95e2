"""What it costs a step that each rank's part is kept in memory that outlives the rank."""

import time
from pathlib import Path

from atoll.runtime.executor import Executor, Group
from atoll.runtime.local import LocalExecutor, start
from atoll.runtime.piped import PipedGroup
from atoll.runtime.sandbox import Grant
from atoll.spec.plan import Layout
from inner_cases import SETTLE, Bench, Samples, worst
from inner_cases.notes import taken
from inner_cases.site import Site

KEYS = ("mirror_overhead_percent",)
_LAYOUTS = {"copies": Layout(data=2), "parts": Layout(shard=2)}


class Unmirrored:
    """Starts the same processes without memory for a mirror."""

    confined, refuses = False, ""

    def warm(self) -> None:
        """There is nothing to be begun before."""

    def start(self, layout: Layout, folder: Path, grant: Grant | None = None) -> Group:
        ranks = [start((), folder / f"worker-{rank}.log", {}) for rank in range(layout.ranks)]
        return PipedGroup(ranks, folder / "meeting")

    def close(self) -> None:
        """Nothing is left but its groups, which are closed before."""


def measure(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Compare mean seconds a step, with the mirror over without; the figure is the worse layout's."""
    site, samples = Site(bench), Samples()
    for _ in range(bench.repeats):
        for name, layout in _LAYOUTS.items():
            plain, plain_processor = _seconds(bench, site, Unmirrored(), layout)
            kept, kept_processor = _seconds(bench, site, LocalExecutor(), layout)
            more, busier = 100 * (kept / plain - 1), 100 * (kept_processor / plain_processor - 1)
            bench.report.say(
                f"  {name}: {plain:.4f} s a step, mirrored {kept:.4f} s: {more:+.1f} %; processor {busier:+.1f} %"
            )
            samples.setdefault(f"mirror_{name}_percent", []).append(more)
            samples.setdefault(f"mirror_{name}_processor_percent", []).append(busier)
    return {**samples, **dict.fromkeys(wanted, worst(samples[f"mirror_{name}_percent"] for name in _LAYOUTS))}


def _seconds(bench: Bench, site: Site, executor: Executor, layout: Layout) -> tuple[float, float]:
    """Return mean seconds a step by the clock and of the ranks' processors, after the warm-up."""
    time.sleep(SETTLE)
    try:
        with site.training(executor, layout) as training:
            training.begin(2 * bench.size.steps)
            training.reply()
            calls = training.calls()
    finally:
        executor.close()
    steps = [step for pid in {c.pid for c in calls} for step in taken(calls, pid) if step.step >= bench.size.warm]
    return sum(step.seconds for step in steps) / len(steps), sum(step.processor for step in steps) / len(steps)
