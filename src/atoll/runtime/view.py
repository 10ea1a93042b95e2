"""What people see of runs and borders: views folded from the journal, with live progress laid over them."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue

from atoll.journal import Entry, Journal
from atoll.runtime.state import State
from atoll.spec.document import Document
from atoll.spec.event import (
    Answered,
    Cancelled,
    Crossed,
    Decided,
    Event,
    Joined,
    Outdone,
    Pruned,
    Published,
    Submitted,
)
from atoll.spec.pace import Pace
from atoll.spec.run import RunState, RunView, SiteProgress, Traffic

Sums = dict[tuple[str, str, str], tuple[int, int, int]]  # site, direction, kind -> crossings, their bytes, refusals


class JournalLine(Document):
    """One entry in words."""

    seq: int
    time: float
    actor: str
    kind: str
    words: str


@dataclass(slots=True)
class _Clock:
    """What is kept of a run, also long after its end: what its view needs and its state does not have."""

    started: float
    last: float
    bytes_up: int = 0
    bytes_down: int = 0
    paces: dict[str, Pace] = field(default_factory=dict[str, Pace])  # of each site's newest round


class Views:
    """Fed every journal entry in order; safe to read from any thread."""

    def __init__(self) -> None:
        self._clocks: dict[str, _Clock] = {}
        self._turn = threading.Lock()
        self._watched: dict[str, list[Callable[[], None]]] = {}
        self.decided: dict[str, list[str]] = {}  # of each run that may still publish a model: what policies said of it
        self.borders = Borders()

    def seen(self, entry: Entry) -> None:
        event = entry.event
        run = event.crossing.run if isinstance(event, Crossed) else getattr(event, "run", None)
        if isinstance(event, Submitted):
            self._clocks[event.run] = _Clock(entry.time, entry.time)
        clock = self._clocks.get(run or "")
        if run is None or clock is None:  # of no run, or of a plan that was only looked at
            return
        clock.last = entry.time
        match event:
            case Crossed() if event.decision.allowed:
                if event.crossing.direction == "out":
                    clock.bytes_up += event.crossing.bytes
                else:
                    clock.bytes_down += event.crossing.bytes
            case Answered():
                clock.paces |= {one.site: one.pace for one in event.answers if one.pace is not None}
            case Decided():
                self.decided.setdefault(run, []).append(str(event.decision))
            case Published() | Cancelled() | Pruned() | Outdone():
                self.decided.pop(run, None)
            case _:
                pass
        self.changed(run)

    def changed(self, run: str) -> None:
        """Tell whoever watches this run."""
        for tell in tuple(self._watched.get(run, ())):
            tell()

    @contextmanager
    def watch(self, run: str, tell: Callable[[], None]) -> Iterator[None]:
        """Call ``tell`` after each change of the run's view until the context ends.

        It is called in the thread that made the change, which conducts every run: it must not block, nor raise.
        """
        with self._turn:
            self._watched.setdefault(run, []).append(tell)
        try:
            yield
        finally:
            with self._turn:
                left = self._watched[run]
                left.remove(tell)
                if not left:
                    del self._watched[run]

    def run(self, state: State, here: bool, progress: dict[str, SiteProgress], trouble: str | None) -> RunView:
        """Return a run as it is now; `here` tells whether this hub is conducting it."""
        clock = self._clocks.get(state.run, _Clock(0.0, 0.0))  # folded just now, and not seen here yet
        shown: RunState = state.phase
        if not state.over and not here:
            shown = "interrupted"
        end = clock.last if state.over or not here else time.time()
        rounds = state.plan.rounds if state.plan else 0
        return RunView(
            run=state.run,
            name=state.job.name,
            job_kind=state.job.kind,
            purpose=state.job.purpose,
            user=state.user,
            state=shown,
            work=state.work or "",
            round=state.version,
            rounds=rounds,
            loss=state.losses[-1] if state.losses else None,
            losses=state.losses,
            sites=progress,
            paces={site: one for site, one in clock.paces.items() if site not in progress or not progress[site].pace},
            bytes_up=clock.bytes_up,
            bytes_down=clock.bytes_down,
            started=clock.started,
            seconds=max(0.0, end - clock.started),
            words=state.words or (trouble or "" if here and not state.over else ""),
            error=state.error,
            plan=state.plan,
            result=state.result if state.phase == "finished" else None,
            trial=state.trial,
        )


class Borders:
    """What crossed each border, summed from journals as they grow: for the sums of all runs no entry is read twice."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._read: dict[Path, tuple[int, Sums]] = {}  # journal -> its last crossing here, and the sums up to that one

    def of(self, journal: Journal, run: str | None = None) -> Sums:
        """Return the sums of one run, or of all."""
        if run is not None:
            return _summed({}, journal.entries(kinds=("crossing",), run=run))[1]
        with self._turn:
            last, sums = self._read.get(journal.path, (0, {}))
            newest, sums = _summed(sums, journal.entries(after=last, kinds=("crossing",)))
            self._read[journal.path] = (max(last, newest), sums)
        return sums


def _summed(before: Sums, entries: Iterable[Entry]) -> tuple[int, Sums]:
    """Return the number of the last entry, and sums with these crossings added; ``before`` stays as it is."""
    sums, last = dict(before), 0
    for entry in entries:
        last, event = entry.seq, entry.event
        assert isinstance(event, Crossed)
        crossing = event.crossing
        border = (crossing.site, crossing.direction, crossing.kind)
        count, size, refused = sums.get(border, (0, 0, 0))
        if event.decision.allowed:
            sums[border] = (count + 1, size + crossing.bytes, refused)
        else:
            sums[border] = (count, size, refused + 1)
    return last, sums


def traffic(sums: Sums) -> list[Traffic]:
    """Return sums as documents, by site, direction and kind."""
    rows = [
        {"site": site, "direction": direction, "kind": kind, "count": count, "bytes": size, "refused": refused}
        for (site, direction, kind), (count, size, refused) in sorted(sums.items())
    ]
    return [Traffic.model_validate(row) for row in rows]


def line(entry: Entry) -> JournalLine:
    """Tell one entry in words."""
    return JournalLine(
        seq=entry.seq, time=entry.time, actor=entry.actor, kind=entry.event.kind, words=_words(entry.event)
    )


def _words(event: Event) -> str:
    if isinstance(event, Crossed):
        crossing, verb = event.crossing, "crossed" if event.decision.allowed else "was refused"
        way = f"{crossing.site} -> {crossing.peer}" if crossing.direction == "out" else f"hub -> {crossing.site}"
        return f"{crossing.kind} of {crossing.bytes} bytes {verb} {way}: {event.decision}"
    if isinstance(event, Decided):
        return f"{event.action} {event.subject}: {event.decision}"
    if isinstance(event, Joined):
        return f"{event.site} takes part"
    said: dict[str, JsonValue] = event.model_dump(mode="json", exclude_defaults=True)
    parts = [f"{name} {_short(value)}" for name, value in said.items() if name not in ("kind", "run")]
    return ", ".join(parts)


def _short(value: object) -> str:
    text = str(value) if not isinstance(value, dict) else " ".join(f"{key}={_leaf(v)}" for key, v in value.items())
    return text if len(text) <= 120 else text[:117] + "..."


def _leaf(value: object) -> str:
    return str(value) if not isinstance(value, dict | list) else "..."
