"""The one place where runs move: journal an event, fold it, perform the commands that come out of it.

All events pass through one thread in one order. Those that wait together are journalled in one transaction, so that
many sites answering at once cost one flush of the disk. Nothing is told to anybody before it is in the journal.
"""

import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import cast

from atoll.errors import AtollError, Invalid, Unavailable
from atoll.journal import Entry, Journal
from atoll.runtime import faults
from atoll.runtime.machine import Alarm, Command, begin, step
from atoll.runtime.state import State
from atoll.spec.event import Broken, Cancelled, Event, Expired, Pruned, Restarted, RunEvent, Submitted

_RETRY = 1.0  # seconds until events are journalled again after the disk was full
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Posted:
    events: tuple[Event, ...]
    actor: str
    done: "Future[list[Entry]] | None"


class Conductor:
    """Folds the hub's journal into run states and hands their commands to ``perform``.

    ``perform(state, command)`` is called in the conductor's thread and must not block; ``seen(entry)`` is called for
    every entry, old and new, in order, for whoever keeps a view.

    Of a run that is over `states` keeps what people are shown of it (job, plan, losses, result, words) and no more;
    everything else is in the journal. ``retry``: seconds until what a full disk did not take is tried again.
    """

    def __init__(
        self,
        journal: Journal,
        perform: Callable[[State, Command], None],
        seen: Callable[[Entry], None],
        retry: float = _RETRY,
    ) -> None:
        self._journal, self._perform, self._seen, self._retry = journal, perform, seen, retry
        self._inbox: queue.SimpleQueue[_Posted | None] = queue.SimpleQueue()
        self._alarms: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._held: list[_Posted] = []  # what the journal could not take and nobody waits for
        self.states: dict[str, State] = {}
        # Runs under way that this process conducts; others under way were another hub's and wait for `resume`.
        self.here: set[str] = set()
        self.replaying = True  # what `seen` is told happened long ago
        self.trouble: str | None = None  # why the journal cannot be written, while it cannot
        self._thread = threading.Thread(target=self._loop, name="conductor", daemon=True)
        self.closing = self._closed = False

    def start(self) -> None:
        """Fold the journal as it is, without performing anything, and begin to take events."""
        for entry in self._journal.entries():
            self._fold(entry.event)
            self._seen(entry)
        self.replaying = False
        self._thread.start()

    def post(self, *events: Event, actor: str = "hub") -> None:
        """Hand over events; they happen in the order of posting."""
        self._inbox.put(_Posted(events, actor, None))

    def record(self, *events: Event, actor: str = "hub", timeout: float = 30.0) -> list[Entry]:
        """Post events and wait until they are journalled and folded. Raises `Unavailable` when they cannot be, and
        `Invalid` where they would begin a run under the name of another; then none of them happens."""
        if self.closing or threading.current_thread() is self._thread:
            raise Unavailable("the hub is closing; try again once it runs")
        done: Future[list[Entry]] = Future()
        self._inbox.put(_Posted(events, actor, done))
        for _ in range(2):
            try:
                return done.result(timeout)
            except TimeoutError:
                if done.cancel():  # it does not happen later either: whoever is told so may try again
                    break
        raise Unavailable(f"the hub's journal did not take an entry in {timeout:g} s; look at its disk")

    def close(self) -> None:
        self.closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _loop(self) -> None:
        while not self._closed:
            self._take(self._next())

    def _next(self) -> list[_Posted]:
        """Return everything that waits: events posted, also just before `close`, and alarms that are due."""
        wait = self._alarms[0][0] - time.monotonic() if self._alarms else None
        if self._held:
            wait = self._retry if wait is None else min(wait, self._retry)
        found: list[_Posted | None] = []
        try:
            found.append(self._inbox.get(timeout=max(0.0, wait) if wait is not None else None))
            while not self._inbox.empty():
                found.append(self._inbox.get())
        except queue.Empty:
            pass
        self._closed = None in found
        held, self._held = self._held, []
        waiting = held + [item for item in found if item is not None and _wanted(item)]
        while self._alarms and self._alarms[0][0] <= time.monotonic():
            event = heapq.heappop(self._alarms)[2]
            if self._due(event):
                waiting.append(_Posted((event,), "clock", None))
        return waiting

    def _due(self, event: Event) -> bool:
        """Tell whether an alarm still means something: its stage may have ended long ago."""
        if not isinstance(event, Expired):
            return True
        state = self.states.get(event.run)
        return state is not None and not state.over and state.position == event.position

    def _take(self, posted: list[_Posted]) -> None:
        commands: list[tuple[State, Command]] = []
        happened: list[Event] = []
        posted, doubles = self._parted(posted)
        groups = [list(group) for _, group in itertools.groupby(posted, key=lambda item: item.actor)]
        for number, items in enumerate(groups):
            events = [event for item in items for event in item.events]
            _reached("posted", events)
            try:
                entries = self._journal.append(*events, actor=items[0].actor)
            except AtollError as error:
                # What came later fails with it: a site that left and came back must not be told of the other way round.
                self._failed([*(item for later in groups[number:] for item in later), *doubles], error)
                doubles = []
                break
            self.trouble = None
            happened += events
            for entry in entries:
                faults.reached("hub", "journalled", entry.event.kind)
                if isinstance(entry.event, Submitted | Restarted | Cancelled | Pruned):
                    self.here.add(entry.event.run)
                commands += self._fold(entry.event)
                self._seen(entry)
            start = 0
            for item in items:
                if item.done is not None:
                    item.done.set_result(entries[start : start + len(item.events)])
                start += len(item.events)
        for item in doubles:  # only now, so that whoever is told finds the other run there
            _refuse(item)
        if not self.closing:  # what is journalled and not performed is performed by `resume`
            for state, command in commands:
                self._act(state, command)
            _reached("performed", happened)

    def _parted(self, posted: list[_Posted]) -> tuple[list[_Posted], list[_Posted]]:
        """Set apart what would begin a run under a name that another has: it would be put in that one's place."""
        begun: set[str] = set()
        kept: list[_Posted] = []
        doubles: list[_Posted] = []
        for item in posted:
            names = _begins(item)
            if any(name in begun or name in self.states for name in names):
                doubles.append(item)
            else:
                kept.append(item)
                begun.update(names)
        return kept, doubles

    def _failed(self, items: list[_Posted], error: AtollError) -> None:
        """Who waits for an entry is told; what nobody waits for is tried again, for it must not be lost."""
        if self.trouble != str(error):
            log.error("journal: %s", error)
        self.trouble = str(error)
        for item in items:
            if item.done is not None:
                item.done.set_exception(error)
            else:
                self._held.append(item)

    def _fold(self, event: Event) -> list[tuple[State, Command]]:
        """Return each command with the state it came out of: the run may be elsewhere when it is performed."""
        run = getattr(event, "run", None)
        if isinstance(event, Submitted):
            state, commands = begin(event)
        elif event.kind.startswith("run.") and run in self.states:
            state, commands = step(self.states[run], cast("RunEvent", event))
        else:
            return []
        self.states[state.run] = _shown(state) if state.over else state
        if state.over:  # in this order: one that is neither here nor over was interrupted
            self.here.discard(state.run)
        return [(state, command) for command in commands]

    def _act(self, state: State, command: Command) -> None:
        if isinstance(command, Alarm):
            event = Expired(run=state.run, position=command.position, final=command.final)
            heapq.heappush(self._alarms, (time.monotonic() + command.seconds, next(self._order), event))
            return
        try:
            self._perform(state, command)
        except Exception as error:
            # This thread conducts every run: what goes wrong with one ends that one, and the log has the traceback.
            log.exception("run %s", state.run)
            self.post(Broken(run=state.run, site="hub", words=f"fault in the hub: {error!r}"))


def _reached(point: str, events: Iterable[Event]) -> None:
    for event in events:
        faults.reached("hub", point, event.kind)


def _begins(item: _Posted) -> list[str]:
    return [event.run for event in item.events if isinstance(event, Submitted)]


def _refuse(item: _Posted) -> None:
    name = ", ".join(_begins(item))
    error = Invalid(f"run: {name!r} is the name of another run; choose another, or let the hub choose")
    if item.done is not None:
        item.done.set_exception(error)
    else:
        log.error("of %s: %s", item.actor, error)


def _wanted(item: _Posted) -> bool:
    return item.done is None or item.done.set_running_or_notify_cancel()


def _shown(state: State) -> State:
    """Return a run that is over without what only its going on needed."""
    kept = State(run=state.run, job=state.job, user=state.user, code=state.code, phase=state.phase, plan=state.plan)
    place = {"position": state.position, "epoch": state.epoch, "version": state.version}
    told = {"losses": state.losses, "result": state.result, "words": state.words, "error": state.error}
    return replace(kept, **place, **told, trial=state.trial, pruned=state.pruned)
