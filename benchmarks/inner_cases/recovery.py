"""What kill -9 of one rank in the middle of a step costs the others, and when another trains in its place."""

import os
import signal
import statistics
import time

from atoll.runtime.local import LocalExecutor
from atoll.spec.plan import Layout
from inner_cases import SETTLE, Bench, Samples, worst
from inner_cases.notes import Loss, after_kill, taken
from inner_cases.site import Site

KEYS = ("survivor_pause_s", "steps_lost", "rejoin_s")
MESH_KEYS = ("mesh_recovery_s",)
_MESHES = {"sharded": Layout(shard=2), "piped": Layout(pipeline=2)}
_BEFORE = 8  # steps that all ranks take before one is killed
_STEPS = 24  # enough for another to come


def copies(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Kill one of two ranks that each hold the whole model: by turns the second, and the first, which leads."""
    site, samples = Site(bench), Samples({key: [] for key in wanted})
    for repeat in range(bench.repeats):
        victim = 1 - repeat % 2
        loss = _killed(bench, site, Layout(data=2), victim)
        bench.report.say(f"  rank {victim} killed: {_told(loss)}")
        found = {"survivor_pause_s": loss.pause, "steps_lost": float(loss.lost), "rejoin_s": loss.rejoined}
        for key in wanted:
            value = found[key]
            if value is None:
                raise RuntimeError(f"{key}: nobody took the killed rank's place in {_STEPS} steps")
            samples[key].append(value)
    return samples


def meshes(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Kill a rank of which each holds a part; the figure is the worse mesh's."""
    site, samples = Site(bench), Samples()
    for repeat in range(bench.repeats):
        for name, layout in _MESHES.items():
            victim = 1 - repeat % 2
            loss = _killed(bench, site, layout, victim)
            bench.report.say(f"  {name}, rank {victim} killed: {_told(loss)}")
            samples.setdefault(f"{name}_recovery_s", []).append(loss.next)
            samples.setdefault(f"{name}_steps_lost", []).append(float(loss.lost))
    return {**samples, **dict.fromkeys(wanted, worst(samples[f"{name}_recovery_s"] for name in _MESHES))}


def _killed(bench: Bench, site: Site, layout: Layout, victim: int) -> Loss:
    time.sleep(SETTLE)
    executor = LocalExecutor()
    piped = layout.pipeline > 1
    try:
        with site.training(executor, layout, microbatches=2 if piped else 1, reference=piped) as training:
            training.begin(_STEPS)
            calls = training.until(lambda calls: any(c.rank == victim and c.step >= _BEFORE for c in calls))
            pid = next(call.pid for call in reversed(calls) if call.rank == victim)
            usual = statistics.median(step.seconds for step in taken(calls, pid) if step.step >= bench.size.warm)
            time.sleep(usual / 2)
            at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            reply = training.reply()
            calls = training.calls()
    finally:
        executor.close()
    if reply.steps != _STEPS or reply.examples != _STEPS * bench.size.batch:
        raise RuntimeError(f"{reply.steps} steps and {reply.examples} examples came of {_STEPS} steps")
    return after_kill(calls, pid, at, bench.size.warm)


def _told(loss: Loss) -> str:
    again = "never" if loss.rejoined is None else f"{loss.rejoined:.2f} s"
    return f"next step after {loss.next:.2f} s, pause {loss.pause:.2f} s, {loss.lost} lost, whole again {again}"
