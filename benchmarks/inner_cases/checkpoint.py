"""For how long a checkpoint on disk holds up the step after which it is made, beside torch's plain saves."""

import statistics
import time

from atoll.runtime.local import LocalExecutor
from atoll.spec.plan import Layout
from inner_cases import SETTLE, Bench, Samples
from inner_cases.beside import plain_saves
from inner_cases.notes import Call, held, taken
from inner_cases.site import Site

KEYS = ("checkpoint_block_ratio",)
_EVERY = 5  # steps
_LEAST = 1e-3  # seconds: less is not told from nothing
_NEVER = 1e6  # seconds between two that are made by time


def measure(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Compare `torch.save` of the model's and AdamW's state with what our saves take of the thread that trains."""
    site, samples = Site(bench), Samples({key: [] for key in wanted})
    for _ in range(bench.repeats):
        time.sleep(SETTLE)
        plain = {name: statistics.median(each) for name, each in plain_saves(bench, site, 3).items()}
        blocked, busy = _ours(bench, site)
        for name, seconds in {**plain, "ours_blocked": blocked, "ours_processor": busy}.items():
            samples.setdefault(f"checkpoint_{name}_s", []).append(seconds)
        told = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in plain.items())
        bench.report.say(f"  {told}; ours {blocked:.3f} s, and {busy:.3f} s of the ranks' processors")
        samples["checkpoint_block_ratio"].append(plain["torch_save"] / max(blocked, _LEAST))
    return samples


def _ours(bench: Bench, site: Site) -> tuple[float, float]:
    """Return for how long a checkpoint keeps rank 0's thread from its steps, and the seconds of all ranks' processors
    in it. What the copy takes beside the next step is in the second."""
    executor = LocalExecutor()
    steps = bench.size.steps
    try:
        with site.training(executor, Layout(data=2), held=True) as training:
            training.begin(steps)
            training.reply()
            kept = str(training.folder / "checkpoint")
            training.begin(2 * steps, checkpoint=kept, checkpoint_seconds=_NEVER, checkpoint_steps=_EVERY)
            training.reply()
            calls = training.calls()
            first = next(call.pid for call in calls if call.rank == 0)
            each = held(training.folder / "notes", first)
    finally:
        executor.close()
    # Counted from 1 within the order, those after which one is made are multiples; none is after its last step.
    blocked = statistics.median(each[at] for at in range(steps + _EVERY - 1, len(each) - 1, _EVERY))
    busy = _EVERY * (_processor(calls, steps, 3 * steps - 1) - _processor(calls, bench.size.warm, steps - 1))
    return blocked, busy


def _processor(calls: list[Call], first: int, end: int) -> float:
    """Return seconds of processor a step, of all ranks together and on average, of the steps from one to another."""
    pids = {call.pid for call in calls}
    each = [[step.processor for step in taken(calls, pid) if first <= step.step < end] for pid in pids]
    return sum(sum(seconds) / len(seconds) for seconds in each)
