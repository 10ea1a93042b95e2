"""The hub: everything a console may ask for, over one home folder. It never sees a row of anybody's data."""

import fcntl
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
from atoll.registry.signed import signer
from atoll.runtime import faults, heap
from atoll.runtime.approvals import Approvals
from atoll.runtime.conductor import Conductor
from atoll.runtime.deploying import Deployer, Deploying
from atoll.runtime.desk import Desk, Parts
from atoll.runtime.disclosing import Disclosing
from atoll.runtime.embedded import Embedded
from atoll.runtime.files import Folders
from atoll.runtime.foreseeing import foreseen
from atoll.runtime.holdings import Holdings
from atoll.runtime.machine import Command, Search
from atoll.runtime.membership import Membership
from atoll.runtime.performing import Performer
from atoll.runtime.pinned import check, pinned, same
from atoll.runtime.planning import Planning, asking, holders
from atoll.runtime.quotas import Quotas
from atoll.runtime.record import Record
from atoll.runtime.roster import Roster, listed
from atoll.runtime.state import State, spooled
from atoll.runtime.sweeps import Sweeps, study_of
from atoll.runtime.tree import Tree
from atoll.runtime.users import Users
from atoll.runtime.view import Views
from atoll.runtime.witnessing import Witness
from atoll.spec.document import canonical, digest, near_miss
from atoll.spec.event import Cancelled, Event, Restarted, Submitted
from atoll.spec.fleet import Fleet
from atoll.spec.job import EvaluateJob, Job, PredictJob, QueryJob, TrainJob, run_name
from atoll.spec.model import Bundle, Deployed, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Decision, Foreseen
from atoll.spec.run import RunView, SiteView
from atoll.spec.user import LOCAL, ApprovalView, Erasure, Promotion, Submission, User, Wanted
from atoll.spec.user import Deploying as DeploymentWanted

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
        self._sweeps = Sweeps(self._conductor, self._may_submit, self._taken, self._views.changed)
        tree = Tree()
        self._membership = Membership(folder, self._conductor.record, tree)
        parts = Parts(
            gate=self._gate,
            conductor=self._conductor,
            blobs=self._blobs,
            models=self._models,
            folders=self._folders,
            changed=self._views.changed,
            witness=Witness(folder / "witness", self._journal),
            tree=tree,
            region=self._membership.reach.region,
        )
        self._desk = Desk(parts)
        self.users = Users(self._conductor.record, self._gate)
        self.quotas = Quotas(self._conductor.record, self._conductor.states)
        self.approvals = Approvals(self._gate, self._conductor.record, self.users)
        self.deploying = Deploying(deployer, folder, parts, self._roster, self.approvals)
        self.disclosing = Disclosing(self._policy.rules, self._conductor.states)
        self._performer = Performer(parts, self._desk, self._views.decided)
        self.record = Record(self._journal, self.home, self._views.borders, self.run)
        self._conductor.start()
        self.holdings = Holdings(parts, self.approvals, self._performer.publishing, self.deploying.known)
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
        for fold in (self._sweeps, self.users, self.quotas, self.approvals):
            fold.seen(entry)

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

    def submit(self, job: Job, bundle: Bundle | None, user: User, run: str | None = None) -> str:
        """Queue a job, or have it wait for another user's approval; it is journalled when this returns. Raises
        `Denied`, `Invalid`, `NotFound`.

        Who may miss the answer names the `run` (by `run_name`): submitted twice under one name it is one run. A job
        about a model is about the version that its name or alias means now, to the run's end.
        """
        run = run or run_name(job)
        with self._once:
            known = self._known(run)
            if known is not None and not (same(job, known[0]) and user.name == known[1]):
                raise Invalid(f"run: {run!r} is a run of another job; choose another name, or let the hub choose")
            if known is None:
                if isinstance(job, TrainJob) and job.sweep is not None:
                    study_of(job.sweep)
                decision = self._may_submit(user, job, run)
                self.quotas.check(job.project, time.time())
                job = pinned(job, self._models)
                wanted = Submission(run=run, job=job, code=self._code(job, bundle))
                if decision.allowed:
                    self._conductor.record(self._submitted(wanted, user), actor=user.name)
                else:
                    self.approvals.keep(user, wanted, decision)
        return run

    def _known(self, run: str) -> tuple[Job, str] | None:
        """Return the job and the user of a run that is, or was asked for."""
        if (state := self._conductor.states.get(run)) is not None:
            return state.job, state.user
        asked = self.approvals.of_run(run)
        return (asked.wanted.job, asked.user.name) if asked and isinstance(asked.wanted, Submission) else None

    def _taken(self, run: str) -> bool:
        return self._known(run) is not None

    def _submitted(self, wanted: Submission, user: User) -> Submitted:
        about = {"run": wanted.run, "job": wanted.job, "code": wanted.code}
        return Submitted(user=user.name, roles=user.roles, holders=holders(wanted.job, self.fleet()), **about)

    def _may_submit(self, user: User, job: Job, run: str | None = None, alone: bool = False) -> Decision:
        return self._gate.ask(asking("submit", user, job), f"{job.kind} {job.name}", run, alone)

    # --- what two people do -------------------------------------------------------------------------------------

    def approve(self, approval: str, what: str, user: User) -> ApprovalView:
        """Let happen what another user asked for. Raises as `Approvals.approve`."""
        return self.approvals.approve(approval, what, user, self._carried)

    @contextmanager
    def _carried(self, wanted: Wanted, asker: User) -> Iterator[Event]:
        match wanted:
            case Submission():
                with self._once:
                    self._check_free(wanted)
                    self.quotas.check(wanted.job.project, time.time())
                    yield self._submitted(wanted, asker)
            case Promotion():
                yield self.holdings.aliased(wanted.model, wanted.alias, asker)
            case DeploymentWanted():
                with self.deploying.launched(wanted.deployment):
                    yield Deployed(deployment=wanted.deployment, user=asker.name)
            case Erasure():
                with self.holdings.erasing(wanted.model, asker) as event:
                    yield event

    def _check_free(self, wanted: Submission) -> None:
        """Raise `Invalid` where what somebody agreed to cannot begin as it was asked for."""
        if wanted.run in self._conductor.states:
            raise Invalid(f"run: {wanted.run!r} has begun as another job; reject this, and ask under another name")
        check(wanted.job, self._models)

    def _code(self, job: Job, bundle: Bundle | None) -> str | None:
        """Store the job's code and return its digest; for a job about a model it is the model's own."""
        if isinstance(job, EvaluateJob | PredictJob):
            return self._models.get(job.model).code
        if isinstance(job, QueryJob):
            return None
        if bundle is None or job.task.file not in bundle.files:
            raise Invalid(f"task.file: {job.task.file!r} did not come with the job; submit it with its code")
        signer(bundle)
        return self._blobs.put(canonical(bundle))

    def plan(self, job: Job, bundle: Bundle | None, user: User) -> Plan:
        """Plan a job without running it."""
        return self._planning(job, bundle, user)[1]

    def _planning(self, job: Job, bundle: Bundle | None, user: User) -> tuple[Planning, Plan]:
        self._may_submit(user, job, alone=True)  # to plan with it, sites run its code
        code = self._code(job, bundle)
        size = self._blobs.size(code) if code is not None else 0
        planning = Planning((self._desk, self._gate), f"plan-{uuid.uuid4().hex[:8]}", job, (code, size), user)
        try:
            return planning, planning.plan()
        finally:
            planning.release()

    def foresee(self, job: Job, bundle: Bundle | None, user: User) -> list[Foreseen]:
        """Return what every policy would say to a job at each point. Nothing of it is kept, and no site runs it."""
        if isinstance(job, EvaluateJob | PredictJob):
            code = self._models.get(job.model).code
        else:
            code = digest(bundle) if bundle is not None else None
        return list(foreseen(self._desk, self._gate, job, code, user))

    def capacity(self, job: Job, bundle: Bundle | None, user: User, change: Change) -> tuple[Outlook, ...]:
        """Price the job's plan under other circumstances; the usual ones when nothing is to be otherwise."""
        if not isinstance(job, TrainJob):
            raise Invalid(f"kind: {job.kind!r}: capacity is about training jobs; give one of kind train")
        planning, plan = self._planning(job, bundle, user)
        if change == Change():
            return table(job, plan, planning.fleet, planning.profiles)
        return (what_if(job, plan, planning.fleet, planning.profiles, change),)

    def runs(self) -> list[RunView]:
        wanted = [view for run in self.approvals.runs() if (view := self.approvals.run_view(run)) is not None]
        return [*(self._view(state) for state in list(self._conductor.states.values())), *wanted]

    def run(self, run: str) -> RunView:
        state = self._conductor.states.get(run)
        waiting = self.approvals.run_view(run) if state is None else None
        return waiting or self._view(self._state(run))

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

    def cancel(self, run: str, user: User) -> None:
        """End a run; nothing of it is published. A run that is over stays as it is. With a sweep its trials end."""
        asked = self.approvals.of_run(run)
        if asked is not None and run not in self._conductor.states:
            if not self.run(run).over:
                self.approvals.reject(asked.approval, asked.digest, user)
            return
        state = self._state(run)
        if not state.over:
            request = asking("cancel", user, state.job).model_copy(update={"by": state.user})
            self._gate.ask(request, f"run {run}", run)
            trials = self._sweeps.left(run, f"its sweep was cancelled by {user.name}")
            self._conductor.record(Cancelled(run=run, user=user.name), *trials, actor=user.name)

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
            hidden = state.plan is not None and state.plan.sync.masked  # under masks that no site knows any more
            missing = [a.site for a in open_answers if hidden or not spool.holds(spooled(a), a.update or "")]
            faults.reached("hub", "resuming", "run")
            self._conductor.record(Restarted(run=state.run, missing=tuple(missing)))
            resumed.append(state.run)
        return resumed

    # --- sites --------------------------------------------------------------------------------------------------

    def fleet(self) -> Fleet:
        return self._desk.presence.fleet()

    def sites(self) -> list[SiteView]:
        """Return every site ever known, with whether it is here now."""
        return listed(self._roster, self._desk, self._embedded.words)

    def invite(
        self, site: str, hours: float = 24.0, relay: str = "", behind: str | None = None, user: str = LOCAL.name
    ) -> str:
        """Return a one-time token with which a site joins: the hub, as a ``relay`` dialled there, or ``behind`` one.
        Only its digest is kept."""
        return self._membership.invite(site, hours, self._server.port, relay, behind, user)

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
