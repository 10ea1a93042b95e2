"""Claim: two local ranks that average gradients every step are one process: equal weights up to the order of sums.

The peer and the limit are the same job on one rank. On a model as small as this, two ranks cannot be faster; the ratio
tells what a step's collective costs.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

import numpy as np
from prepare import SITE, prepare
from reporting import Figure, Report, fresh, options, peer

import atoll
from atoll.console.client import Client
from atoll.console.document import load_job
from atoll.data.catalogue import Catalogue
from atoll.errors import TaskFailed
from atoll.policy.defaults import SITE_POLICY
from atoll.registry import weights
from atoll.registry.blobs import Blobs
from atoll.runtime.site import create
from atoll.spec.fleet import Site
from atoll.spec.job import TrainJob

JOB = Path(__file__).parents[1] / "examples" / "digits" / "job.yaml"


@dataclass(frozen=True, slots=True)
class Outcome:
    accuracy: float
    vector: np.ndarray  # float32, all weights
    steps_per_second: float


def main() -> int:
    asked = options("Two local ranks against one.")
    report = Report("digits", "One site: two ranks against one", asked)
    home = fresh("digits")
    file = prepare(home / "images")[SITE]
    create(home / "sites" / SITE, Site(name=SITE), SITE_POLICY)
    Catalogue(home / "sites" / SITE).add("digits", file, purposes=("research",))
    with atoll.connect(home) as hub:
        one, two = (run(hub, home, [f"layout.data={ranks}"]) for ranks in (1, 2))
        speeds = (one.steps_per_second, two.steps_per_second)
        if (
            not asked.quick
        ):  # long enough for the start of a run not to count; rounding grows too far to compare weights
            longer = ["steps=2000", "sync.period=500"]
            first, second = (run(hub, home, [*longer, f"layout.data={ranks}"]) for ranks in (1, 2))
            speeds = (first.steps_per_second, second.steps_per_second)
    report.finish(tell(report, one, two, speeds))
    return 0


def run(hub: Client, home: Path, changes: list[str]) -> Outcome:
    """Train once to start the workers and once for the clock; raise `TaskFailed` when a run does not finish."""
    job, bundle = load_job(JOB, changes)
    assert isinstance(job, TrainJob)
    hub.plan(job, bundle)
    began = time.monotonic()
    view = hub.wait(hub.submit(job, bundle))
    seconds = time.monotonic() - began
    if view.state != "finished" or view.result is None or view.result.model is None:
        raise TaskFailed(f"{view.run}: {view.state}: {view.words}")
    model = hub.model(view.result.model)
    vector, _ = weights.load(Blobs(home / "hub" / "blobs").get(model.weights), model.signature)
    return Outcome(view.result.metrics["accuracy"], vector, job.steps / seconds)


def tell(report: Report, one: Outcome, two: Outcome, speeds: tuple[float, float]) -> dict[str, Figure]:
    apart = float(np.abs(two.vector - one.vector).max())
    rows = [(1, f"{one.accuracy:.4f}", f"{speeds[0]:.0f}"), (2, f"{two.accuracy:.4f}", f"{speeds[1]:.0f}")]
    report.table((">ranks", ">held-out accuracy", ">steps/s"), rows)
    report.say(f"\nLargest difference of a weight: {apart:.1e} (largest weight {float(np.abs(one.vector).max()):.2f}).")
    report.say(f"Two ranks run at {speeds[1] / speeds[0]:.2f} times the speed of one.")
    report.say(f"\n{peer('ray', 'Ray Train')}; {peer('accelerate', 'accelerate')}")
    return {
        "accuracy_one_rank": round(one.accuracy, 4),
        "accuracy_two_ranks": round(two.accuracy, 4),
        "largest_weight_difference": apart,
        "speed_ratio": round(speeds[1] / speeds[0], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
