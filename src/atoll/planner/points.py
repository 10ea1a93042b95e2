"""Points of the outer space worth pricing for a job, nearest to centralised training first."""

from dataclasses import dataclass, replace
from math import ceil

from atoll.spec.job import Optimiser, TrainJob
from atoll.spec.plan import Layout, Reason
from atoll.spec.privacy import beyond_private
from atoll.spec.sync import Outer, Sync
from atoll.spec.task import beyond_arrays

FEDAVG_PERIODS = (5, 10, 20, 50)
DILOCO_PERIODS = (20, 50, 100)
LEAST_ROUNDS = 4  # sites that agree fewer times have trained apart
ROUNDS_ALONE = 10  # one site still reports and can resume this often


@dataclass(frozen=True, slots=True)
class Point:
    """A sync with its name, and why it cannot be used, if so."""

    name: str
    sync: Sync
    rejected: tuple[Reason, ...] = ()


def points(job: TrainJob, sites: int, gradients: bool = True) -> tuple[Point, ...]:
    """Return the points to consider for `sites` sites, by rising period; a pinned sync takes its own place first.

    Where the task has no `gradients`, for it hands over arrays, points that need them are there, rejected; so are those
    that do not go with the promise about rows that a job makes.

    DiLoCo is for jobs whose inner optimiser is Adam or AdamW (Douillard et al., 2023); at its periods it stands in
    for FedAvg. Sites keep the state of an optimiser that has any: Adam begun anew every few steps converges badly.
    """
    free = (_alone(job),) if sites == 1 else (_every_step(job.optimiser), *_periods(job))
    free = free if gradients else tuple(_refused(point, beyond_arrays(point.sync)) for point in free)
    if job.privacy is not None:
        free = tuple(_refused(point, beyond_private(point.sync, Layout(), job.compute)) for point in free)
    if job.sync is None:
        return free
    pinned = Point(name(job.sync), job.sync)
    return (pinned, *(point for point in free if point.name != pinned.name and point.sync != pinned.sync))


def name(sync: Sync) -> str:
    """Return a point's name for people: its preset, or what it exchanges, its period, and into how many parts cut."""
    if sync.exchange == "gradient" and sync.period == 1 and sync.wait.kind == "all":
        return "exchange every step"
    parts = f" in {sync.fragments} fragments" if sync.fragments > 1 else ""
    return f"{sync.preset or f'{sync.exchange} exchange'}, period {sync.period}{parts}"


def _refused(point: Point, words: str | None) -> Point:
    return replace(point, rejected=(*point.rejected, Reason(by="capability", words=words))) if words else point


def _alone(job: TrainJob) -> Point:
    # The mean of one site changes nothing, and with the optimiser's state kept the rounds are one unbroken training.
    sync = Sync.model_validate({"preset": "fedavg", "period": ceil(job.steps / ROUNDS_ALONE), "keep_optimiser": True})
    return Point("one site: no outer exchange", sync)


def _every_step(optimiser: Optimiser) -> Point:
    kind = "sgd" if optimiser.kind == "sgd" else "adam"
    momentum = optimiser.momentum if kind == "sgd" else 0.0
    outer = Outer(kind=kind, rate=optimiser.rate, momentum=momentum)
    sync = Sync.model_validate({"preset": "data_parallel", "outer": outer.model_dump()})
    rejected = ()
    if optimiser.weight_decay:
        words = (
            f"the outer {kind} has no weight decay, and optimiser.weight_decay is {optimiser.weight_decay:g}; "
            "set it to 0 to allow this point"
        )
        rejected = (Reason(by="capability", words=words),)
    return Point(name(sync), sync, rejected)


def _periods(job: TrainJob) -> list[Point]:
    longest = max(1, job.steps // LEAST_ROUNDS)
    adaptive = job.optimiser.kind != "sgd"
    diloco = [period for period in DILOCO_PERIODS if period <= longest] if adaptive else []
    fedavg = [period for period in FEDAVG_PERIODS if period <= longest and period not in diloco] or [longest]
    chosen = sorted([(period, "fedavg") for period in fedavg] + [(period, "diloco") for period in diloco])
    keep = adaptive or job.optimiser.momentum > 0
    syncs = [
        Sync.model_validate({"preset": preset, "period": period, "keep_optimiser": keep}) for period, preset in chosen
    ]
    return [Point(name(sync), sync) for sync in syncs]
