"""What the demo and the benchmark share: four sites laid out, and one model trained alone, together and pooled.

"Alone" is a job over one hospital's patients, "together" the job as it stands, "pooled" the mark that no owner would
allow (`pooled.py`). All three are measured on the same held-out patients: those that the seed draws at each hospital.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prepare import SITES, prepare

from atoll.console.client import Client, Watch
from atoll.console.document import load_job
from atoll.data.batches import split
from atoll.data.catalogue import Catalogue
from atoll.errors import TaskFailed
from atoll.runtime.site import create
from atoll.spec.fleet import Dataset, Site
from atoll.spec.job import TrainJob
from atoll.spec.run import RunView

HERE = Path(__file__).parent
JOB = HERE / "job.yaml"
PURPOSE = "cardiology-research"
SEEDS = range(5)
HOSPITALS = {site: hospital.removeprefix("VA ") for hospital, site in SITES.items()}
EVERYONE = "everyone"  # the held-out patients of all four

Measured = dict[str, dict[str, float]]  # place (a site, or EVERYONE) -> metric -> value on its held-out patients


@dataclass(frozen=True, slots=True)
class Trial:
    """One seed: one split of each hospital's patients, one order of the batches. `alone` is by who trained."""

    seed: int
    together: Measured
    alone: dict[str, Measured]
    pooled: Measured


def lay_out(home: Path) -> dict[str, Dataset]:
    """Make the four sites in `home`, each with its owner's rules, its own patients and what they are granted for."""
    files = prepare(home / "patients")
    policy = (HERE / "policy.cedar").read_text(encoding="utf-8")
    datasets: dict[str, Dataset] = {}
    for site, hospital in HOSPITALS.items():
        folder = home / "sites" / site
        create(folder, Site(name=site, owner=hospital), policy)
        datasets[site] = Catalogue(folder).add("heart", files[site], purposes=(PURPOSE,))
    return datasets


def heldout(datasets: dict[str, Dataset], seed: int) -> dict[str, list[int]]:
    """Return the rows that each hospital keeps aside under this seed; the sites draw the same ones by themselves."""
    job, _ = load_job(JOB)
    assert isinstance(job, TrainJob)
    return {site: split(data.rows, job.data.holdout, seed)[1].tolist() for site, data in datasets.items()}


def train(hub: Client, seed: int, changes: Sequence[str] = (), watch: Watch | None = None) -> RunView:
    """Run the job to its end. Raises `TaskFailed` with the run's own words when it does not finish."""
    view = hub.run_job(JOB, [f"seed={seed}", *changes], watch)
    if view.state != "finished" or view.result is None:
        raise TaskFailed(f"run {view.run}: {view.state}: {view.words}")
    return view


def measured(view: RunView) -> Measured:
    """Return a finished run's metrics by place."""
    assert view.result is not None
    return {**view.result.by_site, EVERYONE: view.result.metrics}


def together(hub: Client, seed: int, changes: Sequence[str] = ()) -> Measured:
    """Train on all hospitals' patients where they lie; the model is another than `heart`, which the user keeps."""
    return measured(train(hub, seed, ["name=heart-together", *changes]))


def alone(hub: Client, site: str, seed: int) -> Measured:
    """Train on one hospital's patients, by its own statistics, and measure on everyone's."""
    changes = [f"name=heart-{site}-alone", f"data.sites=[{site}]", f"data.evaluate=[{', '.join(HOSPITALS)}]"]
    return measured(train(hub, seed, changes))


def alone_everywhere(hub: Client, seed: int, tell: Callable[[str], None] = lambda words: None) -> dict[str, Measured]:
    """Train four models, one after the other: a warm worker serves the next run, a run beside it starts its own."""
    models: dict[str, Measured] = {}
    for site, hospital in HOSPITALS.items():
        tell(f"seed {seed}: {hospital} alone")
        models[site] = alone(hub, site, seed)
    return models


