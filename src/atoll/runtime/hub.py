"""The hub: everything a console may ask for, over one home folder. It never sees a row of anybody's data."""

import fcntl
import logging
import threading
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from atoll.boundary.gate import Door, Gate, listen
from atoll.errors import Invalid, NotFound, Unavailable
from atoll.journal import Entry, Journal
from atoll.planner.capacity import Change, Outlook, table, what_if
from atoll.policy.defaults import HUB_POLICY
from atoll.policy.load import LivePolicy
from atoll.registry.blobs import Blobs
from atoll.registry.lineage import LineageTree
from atoll.registry.models import Models
from atoll.runtime import faults, heap
from atoll.runtime.conductor import Conductor
from atoll.runtime.deploying import Deployer, Deploying
from atoll.runtime.desk import Desk, Parts
from atoll.runtime.embedded import Embedded
from atoll.runtime.files import Folders
from atoll.runtime.machine import Command, Search
from atoll.runtime.membership import Membership
from atoll.runtime.performing import Performer
from atoll.runtime.planning import ROLES, Planning, holders
from atoll.runtime.record import Record
from atoll.runtime.roster import Roster
from atoll.runtime.state import State, spooled
from atoll.runtime.sweeps import Sweeps, study_of
from atoll.runtime.tree import Tree
from atoll.runtime.view import Views
from atoll.spec.document import canonical, near_miss
from atoll.spec.event import Aliased, Cancelled, Restarted, Submitted
from atoll.spec.fleet import Fleet
from atoll.spec.job import EvaluateJob, Job, PredictJob, QueryJob, TrainJob, run_name
from atoll.spec.model import Bundle, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Request
from atoll.spec.run import RunView, SiteView

log = logging.getLogger(__name__)


def take(home: Path) -> IO[str]:
    """Make this process the hub of ``home`` until the file is closed. Raises `Unavailable` when another one is."""
    folder = home.absolute() / "hub"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise Unavailable(f"{folder}: cannot be used ({error.strerror}); choose another --home") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise Unavailable(f"{home.absolute()}: another process is its hub; use that one or end it") from None
    return lock


