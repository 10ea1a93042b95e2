"""What becomes of a run's commands: assignments to sites, merges, a registered model. The only acting part of a run."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from atoll.errors import AtollError, Corrupt, Denied, LinkLost, Unavailable
from atoll.registry import weights
from atoll.registry.lineage import columns, sources
from atoll.runtime import faults
from atoll.runtime.branches import on_way
from atoll.runtime.desk import Desk, Parts
from atoll.runtime.files import RunFiles
from atoll.runtime.machine import AssignTo, Command, Dismiss, MakePlan, Merge, Publish
from atoll.runtime.merging import merged
from atoll.runtime.planning import BACK, Planning, asking, dataset_of
from atoll.runtime.state import State, spent
from atoll.runtime.trials import outdone
from atoll.spec.document import digest
from atoll.spec.event import Answer, Broken, Event, Outdone, Planned, Published
from atoll.spec.job import EvaluateJob, Job, PredictJob, TrainJob
from atoll.spec.message import Assign, Release
from atoll.spec.model import Lineage, Model, Promised, Signature, without_control
from atoll.spec.order import TaskName
from atoll.spec.plan import Layout, Plan
from atoll.spec.policy import Request
from atoll.spec.user import User

_RETRY = 1.0  # seconds until what a full disk prevented is tried again
RESULTS = ("evaluate", "predict", "query")  # stages whose merged answers are shown to people
_LOOK = 0.02  # seconds between two looks whether the sites that a plan needs are here
log = logging.getLogger(__name__)


class Performer:
    """Carries out what the machine commands. Slow work happens in threads and comes back as events."""

    def __init__(self, parts: Parts, desk: Desk, decided: dict[str, list[str]]) -> None:
        self._desk, self._decided = desk, decided
        self._conductor, self._gate, self._changed = parts.conductor, parts.gate, parts.changed
        self._tree = parts.tree
        self._blobs, self._models, self._folders = parts.blobs, parts.models, parts.folders
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="perform")
        # Its own, for a plan waits for sites, and no merge of another run may wait for it.
        self._plans = ThreadPoolExecutor(max_workers=32, thread_name_prefix="plan")
        self.publishing = threading.Lock()  # held while a model becomes one
        self._tidied: dict[str, int] = {}  # run under way -> the newest stage that has begun

    def perform(self, state: State, command: Command) -> None:
        match command:
            case MakePlan():
                self._later(state, self._plan, self._plans)
            case AssignTo():
                self._begun(state)
                self._desk.presence.send(command.site, self._assignment(state, command.site))
            case Merge():
                self._later(state, lambda state: self._patiently(state, lambda: self._merge(state, command.answers)))
            case Publish():
                self._later(state, lambda state: self._patiently(state, lambda: self._publish(state)))
            case Dismiss():
                self._dismiss(state, command.words)
            case _:
                raise AssertionError(f"nobody performs {command}")

    def _begun(self, state: State) -> None:
        """With a stage's first assignment, before its updates come, what only earlier ones needed is put away."""
        if state.position > self._tidied.get(state.run, 0):
            self._tidied[state.run] = state.position
            self._pool.submit(_tidy, state, self._folders.of(state.run))

    def close(self) -> None:
        for pool in (self._plans, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def _later(
        self, state: State, work: "Callable[[State], list[Event]]", pool: ThreadPoolExecutor | None = None
    ) -> None:
        def do() -> None:
            try:
                events = work(state)
            except AtollError as error:
                events = [Broken(run=state.run, site="hub", words=str(error), error=type(error).__name__)]
            except Exception as error:
                # Whatever it is, the run must end and say so; the log has the traceback.
                log.exception("run %s", state.run)
                events = [Broken(run=state.run, site="hub", words=f"fault in the hub: {error!r}")]
            if not self._conductor.closing:  # what a closing hub could not do is done by the one that resumes the run
                self._conductor.post(*events)

        (pool or self._pool).submit(do)

    def _patiently(self, state: State, work: "Callable[[], list[Event]]") -> list[Event]:
        """Do what needs only the hub's own disk. While that is full the run says so and waits, but no longer than it
        does for a site; until then nothing is lost."""
        assert state.plan is not None
        patience = state.plan.sync.wait.patience
        until = time.monotonic() + patience
        while not (self._conductor.closing or self._conductor.states[state.run].over):
            try:
                return work()
            except Unavailable as error:
                left = until - time.monotonic()
                if left <= 0:
                    raise Unavailable(f"{error}; it was tried for {patience:g} s (sync.wait.patience)") from None
                self._conductor.trouble = str(error)
                self._changed(state.run)
                time.sleep(min(_RETRY, left))
        return []

    def _merge(self, state: State, answers: tuple[Answer, ...]) -> list[Event]:
        if state.work in RESULTS:
            self._may_leave(state, None)
        if not (state.work == "train" and state.plan is not None and state.plan.sync.masked):
            return [merged(state, answers, self._folders.of(state.run))]
        hidden = self._desk.sums.unmasked(state, answers)
        if hidden is None:
            return []
        try:
            return [merged(state, answers, self._folders.of(state.run), hidden)]
        except Corrupt as error:
            self._desk.sums.failed(state, str(error))
            return []

    # --- planning -----------------------------------------------------------------------------------------------

    def _plan(self, state: State) -> list[Event]:
        found = self._planned(state)
        if found is None:
            return []
        planning, plan = found
        return [*planning.said, Planned(run=state.run, plan=plan, fleet=planning.held(plan))]

    def _planned(self, state: State) -> tuple[Planning, Plan] | None:
        """Plan with all the sites that were here when the job was submitted. Whichever of them or hubs died since, the
        plan is the same: those that are away are waited for, and who leaves in the middle is asked again."""
        until = time.monotonic() + BACK
        while not (self._conductor.closing or self._conductor.states[state.run].over):
            late = time.monotonic() > until
            if late or all(self._desk.presence.here(site) for site in state.holders):
                code = (state.code, self._code_bytes(state))
                planning = Planning((self._desk, self._gate), state.run, state.job, code, state.asker)
                try:
                    return planning, planning.plan()
                except Denied:
                    self._conductor.record(*planning.said)  # who refused stays on record where no plan does
                    raise
                except LinkLost:
                    if late:
                        raise
            time.sleep(_LOOK)
        return None

    def _code_bytes(self, state: State) -> int:
        return self._blobs.size(state.code) if state.code is not None else 0

    # --- assignments --------------------------------------------------------------------------------------------

    def _assignment(self, state: State, site: str) -> Assign:
        assert state.plan is not None
        assert state.work is not None
        job, plan = state.job, state.plan
        held = next(iter(sources(state.fleet, [site], dataset_of(job))), None)
        assign = Assign(
            run=state.run,
            epoch=state.epoch,
            position=state.position,
            work=state.work,
            job=job,
            sync=plan.sync,
            layout=plan.layouts.get(site) or next(iter(plan.layouts.values()), Layout()),
            version=state.version,
            code=state.code,
            code_bytes=self._code_bytes(state),
            weights=state.weights,
            signature=state.signature,
            statistics=state.statistics,
            user=state.user,
            roles=state.roles,
            fingerprint=held.fingerprint if held is not None else None,
        )
        if isinstance(job, TrainJob):
            done = state.version * plan.sync.stride
            task = TaskName.of(job.task)
            steps = max(1, min(plan.sync.stride, job.steps - done))
            newest = state.taken.get(site)
            counted = newest if newest is not None and state.stages[newest] == "train" else None
            if plan.sync.seconds is not None:  # each site goes on in its batches where its last merged round stopped
                done = state.steps.get(site, 0)
            here = {"task": task, "done": done, "steps": steps, "counted": counted}
            if site in plan.sites:  # also while some have no part any more: its place stays its own
                here |= {"place": plan.sites.index(site), "places": len(plan.sites)}
            if plan.sync.masked and state.work == "train":
                here |= {"together": self._desk.sums.begin(state)}
            branches = on_way(self._tree, state, site, self._desk.quarantine)
            return assign.model_copy(update={**here, "branches": branches})
        if isinstance(job, EvaluateJob | PredictJob):
            model = self._models.get(job.model)
            task = TaskName.of(model)
            known = {"weights": model.weights, "signature": model.signature, "statistics": model.statistics}
            own = {"keep_local": model.keep_local, "made_by": model.lineage.run}
            return assign.model_copy(update={"task": task, **known, **own})
        return assign

    # --- the end ------------------------------------------------------------------------------------------------

    def _publish(self, state: State) -> list[Event]:
        job = state.job
        assert isinstance(job, TrainJob)
        assert state.plan is not None
        assert state.weights is not None
        assert state.code is not None
        name, dataset = job.model or job.name, job.data.dataset
        seen, promises = [site for site in state.plan.sites if site in state.seen], state.plan.promises
        with self.publishing:  # two runs that end together must not take the same version, nor one run two
            already = self._models.of_run(state.run)
            if already is not None:
                return [Published(run=state.run, model=already)]
            if words := outdone(state, self._conductor.states):
                self._conductor.record(Outdone(run=state.run, words=words))
                return []
            version = self._models.next_version(name)
            self._may_leave(state, f"{name}@{version}")
            data, signature = _model_of(state, self._folders.of(state.run))
            model = Model(
                name=name,
                version=version,
                weights=self._blobs.put(data),
                code=state.code,
                task=job.task.name,
                file=job.task.file,
                params=job.task.params,
                pretrained=job.task.pretrained,
                signature=signature,
                keep_local=state.plan.sync.keep_local,
                columns=columns(state.fleet, seen, dataset),
                statistics=state.statistics,
                metrics=state.result.metrics,
                promises=tuple(Promised(site=one, dataset=dataset, guarantee=promises.get(one)) for one in seen),
                lineage=Lineage(
                    run=state.run,
                    job=digest(job),
                    plan=digest(state.plan),
                    code=state.code,
                    sources=sources(state.fleet, seen, dataset),
                    decisions=tuple(dict.fromkeys(self._decided.get(state.run, []))),
                ),
            )
            faults.reached("hub", "publishing", "model")
            self._conductor.record(Published(run=state.run, model=model))
        return []

    def _may_leave(self, state: State, model: str | None) -> None:
        """Ask the hub's rules whether a model, or without one what the sites' answers come to, may leave its run.

        Raises `Denied` in their words, journalled.
        """
        request = release(state.job, state.asker, state.code, model)
        self._gate.ask(request, f"{model or 'results'} of {state.job.name}", run=state.run)

    def _dismiss(self, state: State, words: str) -> None:
        self._tidied.pop(state.run, None)
        self._desk.sums.forget(state.run)
        self._desk.questions.abandon(f"run {state.run} is over: {words}", run=state.run)
        for site in self._desk.presence.names():  # also those that were only probed for it
            self._desk.presence.send(site, Release(run=state.run, words=words, made=state.result.model is not None))
        self._pool.submit(self._folders.remove, state.run)


def release(job: Job, user: User, code: str | None, model: str | None) -> Request:
    """Return the question whether the model that a job made, or else its results, may be released."""
    return asking("release", user, job).model_copy(update={"code": code or "", "model": model})


def _tidy(state: State, files: RunFiles) -> None:
    try:
        files.tidy(lambda position, site: spent(state, position, site), (state.weights, state.outer))
    except OSError as error:  # the run has ended meanwhile, or the next stage's turn comes
        log.info("run %s: %s stays for now (%s)", state.run, files.folder, error.strerror)


def _model_of(state: State, files: RunFiles) -> tuple[bytes | memoryview, Signature]:
    """Return the file and the signature of the model that a run made: its weights without what else is exchanged."""
    assert state.plan is not None
    assert state.weights is not None
    if not state.plan.sync.control:
        return files.get(state.weights), state.signature
    signature = without_control(state.signature)
    vector = files.vector(state.weights, state.signature)
    return weights.save(vector[: len(vector) // 2], signature), signature
