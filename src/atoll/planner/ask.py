"""What to put to each site's policy before planning, in a fixed order.

A site that may train is asked, in this order:

    plan       may this job be planned with your dataset?
    open       may a worker open the dataset for this purpose?
    code       may this bundle of code come in?
    model_in   may model weights come in?
    query      may sums over columns go out?            only when `data.statistics` names columns
    metric     may metrics go out?
    update     may updates go out, after the transforms of a pinned sync's wire?
    model_out  may the first weights go out?
    data       may the rows themselves go out? Asked so that "gather the data" is answered by its owner.

A site that only evaluates, predicts or answers a query is asked the part of this that it needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.errors import Invalid, NotFound
from atoll.planner.price import rounds
from atoll.planner.terms import with_terms
from atoll.spec.document import near_miss
from atoll.spec.fleet import Dataset, Fleet, Site
from atoll.spec.job import EvaluateJob, Job, PredictJob, QueryJob, TrainJob
from atoll.spec.policy import Crossing, CrossingKind, Decision, Promise, Request
from atoll.spec.sync import Sync
from atoll.spec.user import User
from atoll.spec.wire import clipped, noised

Role = Literal["plan", "open", "code", "model_in", "query", "metric", "update", "model_out", "data"]
Answers = Mapping[str, Mapping[Role, Decision]]  # site -> role -> what its policy said

EVALUATE: tuple[Role, ...] = ("plan", "open", "code", "model_in", "metric")
PREDICT: tuple[Role, ...] = ("plan", "open", "code", "model_in")
QUERY: tuple[Role, ...] = ("plan", "open", "query")

_CROSSINGS: dict[Role, tuple[CrossingKind, Literal["out", "in"]]] = {
    "code": ("code", "in"),
    "model_in": ("model", "in"),
    "query": ("query", "out"),
    "metric": ("metric", "out"),
    "update": ("update", "out"),
    "model_out": ("model", "out"),
    "data": ("data", "out"),
}
# Arrow types that can be summed; null is a column in which one site recorded nothing.
_NUMERIC = ("int", "uint", "float", "double", "half", "decimal", "bool", "null")


@dataclass(frozen=True, slots=True)
class Question:
    """One request to a site's policy, and which of the planner's questions it is."""

    role: Role
    request: Request


def requests(job: Job, fleet: Fleet, user: User, code: str | None, region: str = "") -> dict[str, tuple[Question, ...]]:
    """Return the questions for each candidate site, sites by name, questions in the order stated above.

    `code` is the digest of the bundle, None where the job brings none; `region` is where the hub is. Raises
    `NotFound` when no site has the dataset, a named site does not exist or does not hold it, or a column is missing;
    `Invalid` for a column that cannot be summed.
    """
    asked: dict[str, tuple[Question, ...]] = {}
    for site, needed in _candidates(job, fleet).items():
        holder = _holder(fleet, site)
        dataset = _dataset(job, holder)
        _check_columns(job, site, dataset)
        about = Request(
            action="plan",
            user=user.name,
            roles=user.roles,
            projects=user.projects,
            site=site,
            owner=holder.owner,
            region=holder.region,
            dataset=dataset,
            model=_model(job),
            job=job.name,
            job_kind=job.kind,
            project=job.project,
            purpose=job.purpose,
            code=code or "",
        )
        if isinstance(job, TrainJob) and "update" in needed:
            about = about.model_copy(update={"promise": promised(job, job.sync, dataset)})
        asked[site] = tuple(_question(role, about, job, region) for role in needed)
    return asked


def promised(job: TrainJob, sync: Sync | None, dataset: Dataset) -> Promise:
    """Return what a job does to hide a dataset under a sync, and under what the dataset's owner asks of its wire; None
    for one that is not chosen yet."""
    wire = with_terms(sync.wire if sync is not None else (), dataset.wire)
    return Promise(job=job, noise=noised(wire), rounds=rounds(job.steps, sync.stride) if sync is not None else 0)


def paired(site: str, questions: Sequence[Question], decisions: Sequence[Decision]) -> dict[Role, Decision]:
    """Match a site's decisions to the questions by position; raise `Invalid` when their numbers differ."""
    if len(questions) != len(decisions):
        raise Invalid(f"{site}: answered {len(decisions)} of {len(questions)} questions; update its agent")
    return {question.role: decision for question, decision in zip(questions, decisions, strict=True)}


def needed_to_train(job: TrainJob) -> tuple[Role, ...]:
    """Return the questions a site must answer with yes to train."""
    return ("plan", "open", "code", "model_in", *_query(job), "update")


def training_sites(job: TrainJob, fleet: Fleet) -> tuple[str, ...]:
    """Return the names of the sites that could train, sorted; raise `NotFound` or `Invalid`."""
    return _sites(fleet, job.data.dataset, job.data.sites, "data.sites", "data.dataset")


def evaluating_sites(job: TrainJob | EvaluateJob, fleet: Fleet) -> tuple[str, ...]:
    """Return the names in `data.evaluate`, sorted; raise `NotFound` for one that does not hold the dataset."""
    if job.data.evaluate is None or (job.kind == "train" and not job.data.evaluate):
        return ()
    return _sites(fleet, job.data.dataset, job.data.evaluate, "data.evaluate", "data.dataset")