class Hub:
    """One hub over ``home``/hub, by the ``lock`` that its host took or one taken here. Raises as `take` does."""

    def __init__(self, home: Path, deployer: Deployer, site_port: int = 0, lock: IO[str] | None = None) -> None:
        faults.arm()
        heap.keep_freed()
        self.home = home.absolute()
        folder = self.home / "hub"
        self._lock = lock or take(home)
        if not (folder / "policy.cedar").exists():
            (folder / "policy.cedar").write_text(HUB_POLICY, encoding="utf-8")
        self._policy = LivePolicy(folder / "policy.cedar", "hub")
        self._journal = Journal(folder / "journal.db", "hub")
        self._blobs, self._models, self._views, self._roster = Blobs(folder / "blobs"), Models(), Views(), Roster()
        self._once = threading.Lock()
        self._conductor = Conductor(self._journal, self._perform, self._seen)
        self._gate = Gate("hub", self._policy.rules, self._conductor.record)
        self._folders = Folders(folder / "runs")
        self._sweeps = Sweeps(self._conductor, self._may_submit, self._views.changed)
        tree = Tree()
        self._membership = Membership(folder, self._conductor.record, tree)
        parts = Parts(
            gate=self._gate,
            conductor=self._conductor,
            blobs=self._blobs,
            models=self._models,
            folders=self._folders,
            changed=self._views.changed,
            tree=tree,
        )
        self._desk = Desk(parts)
        self.deploying = Deploying(deployer, folder, parts, self._roster)
        self._performer = Performer(parts, self._desk, self._views.decided)
        self.record = Record(self._journal, self.home / "sites", self._views.borders, self._state)
        self._conductor.start()
        self._folders.sweep({run for run, state in self._conductor.states.items() if not state.over})
        self._server = self._listen(site_port or self._membership.reach.port, self._roster.port(folder))
        (folder / "site-port").write_text(str(self._server.port))
        self._embedded = Embedded(self.home, self._desk, f"tcp://127.0.0.1:{self._server.port}")

    def _perform(self, state: State, command: Command) -> None:
        if isinstance(command, Search):
            self._sweeps.search(state.run)
        else:
            self._performer.perform(state, command)

    def _seen(self, entry: Entry) -> None:
        for view in (self._models.apply, self._roster.seen, self._membership.seen, self._views.seen, self._desk.seen):
            view(entry)
        self._sweeps.seen(entry)

    def _listen(self, asked: int, last: int) -> Door:
        """Open the port asked for, else the one of last time, which sites out there still dial, else a free one."""
        registrar, host = self._membership.registrar, self._membership.reach.host
        if not asked and last:
            try:
                return listen(self._desk, registrar, host, last)
            except Unavailable as error:
                log.warning("%s", error)
        return listen(self._desk, registrar, host, asked)

    def start_sites(self) -> None:
        """Start the sites that live in this home and wait until they are connected."""
        self._embedded.start()

    @property
    def address(self) -> str:
        """Where sites dial."""
        return self._server.address

    def close(self) -> None:
        """End sites, deployments and sessions. Runs that are not over can be resumed."""
        self._conductor.closing = True
        self._desk.questions.abandon("the hub is closing; run `atoll resume`")
        self.deploying.close()
        self._embedded.close()
        self._server.close()
        self._performer.close()
        self._conductor.close()
        self._sweeps.close()
        self._journal.close()
        self._lock.close()

    # --- jobs and runs ------------------------------------------------------------------------------------------

    def submit(self, job: Job, bundle: Bundle | None, user: str, run: str | None = None) -> str:
        """Queue a job; it is journalled when this returns. Raises `Denied`, `Invalid`, `NotFound`.

        Who may miss the answer names the `run` (by `run_name`): submitted twice under one name it is one run.
        """
        run = run or run_name(job)
        with self._once:
            known = self._conductor.states.get(run)
            if known is not None and (known.job, known.user) != (job, user):
                raise Invalid(f"run: {run!r} is a run of another job; choose another name, or let the hub choose")
            if known is None:
                if isinstance(job, TrainJob) and job.sweep is not None:
                    study_of(job.sweep)
                self._may_submit(user, job)
                code = self._code(job, bundle)
                here = holders(job, self.fleet())
                self._conductor.record(Submitted(run=run, user=user, job=job, code=code, holders=here), actor=user)
        return run

    def _may_submit(self, user: str, job: Job) -> None:
        data = {"action": "submit", "user": user, "roles": ROLES, "job": job.name, "job_kind": job.kind}
        self._gate.ask(Request.model_validate({**data, "purpose": job.purpose}), f"{job.kind} {job.name}")

    def _code(self, job: Job, bundle: Bundle | None) -> str | None:
        """Store the job's code and return its digest; for a job about a model it is the model's own."""
        if isinstance(job, EvaluateJob | PredictJob):
            return self._models.get(job.model).code
        if isinstance(job, QueryJob):
            return None
        if bundle is None or job.task.file not in bundle.files:
            raise Invalid(f"task.file: {job.task.file!r} did not come with the job; submit it with its code")
        return self._blobs.put(canonical(bundle))

    def plan(self, job: Job, bundle: Bundle | None, user: str) -> Plan:
        """Plan a job without running it."""
        return self._planning(job, bundle, user)[1]

    def _planning(self, job: Job, bundle: Bundle | None, user: str) -> tuple[Planning, Plan]:
        code = self._code(job, bundle)
        size = self._blobs.size(code) if code is not None else 0
        planning = Planning(self._desk, f"plan-{uuid.uuid4().hex[:8]}", job, (code, size), user)
        try:
            return planning, planning.plan()
        finally:
            planning.release()

    def capacity(self, job: Job, bundle: Bundle | None, user: str, change: Change) -> tuple[Outlook, ...]:
        """Price the job's plan under other circumstances; the usual ones when nothing is to be otherwise."""
        if not isinstance(job, TrainJob):
            raise Invalid(f"kind: {job.kind!r}: capacity is about training jobs; give one of kind train")
        planning, plan = self._planning(job, bundle, user)
        if change == Change():
            return table(job, plan, planning.fleet, planning.profiles)
        return (what_if(job, plan, planning.fleet, planning.profiles, change),)

    def runs(self) -> list[RunView]:
        return [self._view(state) for state in list(self._conductor.states.values())]

    def run(self, run: str) -> RunView:
        return self._view(self._state(run))

    def _state(self, run: str) -> State:
        states = self._conductor.states
        if run not in states:
            known = near_miss(run, list(states)) or "; submit one with `atoll run`"
            raise NotFound(f"run: there is no {run!r}{known}")
        return states[run]

    def _view(self, state: State) -> RunView:
        progress = self._desk.presence.progress(state.run)
        here = state.run in self._conductor.here
        state = self._conductor.states[state.run]  # as of now: it may have ended since, and so left `here`
        view = self._views.run(state, here, progress, self._conductor.trouble)
        if state.sweep is None:
            return view
        found = self._sweeps.view(state.run, state.sweep)
        over = sum(one.state not in ("planning", "running", "interrupted") for one in found.trials)
        work = "" if state.over else "search"
        return view.model_copy(update={"sweep": found, "work": work, "round": over, "rounds": found.asked})

    def watch(self, run: str, tell: Callable[[], None]) -> AbstractContextManager[None]:
        """Call ``tell`` after each change of a run's view, while in the context; `Views.watch` says what it may do."""
        return self._views.watch(run, tell)

    def cancel(self, run: str, user: str) -> None:
        """End a run; nothing of it is published. A run that is over stays as it is. With a sweep its trials end."""
        if not self._state(run).over:
            trials = self._sweeps.left(run, f"its sweep was cancelled by {user}")
            self._conductor.record(Cancelled(run=run, user=user), *trials, actor=user)

    def resume(self) -> list[str]:
        """Go on with the runs that a hub left behind, under a higher epoch; `redeploy` does so with deployments."""
        with self._once:  # two that ask at the same time must not both begin a run anew
            return self._resume()

    def _resume(self) -> list[str]:
        resumed: list[str] = []
        for run in list(self._conductor.states):
            if run in self._conductor.here or (state := self._conductor.states[run]).over:
                continue
            if self._sweeps.abandoned(state):  # the hub was killed between the sweep's end and this one's
                self._conductor.record(Cancelled(run=run, user="hub", words="its sweep is over"))
                continue
            spool = self._folders.of(state.run).spool
            open_answers = [answer for answer in (*state.merging, *state.arrived) if answer.update is not None]
            missing = [a.site for a in open_answers if not spool.holds(spooled(a), a.update or "")]
            faults.reached("hub", "resuming", "run")
            self._conductor.record(Restarted(run=state.run, missing=tuple(missing)))
            resumed.append(state.run)
        return resumed

    # --- sites --------------------------------------------------------------------------------------------------

    def fleet(self) -> Fleet:
        return self._desk.presence.fleet()

    def sites(self) -> list[SiteView]:
        """Return every site ever known, with whether it is here now."""
        fleets = (self._desk.presence.fleet(), self._desk.presence.relays())
        here = [self._roster.view(site, fleet.link(site.name)) for fleet in fleets for site in fleet.sites]
        names = {view.name for view in here}
        away = [self._away(view) for name, view in sorted(self._roster.sites.items()) if name not in names]
        return [self._placed(view) for view in (*here, *away)]

    def _placed(self, view: SiteView) -> SiteView:
        """Say of a site whether it is in quarantine, and where it is among relays."""
        tree, quarantine = self._desk.tree, self._desk.quarantine.words(view.name)
        place = {"relay": tree.is_relay(view.name), "behind": tree.behind(view.name) or ""}
        return view.model_copy(update={"quarantine": quarantine, **place})

    def _away(self, view: SiteView) -> SiteView:
        """Say of a site of this home why it is not started again, where that is known."""
        return view.model_copy(update={"words": self._embedded.words(view.name) or view.words})

    def invite(self, site: str, hours: float = 24.0, relay: str = "", behind: str | None = None) -> str:
        """Return a one-time token with which a site joins: the hub, as a ``relay`` dialled there, or ``behind`` one.
        Only its digest is kept."""
        return self._membership.invite(site, hours, self._server.port, relay, behind)

    def revoke(self, site: str, user: str) -> None:
        """Shut a site out: its session ends now, and its certificate opens nothing any more."""
        self._membership.revoke(site, user)
        self._server.recheck()

    def release(self, site: str, user: str) -> None:
        """Let a site out of quarantine: it is planned with again, and its runs go on with it. Raises `NotFound`."""
        self._desk.release(site, user)

    # --- models -------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        return list(self._models.all())

    def aliases(self) -> dict[str, dict[str, int]]:
        return {name: self._models.aliases(name) for name in {model.name for model in self._models.all()}}

    def model(self, reference: str) -> Model:
        return self._models.get(reference)

    def lineage(self, reference: str) -> LineageTree:
        return self._models.lineage(reference)

    def promote(self, reference: str, alias: str, user: str) -> Model:
        """Give a version an alias, such as champion; the alias moves from whichever had it."""
        model = self._models.get(reference)
        request = Request(action="promote", user=user, roles=ROLES, model=model.reference)
        self._gate.ask(request, f"{model.reference} as {alias}")
        self._conductor.record(Aliased(model=model.name, alias=alias, version=model.version, user=user), actor=user)
        return model
