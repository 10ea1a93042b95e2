"""How fast two ranks train and how soon they do: local processes and Ray actors, beside torchrun and Ray Train."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.runtime.actors import RayExecutor
from atoll.runtime.local import LocalExecutor
from atoll.spec.fleet import Executor as Choice
from atoll.spec.plan import Layout
from inner_cases import SETTLE, Absent, Bench, Ran, Samples
from inner_cases.beside import RANKS, ray_train, torchrun
from inner_cases.site import Site

KEYS = ("throughput_local", "start_local")
RAY_KEYS = ("throughput_ray", "start_ray", "start_vs_ray_train")
_FEW = 2  # steps, where only the start counts
_LAYOUT = Layout(data=RANKS)
Way = Callable[[], Ran]


def local(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Local processes and torchrun by turns."""
    site, samples = Site(bench), Samples()
    ways: dict[str, Way] = {
        "torchrun": lambda: torchrun(bench, site, bench.size.steps),
        "local": lambda: _local(bench, site, samples),
    }
    return _by_turns(bench, ways, samples, wanted)


def actors(bench: Bench, wanted: frozenset[str]) -> Samples:
    """Ray actors by turns with torchrun and Ray Train, each Ray by itself, and up before it is asked for anything."""
    if importlib.util.find_spec("ray") is None:
        raise Absent("Ray is not installed: pip install 'atoll[ray]'")
    site = Site(bench)
    ways: dict[str, Way] = {
        "torchrun": lambda: torchrun(bench, site, bench.size.steps),
        "ray": lambda: _actors(bench, site),
        "Ray Train": lambda: ray_train(bench, site, _FEW),
    }
    if "start_vs_ray_train" not in wanted:
        ways.pop("Ray Train")
    return _by_turns(bench, ways, {}, wanted)


def _by_turns(bench: Bench, ways: dict[str, Way], samples: Samples, wanted: frozenset[str]) -> Samples:
    for _ in range(bench.repeats):
        ran: dict[str, Ran] = {}
        for name, way in ways.items():
            time.sleep(SETTLE)
            ran[name] = way()
            bench.report.say(f"  {name:9} {_told(ran[name], bench)}")
        _compare(ran, bench, samples)
    return {key: values for key, values in samples.items() if key in wanted or key not in (*KEYS, *RAY_KEYS)}


def _told(ran: Ran, bench: Bench) -> str:
    fast = f"{ran.rate(bench.size):6.0f} tokens/s, loss {ran.loss:.2f}" if len(ran.done) > bench.size.warm else ""
    return f"first step after {ran.start:6.2f} s   {fast}"


def _compare(ran: dict[str, Ran], bench: Bench, samples: Samples) -> None:
    """Add what one repeat says: each ratio is of runs that followed each other."""

    def add(key: str, value: float) -> None:
        samples.setdefault(key, []).append(value)

    for name, of in ran.items():
        called = name.lower().replace(" ", "_") + ("_beside_ray" if name == "torchrun" and "ray" in ran else "")
        add(f"{called}_start_s", of.start)
        if len(of.done) > bench.size.warm:
            add(f"{called}_tokens_per_s", of.rate(bench.size))
    for name in ("local", "ray"):
        if name in ran and "torchrun" in ran:
            add(f"throughput_{name}", ran[name].rate(bench.size) / ran["torchrun"].rate(bench.size))
            add(f"start_{name}", ran[name].start / ran["torchrun"].start)
    if "Ray Train" in ran:
        add("start_vs_ray_train", ran["Ray Train"].start / ran["ray"].start)


def _local(bench: Bench, site: Site, samples: Samples) -> Ran:
    """Time an executor's first group, with everything that it starts for it; and then its next one."""
    asked = time.monotonic()
    executor = LocalExecutor()
    try:
        ran = site.train(executor, _LAYOUT, bench.size.steps, asked)
        samples.setdefault("local_next_start_s", []).append(site.train(executor, _LAYOUT, _FEW).start)
    finally:
        executor.close()
    return ran


def _actors(bench: Bench, site: Site) -> Ran:
    with cluster(bench.folder("ray")) as executor:
        return site.train(executor, _LAYOUT, bench.size.steps)


@contextmanager
def cluster(folder: Path) -> Iterator[RayExecutor]:
    """A Ray of our own that is up, as a site's is long before a job comes."""
    executor = RayExecutor(Choice(kind="ray"), RANKS, folder)
    try:
        executor.nodes()
        time.sleep(SETTLE)
        yield executor
    finally:
        executor.close()
