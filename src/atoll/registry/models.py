"""Which models there are: a view folded from the journal, so that a registered model and its record cannot differ."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol, Self

from atoll.errors import Corrupt, NotFound
from atoll.registry.lineage import LineageTree, RunOrigin, sources
from atoll.spec.document import digest, near_miss
from atoll.spec.event import Decided, Event, Merged, Planned, Published, Submitted
from atoll.spec.model import Aliased, Erased, Model


class Entry(Protocol):
    """What this view reads of a journal's entry."""

    @property
    def seq(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def event(self) -> Event: ...


@dataclass(slots=True)
class _Run:
    submitted: Submitted | None = None
    time: float | None = None
    planned: Planned | None = None
    decided: list[Decided] = field(default_factory=list)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Kept:
    model: Model
    entry: int
    time: float
    erased: str = ""  # by whom and when, in words


class Models:
    """Every published version, by name. Feed it the journal's entries in order, all at once or one by one."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, _Kept]] = {}
        self._aliases: dict[str, dict[str, int]] = {}
        self._runs: dict[str, _Run] = {}
        self._by_run: dict[str, Model] = {}

    @classmethod
    def fold(cls, entries: Iterable[Entry]) -> Self:
        """Return the view after ``entries``."""
        models = cls()
        for entry in entries:
            models.apply(entry)
        return models

    def apply(self, entry: Entry) -> None:
        """Take in one more entry; raise `Corrupt` when it publishes a version that exists with other content."""
        match entry.event:
            case Submitted() as event:
                run = self._runs.setdefault(event.run, _Run())
                run.submitted, run.time = event, entry.time
            case Planned() as event:
                self._runs.setdefault(event.run, _Run()).planned = event
            case Merged() as event if event.result is not None:
                self._runs.setdefault(event.run, _Run()).missing = event.result.missing
            case Decided() as event if event.run is not None:
                self._runs.setdefault(event.run, _Run()).decided.append(event)
            case Aliased() as event:
                self._aliases.setdefault(event.model, {})[event.alias] = event.version
            case Erased() as event:
                self._erase(event, entry)
            case Published() as event:
                self._publish(event, entry)
            case _:
                pass  # the rest of the journal is for other views

    def get(self, reference: str) -> Model:
        """Return ``name@version``, ``name@alias``, or the latest version of ``name``; raise `NotFound`."""
        return self._find(reference).model

    def all(self) -> tuple[Model, ...]:
        """Every version of every model, by name and version, but for those that were erased."""
        return tuple(model for name in sorted(self._kept) for model in self.versions(name))

    def versions(self, name: str) -> tuple[Model, ...]:
        """The versions of one model, oldest first; none when there is no such model."""
        return tuple(kept.model for _, kept in sorted(self._kept.get(name, {}).items()) if not kept.erased)

    def erased(self) -> tuple[Model, ...]:
        """Every version that was erased."""
        return tuple(kept.model for versions in tuple(self._kept.values()) for kept in versions.values() if kept.erased)

    def same(self, reference: str, model: Model) -> bool:
        """Whether the reference means this version now."""
        try:
            return self._find(reference).model.reference == model.reference
        except NotFound:
            return False

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version of one model."""
        return dict(self._aliases.get(name, {}))

    def next_version(self, name: str) -> int:
        """The version that the next publication of ``name`` gets."""
        return 1 + max(self._kept.get(name, {}), default=0)

    def of_run(self, run: str) -> Model | None:
        """What the run published, so that a hub that starts again does not publish twice."""
        return self._by_run.get(run)

    def lineage(self, reference: str) -> LineageTree:
        """Return where a model came from, also of one that was erased; what the journal does not bear out is said in
        ``doubts``."""
        return self._lineage(self._find(reference, erased=True))

    def _publish(self, event: Published, entry: Entry) -> None:
        versions = self._kept.setdefault(event.model.name, {})
        before = versions.get(event.model.version)
        if before is None:
            versions[event.model.version] = _Kept(event.model, entry.seq, entry.time)
            self._by_run[event.run] = event.model
        elif before.model != event.model:
            raise Corrupt(
                f"journal entry {entry.seq}: publishes {event.model.reference}, which entry {before.entry} "
                "published with other content; find out who wrote it before going on"
            )

    def _erase(self, event: Erased, entry: Entry) -> None:
        versions = self._kept.get(event.model, {})
        if event.version in versions:
            day = f"{datetime.fromtimestamp(entry.time, UTC):%Y-%m-%d %H:%M} UTC"
            versions[event.version] = replace(versions[event.version], erased=f"erased by {event.user} on {day}")
        named = self._aliases.get(event.model, {})
        self._aliases[event.model] = {alias: version for alias, version in named.items() if version != event.version}

    def _find(self, reference: str, erased: bool = False) -> _Kept:
        name, mark, which = reference.partition("@")
        versions = self._kept.get(name)
        if versions is None:
            known = near_miss(name, list(self._kept)) if self._kept else "; train one first"
            raise NotFound(f"model: there is no {name!r}{known}")
        left = {version: kept for version, kept in versions.items() if erased or not kept.erased}
        if not mark and left:
            return left[max(left)]
        if not mark:
            raise NotFound(f"model: all versions of {name!r} were erased; train one first")
        aliases = self._aliases.get(name, {})
        # isdecimal alone takes other scripts' digits, and int of a very long text is slow
        number = int(which) if which.isascii() and which.isdecimal() and len(which) < 10 else aliases.get(which)
        kept = versions.get(number) if number is not None else None
        if kept is None:
            known = [str(version) for version in sorted(left)] + list(aliases)
            raise NotFound(f"model: {name!r} has no version or alias {which!r}{near_miss(which, known)}")
        if kept.erased and not erased:
            raise NotFound(f"model: {kept.model.reference} was {kept.erased}; its lineage is kept, its weights are not")
        return kept

    def _lineage(self, kept: _Kept) -> LineageTree:
        model, claims = kept.model, kept.model.lineage
        run = self._runs.get(claims.run, _Run())
        doubts: list[str] = []
        if run.submitted is None or digest(run.submitted.job) != claims.job:
            doubts.append(f"the journal has no run {claims.run} of job {claims.job}")
        elif run.submitted.code not in (None, claims.code):
            doubts.append(f"run {claims.run} was submitted with code {run.submitted.code}")
        if run.planned is None or digest(run.planned.plan) != claims.plan:
            doubts.append(f"the journal has no plan {claims.plan} for run {claims.run}")
        else:
            fleet = run.planned.fleet
            borne = [one in sources(fleet, [one.site], one.dataset) for one in claims.sources]
            doubts += [
                f"the plan's record has no {one.site}/{one.dataset} of {one.rows} rows and {one.fingerprint}"
                for one, known in zip(claims.sources, borne, strict=True)
                if not known
            ]
        parents: list[LineageTree] = []
        for reference in claims.parents:
            try:
                parent = self._find(reference, erased=True)
            except NotFound:
                parent = None
            if parent is None or parent.entry >= kept.entry:  # a parent is older, so this walk ends
                doubts.append(f"its parent {reference} was not published before it")
            else:
                parents.append(self._lineage(parent))
        origin = RunOrigin(
            run=claims.run,
            user=run.submitted.user if run.submitted else "",
            submitted=run.time,
            plan_digest=claims.plan,
            plan=run.planned.plan if run.planned else None,
            job_digest=claims.job,
            job=run.submitted.job if run.submitted else None,
            decided=tuple(run.decided),
            missing=run.missing,
            trial=run.submitted.trial if run.submitted else None,
        )
        return LineageTree(
            model=model,
            aliases=tuple(sorted(alias for alias, at in self.aliases(model.name).items() if at == model.version)),
            entry=kept.entry,
            published=kept.time,
            origin=origin,
            code=claims.code,
            sources=claims.sources,
            decisions=claims.decisions,
            parents=tuple(parents),
            doubts=tuple(doubts),
            erased=kept.erased,
        )