def working_sites(job: EvaluateJob | PredictJob | QueryJob, fleet: Fleet) -> tuple[str, ...]:
    """Return the names of the sites that could do a job which trains nothing, sorted; raise `NotFound`."""
    if isinstance(job, QueryJob):
        return _sites(fleet, job.dataset, job.sites, "sites", "dataset")
    if isinstance(job, EvaluateJob) and job.data.evaluate is not None:
        return evaluating_sites(job, fleet)
    return _sites(fleet, job.data.dataset, job.data.sites, "data.sites", "data.dataset")


def needed_to_work(job: EvaluateJob | PredictJob | QueryJob) -> tuple[Role, ...]:
    """Return the questions a site must answer with yes to evaluate, predict or answer a query."""
    if isinstance(job, QueryJob):
        return QUERY
    return EVALUATE if isinstance(job, EvaluateJob) else PREDICT


def _candidates(job: Job, fleet: Fleet) -> dict[str, tuple[Role, ...]]:
    if not isinstance(job, TrainJob):
        return dict.fromkeys(working_sites(job, fleet), needed_to_work(job))
    training: tuple[Role, ...] = (*PREDICT, *_query(job), "metric", "update", "model_out", "data")
    candidates = dict.fromkeys(evaluating_sites(job, fleet), EVALUATE)
    candidates |= dict.fromkeys(training_sites(job, fleet), training)
    return dict(sorted(candidates.items()))


def _query(job: TrainJob) -> tuple[Role, ...]:
    return ("query",) if job.data.statistics else ()


def _question(role: Role, about: Request, job: Job, region: str) -> Question:
    if role not in _CROSSINGS:
        return Question(role, about.model_copy(update={"action": role}))
    kind, direction = _CROSSINGS[role]
    dataset = about.dataset
    # A plan adds to a wire what the dataset's owner asks for, so the question is about one that has it.
    pinned = job.sync.wire if isinstance(job, TrainJob) and job.sync else ()
    wire = with_terms(pinned, dataset.wire) if role == "update" and dataset else ()
    crossing = Crossing(
        kind=kind,
        direction=direction,
        site=about.site,
        dataset=dataset.name if dataset else None,
        purpose=about.purpose,
        bytes=dataset.bytes if dataset and role == "data" else 0,
        rows=_rows(role, dataset),
        wire=tuple(step.kind for step in wire),
        clip=clipped(wire),
        noise=noised(wire),
        region=region if direction == "out" else about.region,
    )
    return Question(role, about.model_copy(update={"action": "cross", "crossing": crossing}))


def _rows(role: Role, dataset: Dataset | None) -> int:
    if role in ("query", "metric"):
        return dataset.rows if dataset else 0
    return 1 if role == "data" else 0  # moved rows hide nothing: the smallest group is one row


def _sites(fleet: Fleet, dataset: str, named: Sequence[str] | None, field: str, dataset_field: str) -> tuple[str, ...]:
    holders = sorted(site.name for site in fleet.holding(dataset))
    if not holders:
        known = sorted({held.name for site in fleet.sites for held in site.datasets})
        mend = near_miss(dataset, known) if known else "; register one with `atoll data add`"
        raise NotFound(f"{dataset_field}: no site has a dataset '{dataset}'{mend}")
    if named is None:
        return tuple(holders)
    if not named:
        raise Invalid(f"{field}: names no site; name one, or leave the field out for every site that has '{dataset}'")
    for name in named:
        if fleet.site(name) is None:
            raise NotFound(f"{field}: there is no site '{name}'{near_miss(name, [s.name for s in fleet.sites])}")
        if name not in holders:
            raise NotFound(f"{field}: site '{name}' has no dataset '{dataset}'; {', '.join(holders)} has it")
    return tuple(sorted(set(named)))


def _check_columns(job: Job, site: str, dataset: Dataset) -> None:
    if not isinstance(job, TrainJob) or not dataset.columns:
        return
    for column in job.data.statistics:
        kind = dataset.columns.get(column)
        place = f"dataset '{dataset.name}' of {site}"
        if kind is None:
            raise NotFound(f"data.statistics: {place} has no column '{column}'{near_miss(column, [*dataset.columns])}")
        if not kind.startswith(_NUMERIC):
            raise Invalid(f"data.statistics: column '{column}' in {place} is {kind}, not a number; leave it out")


def _holder(fleet: Fleet, name: str) -> Site:
    site = fleet.site(name)
    assert site is not None, name  # `_sites` found it in this fleet
    return site


def _dataset(job: Job, site: Site) -> Dataset:
    dataset = site.dataset(job.dataset if isinstance(job, QueryJob) else job.data.dataset)
    assert dataset is not None, site.name  # `_sites` returns holders only
    return dataset


def _model(job: Job) -> str | None:
    if isinstance(job, QueryJob):
        return None
    return (job.model or job.name) if isinstance(job, TrainJob) else job.model
