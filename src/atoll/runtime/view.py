"""What people see of runs and borders: views folded from the journal, with live progress laid over them."""

import threading
import time
from dataclasses import dataclass, field

from pydantic import JsonValue

from atoll.journal import Entry
from atoll.runtime.machine import State
from atoll.spec.document import Document
from atoll.spec.event import Crossed, Decided, Event, Joined, Submitted
from atoll.spec.run import RunState, RunView, SiteProgress, Traffic


class JournalLine(Document):
    """One entry in words."""

    seq: int
    time: float
    actor: str
    kind: str
    words: str


@dataclass(slots=True)
class _Clock:
    started: float = 0.0
    last: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    resumed: bool = False
    sites: dict[str, SiteProgress] = field(default_factory=dict[str, SiteProgress])


class Views:
    """Fed every journal entry in order; safe to read from any thread."""

    def __init__(self) -> None:
        self._clocks: dict[str, _Clock] = {}
        self._changes: dict[str, int] = {}
        self._news = threading.Condition()
        self.decided: dict[str, list[str]] = {}

    def seen(self, entry: Entry) -> None:
        event = entry.event
        run = event.crossing.run if isinstance(event, Crossed) else getattr(event, "run", None)
        if run is None:
            return
        clock = self._clocks.setdefault(run, _Clock())
        clock.last = entry.time
        match event:
            case Submitted():
                clock.started = entry.time
            case Crossed() if event.decision.allowed:
                if event.crossing.direction == "out":
                    clock.bytes_up += event.crossing.bytes
                else:
                    clock.bytes_down += event.crossing.bytes
            case Decided():
                self.decided.setdefault(run, []).append(str(event.decision))
            case _:
                pass
        self.changed(run)

    def changed(self, run: str) -> None:
        """Wake whoever follows this run."""
        with self._news:
            self._changes[run] = self._changes.get(run, 0) + 1
            self._news.notify_all()

    def wait(self, run: str, seen: int, timeout: float) -> int:
        """Block until the run's counter differs from ``seen`` or the timeout passes; return the counter."""
        with self._news:
            self._news.wait_for(lambda: self._changes.get(run, 0) != seen, timeout)
            return self._changes.get(run, 0)

    def run(self, state: State, here: bool, progress: dict[str, SiteProgress], trouble: str | None) -> RunView:
        """Return a run as it is now; `here` tells whether this hub is conducting it."""
        clock = self._clocks.get(state.run, _Clock())
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
            bytes_up=clock.bytes_up,
            bytes_down=clock.bytes_down,
            started=clock.started,
            seconds=max(0.0, end - clock.started),
            words=state.words or (trouble or "" if here and not state.over else ""),
            error=state.error,
            plan=state.plan,
            result=state.result if state.phase == "finished" else None,
        )


def traffic(events: "list[Event]", run: str | None) -> list[Traffic]:
    """Sum crossings by site, direction and kind."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for event in events:
        if not isinstance(event, Crossed) or (run is not None and event.crossing.run != run):
            continue
        crossing = event.crossing
        row = found.setdefault((crossing.site, crossing.direction, crossing.kind), [0, 0, 0])
        if event.decision.allowed:
            row[0] += 1
            row[1] += crossing.bytes
        else:
            row[2] += 1
    rows = [
        {"site": site, "direction": direction, "kind": kind, "count": row[0], "bytes": row[1], "refused": row[2]}
        for (site, direction, kind), row in sorted(found.items())
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
