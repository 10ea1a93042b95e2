"""The hub's own record of what crosses between it and the sites: its rules decide each time, its journal counts once.

A fetch that is repeated after a broken link is another stream of the same thing. It is decided anew, for rules may have
changed, and it is not counted anew: what a run's site was given once it has. Weights whole are not the same thing as
their change to others.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from atoll.boundary.gate import Gate
from atoll.errors import Denied, LinkLost
from atoll.journal import Entry
from atoll.runtime.conductor import Conductor
from atoll.runtime.presence import Presence
from atoll.runtime.state import State
from atoll.spec.event import Answer, Crossed, Rejected
from atoll.spec.policy import Crossing, CrossingKind, Request
from atoll.spec.wire import clipped, noised


class Border:
    """Fed every journal entry in order, it knows also what an earlier hub gave out."""

    def __init__(self, gate: Gate, conductor: Conductor, presence: Presence) -> None:
        self._gate, self._conductor, self._presence = gate, conductor, presence
        self._given: dict[str, set[tuple[str, str, str, int]]] = {}  # run under way -> (site, kind, digest, bytes)
        self._brought: dict[str, set[tuple[str, int, int]]] = {}  # run under way -> (site, epoch, position)
        self._late: dict[str, dict[str, int]] = {}  # run under way -> site -> the newest stage it was told too late for
        self._turns: dict[str, threading.Lock] = {}

    def seen(self, entry: Entry) -> None:
        event = entry.event
        run = event.crossing.run if isinstance(event, Crossed) else getattr(event, "run", None)
        if run is None:
            return
        state = self._conductor.states.get(run)
        if state is None or state.over:
            self._given.pop(run, None)
            self._brought.pop(run, None)
            self._late.pop(run, None)
        elif isinstance(event, Rejected):
            self._first_of(run, event.site, event.position)
        elif isinstance(event, Crossed) and event.decision.allowed and event.crossing.direction == "in":
            self._given.setdefault(run, set()).add(_key(event.crossing))

    @contextmanager
    def turn(self, *sites: str) -> Iterator[None]:
        """Hold these sites' turns, in which what crosses is looked up and journalled, one after another for each site.

        Not one turn for a whole run: those who answer at once are journalled with one flush of the disk.
        """
        with ExitStack() as held:
            for site in sorted({*sites}):  # in one order, or two who need the same ones would wait for each other
                held.enter_context(self._turns.setdefault(site, threading.Lock()))
            yield

    def given(self, crossed: Crossed) -> None:
        """Journal something on its way to a site, unless it is given again. Raises as `Conductor.record` does."""
        crossing = crossed.crossing
        with self.turn(crossing.site):
            if _key(crossing) not in self._given.get(crossing.run or "", ()):
                self._conductor.record(crossed)

    def first(self, run: str, answer: Answer) -> bool:
        """Tell whether this answer without tensors is the first of its kind, once for each: it is posted, not awaited,
        so that a second one may come before the first is folded."""
        place = (answer.site, answer.epoch, answer.position)
        with self.turn(answer.site):
            brought = self._brought.setdefault(run, set())
            known = place in brought
            brought.add(place)
        return not known

    def late(self, run: str, answer: Answer) -> bool:
        """Tell whether a late answer is the first to its stage from its site, which alone is journalled."""
        with self.turn(answer.site):
            return self._first_of(run, answer.site, answer.position)

    def _first_of(self, run: str, site: str, position: int) -> bool:
        newest = self._late.setdefault(run, {})
        first = position > newest.get(site, -1)
        newest[site] = max(position, newest.get(site, -1))
        return first

    def decided(
        self, state: State, site: str, kind: CrossingKind, direction: str, size: int, **more: object
    ) -> Crossed:
        """Put a crossing to the hub's rules; raise `Denied`, journalled, or return the event to journal.

        Raises `LinkLost` for a site that this hub has not heard a hello of.
        """
        known, job = self._presence.known(site), state.job
        if known is None:  # its errands are quicker than its agent, where a hub has begun anew
            raise LinkLost(f"{site}: has not said yet what it is; its next assignment asks for this again")
        name = job.dataset if job.kind == "query" else job.data.dataset
        crossing = Crossing.model_validate(
            {
                "kind": kind,
                "direction": direction,
                "site": site,
                "run": state.run,
                "round": state.version if state.work == "train" else None,
                "dataset": name,
                "purpose": job.purpose,
                "bytes": size,
                "region": self._presence.region if direction == "out" else known.region,
                "clip": clipped(state.plan.sync.wire) if kind == "update" and state.plan else 0.0,
                "noise": noised(state.plan.sync.wire) if kind == "update" and state.plan else 0.0,
                **more,
            }
        )
        request = Request(
            action="cross",
            user=state.user,
            roles=state.roles,
            projects=(job.project,),
            site=site,
            owner=known.owner if known else "",
            region=known.region if known else "",
            dataset=known.dataset(name) if known else None,
            job=job.name,
            job_kind=job.kind,
            project=job.project,
            purpose=job.purpose,
            code=state.code or "",
            crossing=crossing,
            guarantee=state.plan.promises.get(site) if state.plan else None,
        )
        crossing, decision = self._gate.judge(request)
        event = Crossed(crossing=crossing, decision=decision)
        if not decision.allowed:
            self._conductor.record(event)
            raise Denied(str(decision))
        return event


def _key(crossing: Crossing) -> tuple[str, str, str, int]:
    return (crossing.site, crossing.kind, crossing.digest or "", crossing.bytes)
