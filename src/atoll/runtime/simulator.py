"""A run of the real state machine in simulated time: thousands of sites, scripted faults, and the same end every time.

What `conductor` and `performing` do with threads, disks and sockets happens here in one queue of dated events, drawn
from one seed. Nothing is trained: sites take time, vanish, come back and answer. Faults are data:

    script = [lose("lyon", at_round=3, back_after=20.0), restart_hub(at_round=5), lose("oslo", at_stage="evaluate")]
    simulate(job, plan, script, seed=7)
"""

import heapq
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from atoll.runtime.machine import Alarm, AssignTo, Command, Merge, Publish, begin, step
from atoll.runtime.quarantine import IN_A_ROW
from atoll.runtime.state import State
from atoll.spec.document import sha256
from atoll.spec.event import (
    Answer,
    Answered,
    Barred,
    Broken,
    Expired,
    Joined,
    Lost,
    Merged,
    Planned,
    Published,
    Refused,
    Rejected,
    Restarted,
    Result,
    RunEvent,
    Submitted,
    Work,
)
from atoll.spec.job import Job
from atoll.spec.model import Lineage, Model
from atoll.spec.plan import Plan
from atoll.spec.user import LOCAL

_ZERO = sha256(b"")


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script; made by the functions below."""

    kind: Literal["lose", "slow", "refuse", "spoil", "fail", "release", "restart_hub"]
    at_round: int  # from 1 on; any one of a stage that there is once
    at_stage: Work
    site: str = ""
    value: float | None = None
    missing: tuple[str, ...] = ()


def lose(site: str, at_round: int = 1, back_after: float | None = None, at_stage: Work = "train") -> Fault:
    """The site vanishes in the middle of this round and is back after so many seconds, or never."""
    return Fault("lose", at_round, at_stage, site, back_after)


def slow(site: str, factor: float, at_round: int = 1, at_stage: Work = "train") -> Fault:
    """From this round on the site takes ``factor`` times as long."""
    return Fault("slow", at_round, at_stage, site, factor)


def refuse(site: str, at_round: int = 1, at_stage: Work = "train") -> Fault:
    """The owner's policy says no to the site's part of this round."""
    return Fault("refuse", at_round, at_stage, site)


def spoil(site: str, at_round: int = 1, times: int = 1, at_stage: Work = "train") -> Fault:
    """From this round on the next so many answers of the site cannot be taken. Three in a row: it is in quarantine."""
    return Fault("spoil", at_round, at_stage, site, times)


def fail(site: str, at_round: int = 1, times: int = 1, at_stage: Work = "train") -> Fault:
    """From this round on the task fails at the site the next so many times."""
    return Fault("fail", at_round, at_stage, site, times)


def release(site: str, at_round: int = 1, at_stage: Work = "train") -> Fault:
    """In the middle of this round somebody lets the site out of quarantine."""
    return Fault("release", at_round, at_stage, site)


def restart_hub(at_round: int = 1, missing: tuple[str, ...] = (), at_stage: Work = "train") -> Fault:
    """The hub dies in the middle of this round and begins anew without the updates of the ``missing`` sites."""
    return Fault("restart_hub", at_round, at_stage, missing=missing)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that things take; what a site takes is drawn for each answer from ``train`` seconds up and down."""

    train: float = 1.0
    spread: float = 0.5  # a share of `train`, either way
    link: float = 0.01
    merge: float = 0.05
    hub_down: float = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a simulated run ended: its last state, its journal with the second of each entry, and how long it took."""

    state: State
    journal: tuple[tuple[float, RunEvent], ...]
    seconds: float
    assignments: int


def simulate(
    job: Job, plan: Plan, faults: Iterable[Fault] = (), seed: int = 0, pace: Pace | None = None, limit: float = 1e6
) -> Outcome:
    """Run the machine until the run is over, nothing more can happen, or ``limit`` simulated seconds have passed."""
    return _World(job, plan, tuple(faults), random.Random(seed), pace or Pace()).run(limit)  # noqa: S311 - guards nothing


@dataclass(frozen=True, slots=True)
class _Dated:
    """An event on its way. It is dropped when the session or the hub that it belongs to is gone by then."""

    event: RunEvent
    site: str | None = None  # of whom it comes, over the session of this number
    session: int = 0
    hub: int | None = None  # from within the hub of this number: its alarms and merges die with it


class _World:
    def __init__(self, job: Job, plan: Plan, faults: tuple[Fault, ...], rng: random.Random, pace: Pace) -> None:
        self._faults, self._rng, self._pace = faults, rng, pace
        self._now, self._order = 0.0, itertools.count()
        self._queue: list[tuple[float, int, _Dated]] = []
        self._sessions = dict.fromkeys(dict.fromkeys((*plan.sites, *plan.evaluators)), 0)
        self._away: set[str] = set()
        self._factor: dict[str, float] = {}
        self._spoilt: dict[str, int] = {}  # answers still to come that cannot be taken
        self._failing: dict[str, int] = {}  # times still to come
        self._rejected: dict[str, int] = {}  # in a row
        self._barred: set[str] = set()
        self._hub = self._assignments = self._struck = 0
        self._journal: list[tuple[float, RunEvent]] = []
        submitted = Submitted(run="simulated", user=LOCAL.name, roles=LOCAL.roles, job=job)
        self._state, _ = begin(submitted)
        self._journal.append((0.0, submitted))
        for site in self._sessions:
            self._send(self._pace.link, Joined(run="simulated", site=site), site)
        self._at(2 * self._pace.link, _Dated(Planned(run="simulated", plan=plan), hub=self._hub))

    def run(self, limit: float) -> Outcome:
        while self._queue and not self._state.over and self._queue[0][0] <= limit:
            self._now, _, dated = heapq.heappop(self._queue)
            if dated.hub not in (None, self._hub):
                continue
            if dated.site is not None and self._sessions[dated.site] != dated.session:
                continue
            if isinstance(dated.event, Joined) and dated.event.site in self._barred:
                self._away.discard(dated.event.site)  # it is here, and no run is told
                continue
            if dated.site in self._barred:  # nothing of it is looked at
                continue
            self._fold(dated.event)
        return Outcome(self._state, tuple(self._journal), self._now, self._assignments)

    def _at(self, seconds: float, dated: _Dated) -> None:
        heapq.heappush(self._queue, (self._now + seconds, next(self._order), dated))

    def _send(self, seconds: float, event: RunEvent, site: str) -> None:
        """Have the site say this in so many seconds, if its session lasts as long."""
        self._at(seconds, _Dated(event, site, self._sessions[site]))

    def _fold(self, event: RunEvent) -> None:
        self._journal.append((self._now, event))
        match event:
            case Lost():
                self._away.add(event.site)
                self._sessions[event.site] += 1  # whatever it was doing or saying is gone
            case Joined():
                self._away.discard(event.site)
            case Barred():
                self._barred.add(event.site)
            case Answered():
                self._rejected.pop(event.answer.site, None)
            case Rejected():
                self._reject(event)
            case Restarted():
                self._hub += 1
                for site in self._sessions:
                    self._sessions[site] += 1
                    if site not in self._away | self._barred:
                        self._send(self._pace.hub_down, Joined(run=event.run, site=site), site)
            case _:
                pass
        self._state, commands = step(self._state, event)
        self._strike()
        for command in commands:
            self._perform(command)

    def _reject(self, event: Rejected) -> None:
        count = self._rejected[event.site] = self._rejected.get(event.site, 0) + 1
        if count == IN_A_ROW:
            words = f"{event.words}: in quarantine until `atoll site release {event.site}`"
            self._at(0.0, _Dated(Barred(run=event.run, site=event.site, words=words)))

    def _perform(self, command: Command) -> None:
        state, run = self._state, self._state.run
        match command:
            case AssignTo():
                self._assignments += 1
                place = {"position": state.position, "epoch": state.epoch, "version": state.version}
                self._send(self._duration(command.site), self._answer(command.site, place), command.site)
            case Merge():
                sites = tuple(answer.site for answer in command.answers)
                weights = sha256(f"{state.weights} {sites}".encode())
                result = Result(missing=state.missing) if state.work in ("measure", "evaluate") else None
                merged = Merged(run=run, position=state.position, sites=sites, weights=weights, result=result)
                self._at(self._pace.merge, _Dated(merged, hub=self._hub))
            case Publish():
                self._at(self._pace.merge, _Dated(Published(run=run, model=self._model()), hub=self._hub))
            case Alarm():
                expired = Expired(run=run, position=command.position, final=command.final)
                self._at(command.seconds, _Dated(expired, hub=self._hub))
            case _:  # the plan is given, and whom a run dismisses has nothing more to do here
                pass

    def _answer(self, site: str, place: dict[str, int]) -> RunEvent:
        run = self._state.run
        if self._failing.get(site):
            self._failing[site] -= 1
            words = f"{site}: loss is nan"
            return Broken(run=run, site=site, position=place["position"], words=words, error="TaskFailed")
        if self._spoilt.get(site):
            self._spoilt[site] -= 1
            at = {"position": place["position"], "epoch": place["epoch"]}
            return Rejected.model_validate({"run": run, "site": site, "words": f"{site}: not finite", **at})
        return Answered(run=run, answer=Answer.model_validate({"site": site, "examples": 1, **place}))

    def _duration(self, site: str) -> float:
        spread = self._rng.uniform(-self._pace.spread, self._pace.spread)
        return self._pace.train * (1 + spread) * self._factor.get(site, 1.0) + 2 * self._pace.link

    def _strike(self) -> None:
        """When a stage opens, date its faults for the middle of the shortest that a site, or publishing, can take."""
        state = self._state
        if state.work is None or state.position < self._struck:
            return
        self._struck = state.position + 1
        least = self._pace.merge if state.work == "publish" else self._pace.train * (1 - self._pace.spread)
        for fault in (fault for fault in self._faults if fault.at_stage == state.work):
            if state.work != "train" or fault.at_round == state.version + 1:
                self._begin(fault, least / 2)

    def _begin(self, fault: Fault, soon: float) -> None:
        run, site = self._state.run, fault.site
        match fault.kind:
            case "slow":
                self._factor[site] = fault.value or 1.0
            case "spoil":
                self._spoilt[site] = int(fault.value or 0)
            case "fail":
                self._failing[site] = int(fault.value or 0)
            case "lose":
                self._at(soon, _Dated(Lost(run=run, site=site)))
                if fault.value is not None:
                    self._at(soon + fault.value, _Dated(Joined(run=run, site=site)))
            case "refuse":
                self._at(soon, _Dated(Refused(run=run, site=site, words=f"{site} refuses")))
            case "release":
                self._rejected.pop(site, None)
                self._barred.discard(site)
                if site not in self._away:
                    self._at(soon, _Dated(Joined(run=run, site=site)))
            case "restart_hub":
                self._at(soon, _Dated(Restarted(run=run, missing=fault.missing)))

    def _model(self) -> Model:
        state = self._state
        lineage = Lineage(run=state.run, job=_ZERO, plan=_ZERO, code=_ZERO)
        weights = state.weights or _ZERO
        known = {"name": state.job.name, "version": 1, "weights": weights, "code": _ZERO, "task": "Task"}
        return Model.model_validate({**known, "file": "task.py", "signature": (), "lineage": lineage})