class Pooled:
    """The impossible mark, in a process of its own, so that no process of Atoll ever opens all hospitals' rows."""

    def __init__(self, home: Path) -> None:
        # Output goes to a file: nobody reads a pipe meanwhile.
        self._path = home / "pooled.json"
        with self._path.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "pooled.py"), str(home / "patients")],
                stdout=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for whoever started it; `close` ends it
            )

    def results(self) -> list[Measured]:
        """Wait for it; return what it measured for each of `SEEDS`."""
        if self._process.wait(timeout=300):
            raise TaskFailed(f"pooled.py ended with exit code {self._process.returncode}; run it by itself to see why")
        told = json.loads(self._path.read_text())
        return [{**one["by_site"], EVERYONE: {name: one[name] for name in ("accuracy", "auc")}} for one in told]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def values(trials: Sequence[Trial], way: str, place: str, metric: str) -> list[float]:
    """Return one value per seed; `alone` for everyone is the mean of the four models. A missing AUC is left out."""
    found: list[float | None] = []
    for trial in trials:
        if way != "alone":
            of = trial.together if way == "together" else trial.pooled
            found.append(of[place].get(metric))
        elif place == EVERYONE:
            found.append(statistics.fmean(model[EVERYONE][metric] for model in trial.alone.values()))
        else:
            found.append(trial.alone[place][place].get(metric))
    return [value for value in found if value is not None and value == value]  # pooled.py says nan


def mean(trials: Sequence[Trial], way: str, metric: str, place: str = EVERYONE) -> float:
    """Return the mean over the seeds."""
    return statistics.fmean(values(trials, way, place, metric))


def abroad(trials: Sequence[Trial], site: str) -> float:
    """Return the accuracy of one hospital's own model on everyone's patients, mean over the seeds."""
    return statistics.fmean(trial.alone[site][EVERYONE]["accuracy"] for trial in trials)


def gains(trials: Sequence[Trial], place: str) -> list[float]:
    """Return, for each seed, together minus alone in points of accuracy on the same patients."""
    pairs = zip(values(trials, "together", place, "accuracy"), values(trials, "alone", place, "accuracy"), strict=True)
    return [100 * (joint - single) for joint, single in pairs]


def percent(scores: Measured) -> str:
    return f"{100 * scores[EVERYONE]['accuracy']:.1f}"


def spread(found: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Return mean and standard deviation over seeds; with one value there is no spread to tell."""
    if not found:
        return "-"
    centre = f"{statistics.fmean(found):{sign}.{digits}f}"
    return f"{centre} ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else centre


COLUMNS = (
    "\nheld-out patients of",
    ">\nn",
    ">accuracy, %\nalone",
    ">\ntogether",
    ">\npooled*",
    ">\ngain",
    ">AUC\nalone",
    ">\ntogether",
    ">\npooled*",
)


def table(trials: Sequence[Trial], counts: dict[str, int]) -> list[list[str]]:
    """Return the rows under `COLUMNS`; `counts` is how many patients each hospital keeps aside."""
    rows: list[list[str]] = []
    for place in (*HOSPITALS, EVERYONE):
        ways = ("alone", "together", "pooled")
        right = [spread([100 * one for one in values(trials, way, place, "accuracy")]) for way in ways]
        areas = [spread(values(trials, way, place, "auc"), 3) for way in ways]
        count = counts.get(place, sum(counts.values()))
        rows.append(
            [HOSPITALS.get(place, "all hospitals"), str(count), *right, spread(gains(trials, place), sign="+"), *areas]
        )
    return rows


def goals(trials: Sequence[Trial]) -> list[tuple[str, str, bool]]:
    """Return each quality goal in words, the figure, and whether it is met, on everyone's held-out patients."""
    joint, auc = mean(trials, "together", "accuracy"), mean(trials, "together", "auc")
    behind, ahead = mean(trials, "pooled", "accuracy") - joint, joint - mean(trials, "alone", "accuracy")
    return [
        ("accuracy together at least 80 %", f"{100 * joint:.1f} %", joint >= 0.80),
        ("AUC together at least 0.88", f"{auc:.3f}", auc >= 0.88),
        ("at most 1.5 points below pooled", f"{100 * behind:+.1f}", behind <= 0.015),
        ("at least 5 points above the mean of the four alone", f"{100 * ahead:+.1f}", ahead >= 0.05),
    ]
