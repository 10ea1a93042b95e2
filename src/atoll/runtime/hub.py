"""The hub: everything a console may ask for, over one home folder. It never sees a row of anybody's data."""

import base64
import fcntl
import json
import logging
import secrets
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

from atoll.boundary.gate import Door, Gate, listen
from atoll.errors import Invalid, NotFound, Unavailable
from atoll.journal import Entry, Journal
from atoll.planner.capacity import Outlook, table, what_if
from atoll.policy.defaults import HUB_POLICY
from atoll.policy.load import LivePolicy
from atoll.registry.blobs import Blobs
from atoll.registry.lineage import LineageTree
from atoll.registry.models import Models
from atoll.runtime.bundle import laid_out, write_bundle
from atoll.runtime.conductor import Conductor
from atoll.runtime.desk import Desk
from atoll.runtime.embedded import Embedded
from atoll.runtime.machine import State
from atoll.runtime.performing import Performer
from atoll.runtime.planning import ROLES, Planning
from atoll.runtime.roster import Roster
from atoll.runtime.view import JournalLine, Views, line, traffic
from atoll.spec.document import canonical, near_miss, sha256
from atoll.spec.event import Aliased, Cancelled, Crossed, Deployed, Event, Invited, Restarted, Submitted, Undeployed
from atoll.spec.fleet import Fleet
from atoll.spec.job import EvaluateJob, Job, PredictJob, QueryJob, TrainJob
from atoll.spec.model import Bundle, Deployment, Model
from atoll.spec.plan import Plan
from atoll.spec.policy import Request
from atoll.spec.run import DeploymentView, RunView, SiteView, Traffic, Verdict

log = logging.getLogger(__name__)


