"""What the runs of each project took, and whether it may take more: a fold of the journal."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from atoll.errors import Denied, NotFound
from atoll.journal import Entry
from atoll.runtime.state import State
from atoll.spec.document import near_miss
from atoll.spec.event import Answered, Submitted
from atoll.spec.user import Project, ProjectSet, ProjectView

DAY = 24 * 3600.0
Record = Callable[..., object]  # (*events, actor) -> once it returns they are durable and folded


@dataclass(slots=True)
class _Taken:
    """Of one project within the last 24 hours, the oldest first. A sweep counts once, and its trials' work counts."""

    runs: deque[float] = field(default_factory=deque[float])  # when they were submitted
    work: deque[tuple[float, float]] = field(default_factory=deque[tuple[float, float]])  # (when told, seconds)

    def forget(self, before: float) -> None:
        while self.runs and self.runs[0] <= before:
            self.runs.popleft()
        while self.work and self.work[0][0] <= before:
            self.work.popleft()

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.work)


class Quotas:
    """Fed every journal entry in order, after it is folded into ``states``; any thread may ask."""

    def __init__(self, record: Record, states: Mapping[str, State]) -> None:
        self._record, self._states = record, states
        self._projects: dict[str, Project] = {"default": Project(name="default")}
        self._taken: dict[str, _Taken] = {}
        # What was taken changes while it is added up: entries come in, and whoever looks forgets what is a day old.
        self._turn = threading.Lock()

    def seen(self, entry: Entry) -> None:
        with self._turn:
            self._fold(entry)

    def _fold(self, entry: Entry) -> None:
        match entry.event:
            case ProjectSet() as event:
                self._projects[event.project.name] = event.project
            case Submitted(trial=None) as event:
                self._of(event.job.project, entry.time).runs.append(entry.time)
            case Answered() as event if event.run in self._states:
                work = self._of(self._states[event.run].job.project, entry.time).work
                work.extend((entry.time, max(0.0, answer.seconds)) for answer in event.answers)
            case _:
                pass

    def put(self, project: Project, by: str) -> Project:
        """Make a project, or give one other bounds, which hold from the next run on."""
        self._record(ProjectSet(project=project, by=by), actor=by)
        return project

    def check(self, name: str, now: float) -> None:
        """Raise `Denied` where a project's bounds leave no room for one more run at a time (seconds since the epoch),
        and say when there is some again; `NotFound` for one that is none."""
        with self._turn:
            self._check(name, now)

    def _check(self, name: str, now: float) -> None:
        project = self._projects.get(name)
        if project is None:
            known = near_miss(name, list(self._projects))
            raise NotFound(f"project: there is no {name!r}{known}; an owner makes one by: atoll project set {name}")
        taken, running = self._of(name, now), self._running(name)
        if project.runs_at_once is not None and running >= project.runs_at_once:
            raise Denied(
                f"project {name}: {running} of {project.runs_at_once} runs at once are under way (runs_at_once); "
                "there is room when one of them ends"
            )
        if project.runs_per_day is not None and len(taken.runs) >= project.runs_per_day:
            free = taken.runs[len(taken.runs) - project.runs_per_day] + DAY
            raise Denied(
                f"project {name}: {len(taken.runs)} of {project.runs_per_day} runs within 24 hours were submitted "
                f"(runs_per_day); there is room again at {_at(free)}"
            )
        if project.site_seconds is not None and taken.seconds >= project.site_seconds:
            raise Denied(
                f"project {name}: its runs took {taken.seconds:.0f} of {project.site_seconds:g} seconds of sites' work "
                f"within 24 hours (site_seconds); there is room again at {_at(_freed(taken, project.site_seconds))}"
            )

    def views(self, now: float) -> list[ProjectView]:
        """Return the projects by name, with what they took until a time (seconds since the epoch)."""
        with self._turn:
            return [self._view(project, now) for _, project in sorted(self._projects.items())]

    def _view(self, project: Project, now: float) -> ProjectView:
        taken = self._of(project.name, now)
        used = {"running": self._running(project.name), "runs": len(taken.runs), "site_seconds": taken.seconds}
        return ProjectView.model_validate({"project": project, **used})

    def _running(self, name: str) -> int:
        states = tuple(self._states.values())
        return sum(not one.over and one.trial is None and one.job.project == name for one in states)

    def _of(self, name: str, now: float) -> _Taken:
        taken = self._taken.setdefault(name, _Taken())
        taken.forget(now - DAY)
        return taken


def _freed(taken: _Taken, bound: float) -> float:
    """Return when so much of the work is a day old that less than the bound is left."""
    left = taken.seconds
    for when, seconds in taken.work:
        left -= seconds
        if left < bound:
            return when + DAY
    return DAY


def _at(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
