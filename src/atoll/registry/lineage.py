"""Where a model came from, as one document: model <- run <- plan <- job, with code, data, decisions and parents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import NonNegativeInt

from atoll.spec.document import Digest, Document, Name
from atoll.spec.event import Decided
from atoll.spec.fleet import Dataset, Fleet
from atoll.spec.job import Job
from atoll.spec.model import Model, Source
from atoll.spec.plan import Plan
from atoll.spec.sweep import Trial


def sources(fleet: Fleet, sites: Iterable[str], dataset: str) -> tuple[Source, ...]:
    """Return what these sites' datasets were in ``fleet``: the plan's, so that nothing later changes the answer."""
    return tuple(
        Source(site=site, dataset=held.name, fingerprint=held.fingerprint, rows=held.rows)
        for site, held in _held(fleet, sites, dataset)
    )


def columns(fleet: Fleet, sites: Iterable[str], dataset: str) -> dict[str, str]:
    """Return column -> Arrow type over these sites' datasets in ``fleet``.

    A column that one site never filled has type null there; the first site that knows better says what it is.
    """
    known: dict[str, str] = {}
    for _, held in _held(fleet, sites, dataset):
        known |= {name: kind for name, kind in held.columns.items() if known.get(name, "null") == "null"}
    return known


def _held(fleet: Fleet, sites: Iterable[str], dataset: str) -> list[tuple[str, Dataset]]:
    there = ((name, fleet.site(name)) for name in sites)
    held = ((name, site.dataset(dataset)) for name, site in there if site is not None)
    return [(name, data) for name, data in held if data is not None]


class RunOrigin(Document):
    """The run that made a model, as the journal tells it; `job` and `plan` are None where the journal lacks them."""

    run: Name
    user: str = ""
    submitted: float | None = None  # seconds since the epoch
    plan_digest: Digest
    plan: Plan | None = None
    job_digest: Digest
    job: Job | None = None
    decided: tuple[Decided, ...] = ()  # what a policy said about the run as a whole, in journal order
    missing: tuple[Name, ...] = ()  # sites that were asked for sums or metrics and did not answer in time
    trial: Trial | None = None  # of a sweep


class LineageTree(Document):
    """A model version with everything that it rests on. `doubts`: where the journal does not bear it out."""

    model: Model
    aliases: tuple[Name, ...] = ()
    entry: NonNegativeInt  # the journal's entry that published it
    published: float  # seconds since the epoch
    origin: RunOrigin
    code: Digest
    sources: tuple[Source, ...] = ()
    decisions: tuple[str, ...] = ()
    parents: tuple[LineageTree, ...] = ()
    doubts: tuple[str, ...] = ()
    erased: str = ""  # by whom and when; "": it is there
    withheld: bool = False  # its metrics and statistics, from whoever reads this

    def branch(self) -> Branch:
        """Return the same as nested lines of text, for a terminal."""
        run = self.origin
        plan = run.plan
        sync = (
            f"{plan.sync.preset or plan.sync.exchange}, period {plan.sync.period}, {plan.rounds} rounds" if plan else ""
        )
        job = f"{run.job.kind} {run.job.name}, purpose {run.job.purpose}" if run.job else ""
        below = [
            Branch(
                text=_line("run", run.run, ", ".join(_who(run))),
                below=(
                    Branch(
                        text=_line("plan", run.plan_digest, sync),
                        below=(Branch(text=_line("job", run.job_digest, job)),),
                    ),
                    *(Branch(text=_line("decision", d.action, f"{d.subject}: {d.decision}")) for d in run.decided),
                ),
            ),
            *self._metrics(),
            *self._privacy(),
            *self._personal(),
            Branch(text=_line("code", self.code, f"{self.model.file}: {self.model.task}")),
            Branch(
                text=f"data: {sum(source.rows for source in self.sources):,} rows at {len(self.sources)} sites",
                below=tuple(
                    Branch(text=f"{one.site}/{one.dataset}: {one.rows:,} rows, {one.fingerprint}")
                    for one in self.sources
                ),
            ),
            *(Branch(text=f"allowed: {words}") for words in self.decisions),
            *(Branch(text="parent", below=(parent.branch(),)) for parent in self.parents),
            *(Branch(text=f"doubt: {words}") for words in self.doubts),
        ]
        names = ", ".join((*self.aliases, *([self.erased] if self.erased else [])))
        return Branch(text=_line("model", self.model.reference, names), below=tuple(below))

    def _personal(self) -> tuple[Branch, ...]:
        patterns = ", ".join(self.model.keep_local)
        return (Branch(text=f"not in it, for each site keeps its own: {patterns}"),) if patterns else ()

    def _privacy(self) -> tuple[Branch, ...]:
        """Return what is promised of the data that it was trained on, and what left the sites beside that."""
        promised = any(one.guarantee is not None for one in self.model.promises)
        plain = {"pooled statistics": self.model.statistics, "metrics": self.model.metrics}
        bare = ", ".join(name for name, there in plain.items() if there or self.withheld)
        beside = (Branch(text=f"not under it, for they have no noise: {bare}"),) if promised and bare else ()
        masked = promised and self.origin.plan is not None and self.origin.plan.sync.masked
        summed = (Branch(text="of the sum of all sites' updates, which alone was seen"),) if masked else ()
        stated = self.model.stated()
        if len(stated) == 1:
            return (Branch(text=f"privacy: {stated[0]}", below=(*summed, *beside)),)
        lines = tuple(Branch(text=words) for words in stated)
        return (Branch(text="privacy", below=(*lines, *summed, *beside)),)

    def _metrics(self) -> tuple[Branch, ...]:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.model.metrics.items())
        silent = ", ".join(self.origin.missing)
        below = (Branch(text=f"no answer in time outside training: {silent}"),) if silent else ()
        if self.withheld:
            scores = "for its run's user, and for whom the hub's rules let release them"
        return (Branch(text=f"metrics: {scores or 'none'}", below=below),) if scores or silent else ()


class Branch(Document):
    """A line of text and the lines under it."""

    text: str
    below: tuple[Branch, ...] = ()


def _who(run: RunOrigin) -> Iterator[str]:
    if run.user:
        yield f"by {run.user}"
    if run.trial is not None:
        yield f"trial {run.trial.number} of {run.trial.sweep}"


def _line(noun: str, name: str, more: str) -> str:
    return f"{noun} {name} ({more})" if more else f"{noun} {name}"