class Deployer(Protocol):
    """Who runs replicas. Serving and the runtime do not know each other; whoever hosts the hub brings them together."""

    def start(
        self, deployment: Deployment, model: Model, bundle: Path, weights: Path, columns: Mapping[str, str]
    ) -> DeploymentView: ...
    def stop(self, name: str) -> DeploymentView: ...
    def views(self) -> tuple[DeploymentView, ...]: ...
    def close(self) -> None: ...


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
        self.home = home.absolute()
        folder = self.home / "hub"
        self._lock = lock or take(home)
        if not (folder / "policy.cedar").exists():
            (folder / "policy.cedar").write_text(HUB_POLICY, encoding="utf-8")
        self._policy = LivePolicy(folder / "policy.cedar", "hub")
        self._journal = Journal(folder / "journal.db", "hub")
        self._blobs, self._models, self._views, self._roster = Blobs(folder / "blobs"), Models(), Views(), Roster()
        self._performer = Performer(folder / "runs", self._blobs, self._models, self._views.decided)
        self._conductor = Conductor(self._journal, self._performer.perform, self._seen)
        self._gate = Gate("hub", self._policy.rules, self._conductor.record)
        self._desk = Desk(self._gate, self._conductor, self._blobs, self._performer.files)
        self._desk.model_of = self._performer.model_of
        self._desk.changed = self._views.changed
        self._once = threading.Lock()
        self._desk.enrolled = self._enrol
        self._performer.conductor, self._performer.desk = self._conductor, self._desk
        self._deployer = deployer
        self._conductor.start()
        for site, secret in self._roster.secrets.items():
            self._desk.trust(site, secret)
        self._server = self._listen(site_port, self._roster.port(folder))
        (folder / "site-port").write_text(str(self._server.port))
        self._embedded = Embedded(self.home, self._desk)

    def _enrol(self, site: str, token: str, secret: str) -> None:
        with self._once:  # a token is good once, also for two who bring it at the same time
            self._conductor.record(self._roster.enrolment(site, token, secret), actor=site)

    def _seen(self, entry: Entry) -> None:
        for view in (self._models.apply, self._roster.seen, self._views.seen):
            view(entry)

    def _listen(self, asked: int, last: int) -> Door:
        """Open the port asked for, else the one of last time, which sites out there still dial, else a free one."""
        if not asked and last:
            try:
                return listen(self._desk, last)
            except Unavailable as error:
                log.warning("%s", error)
        return listen(self._desk, asked)

    def start_sites(self) -> None:
        """Start the sites that live in this home and wait until they are connected."""
        self._embedded.start(self._server.address)

    @property
    def address(self) -> str:
        """Where sites dial."""
        return self._server.address

    def close(self) -> None:
        """End sites, deployments and sessions. Runs that are not over can be resumed."""
        self._conductor.closing = True
        self._desk.abandon("the hub is closing; run `atoll resume`")
        self._deployer.close()
        self._embedded.close()
        self._server.close()
        self._performer.close()
        self._conductor.close()
        self._journal.close()
        self._lock.close()

    # --- jobs and runs ------------------------------------------------------------------------------------------

    def submit(self, job: Job, bundle: Bundle | None, user: str) -> str:
        """Queue a job; it is journalled when this returns. Raises `Denied`, `Invalid`, `NotFound`."""
        run = f"{job.name[:48]}-{uuid.uuid4().hex[:8]}"
        self._gate.ask(self._request("submit", user, job), f"{job.kind} {job.name}")
        code = self._code(job, bundle)
        self._conductor.record(Submitted(run=run, user=user, job=job, code=code), actor=user)
        return run

    def _request(self, action: str, user: str, job: Job) -> Request:
        data = {"action": action, "user": user, "roles": ROLES, "job": job.name, "job_kind": job.kind}
        return Request.model_validate({**data, "purpose": job.purpose})

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

    def capacity(
        self,
        job: Job,
        bundle: Bundle | None,
        user: str,
        sites: int | None = None,
        bandwidth: float | None = None,
        parameters: float | None = None,
    ) -> tuple[Outlook, ...]:
        """Price the job's plan under other circumstances; the usual ones when none is given."""
        if not isinstance(job, TrainJob):
            raise Invalid(f"kind: {job.kind!r}: capacity is about training jobs; give one of kind train")
        planning, plan = self._planning(job, bundle, user)
        if sites is None and bandwidth is None and parameters is None:
            return table(job, plan, planning.fleet, planning.profiles)
        return (what_if(job, plan, planning.fleet, planning.profiles, sites, bandwidth, parameters),)

    def runs(self) -> list[RunView]:
        return [self._view(state) for state in list(self._conductor.states.values())]

    def run(self, run: str) -> RunView:
        return self._view(self._state(run))

    def _state(self, run: str) -> State:
        states = self._conductor.states
        if run not in states:
            raise NotFound(f"run: there is no {run!r}{near_miss(run, list(states))}")
        return states[run]

    def _view(self, state: State) -> RunView:
        progress = dict(self._desk.progress.get(state.run, {}))
        return self._views.run(state, state.run in self._conductor.here, progress, self._conductor.trouble)

    def wait(self, run: str, seen: int, timeout: float) -> int:
        """Block until the run's view has changed since ``seen``; return the new counter."""
        return self._views.wait(run, seen, timeout)

    def cancel(self, run: str, user: str) -> None:
        """End a run; nothing of it is published. A run that is over stays as it is."""
        if not self._state(run).over:
            self._conductor.record(Cancelled(run=run, user=user), actor=user)

    def resume(self) -> list[str]:
        """Go on with the runs that a hub left behind, under a higher epoch, and with its deployments."""
        with self._once:  # two that ask at the same time must not both begin a run anew
            return self._resume()

    def _resume(self) -> list[str]:
        resumed: list[str] = []
        for state in list(self._conductor.states.values()):
            if state.over or state.run in self._conductor.here:
                continue
            spool = self._performer.files(state.run).spool
            open_answers = [answer for answer in (*state.merging, *state.arrived) if answer.update is not None]
            missing = [a.site for a in open_answers if not spool.holds((a.position, a.site), a.update or "")]
            self._conductor.record(Restarted(run=state.run, missing=tuple(missing)))
            self._desk.rejoin(state.run)
            resumed.append(state.run)
        for deployment in self._roster.deployments.values():
            if all(view.name != deployment.name for view in self._deployer.views()):
                self._launch(deployment)
        return resumed

    # --- sites --------------------------------------------------------------------------------------------------

    def fleet(self) -> Fleet:
        return self._desk.fleet()

    def sites(self) -> list[SiteView]:
        """Return every site ever known, with whether it is here now."""
        fleet = self._desk.fleet()
        names = {site.name for site in fleet.sites}
        away = [view for name, view in sorted(self._roster.sites.items()) if name not in names]
        here = [self._roster.view(site, fleet.link(site.name)) for site in fleet.sites]
        return here + away

    def invite(self, site: str, hours: float = 24.0) -> str:
        """Return a one-time token with which a site joins. Only its digest is kept."""
        secret = secrets.token_urlsafe(32)
        expires = time.time() + hours * 3600
        self._conductor.record(Invited(site=site, token=sha256(secret.encode()), expires=expires))
        ticket = {"address": self._server.address, "site": site, "token": secret}
        return base64.urlsafe_b64encode(json.dumps(ticket).encode()).decode().rstrip("=")

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

    def deploy(self, deployment: Deployment, user: str) -> DeploymentView:
        """Start a replica of a model; blocks until it answers or has failed."""
        model = self._models.get(deployment.model)
        deployment = deployment.model_copy(update={"model": model.reference})
        request = Request(action="deploy", user=user, roles=ROLES, model=model.reference)
        self._gate.ask(request, f"{model.reference} as {deployment.name}")
        view = self._launch(deployment)
        if view.state == "failed":
            raise Unavailable(view.words)
        self._conductor.record(Deployed(deployment=deployment, user=user), actor=user)
        return view

    def _launch(self, deployment: Deployment) -> DeploymentView:
        model = self._models.get(deployment.model)
        bundle = Bundle.model_validate_json(self._blobs.get(model.code))
        folder = self.home / "hub" / "code" / model.code.removeprefix("sha256:")
        if not laid_out(folder, model.code):
            write_bundle(bundle, folder)
        return self._deployer.start(deployment, model, folder, self._blobs.local(model.weights), model.columns)

    def undeploy(self, name: str, user: str) -> None:
        self._deployer.stop(name)
        self._conductor.record(Undeployed(name=name, user=user), actor=user)

    def deployments(self) -> list[DeploymentView]:
        return list(self._deployer.views())

    # --- the record ---------------------------------------------------------------------------------------------

    def verify(self) -> list[Verdict]:
        """Verify the hub's journal and those of the sites that live in this home."""
        verdicts = [self._journal.verify()]
        for path in sorted((self.home / "sites").glob("*/journal.db")):
            with Journal(path, path.parent.name, read_only=True) as journal:
                verdicts.append(journal.verify())
        return verdicts

    def traffic(self, run: str | None = None) -> list[Traffic]:
        """Sum what crossed each border, as the hub recorded it; a site's refusals are in that site's journal."""
        if run is not None:
            self._state(run)
        events = [entry.event for entry in self._journal.entries(kinds=("crossing",))]
        for path in sorted((self.home / "sites").glob("*/journal.db")):
            with Journal(path, path.parent.name, read_only=True) as journal:
                crossings = [entry.event for entry in journal.entries(kinds=("crossing",))]
            events = [event for event in events if _site(event) != path.parent.name]
            events += crossings  # an owner's own record of its border is the better one
        return traffic(events, run)

    def explain(self, run: str) -> list[JournalLine]:
        """Tell everything the hub's journal has of a run, in words."""
        self._state(run)
        return [line(entry) for entry in self._journal.entries() if _concerns(entry.event, run)]


def _site(event: Event) -> str | None:
    return event.crossing.site if isinstance(event, Crossed) else None


def _concerns(event: Event, run: str) -> bool:
    about = event.crossing.run if isinstance(event, Crossed) else getattr(event, "run", None)
    return about == run
