"""What becomes of a run's commands: assignments to sites, merges, a registered model. The only acting part of a run."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atoll.errors import AtollError, Invalid, Unavailable
from atoll.registry.blobs import Blobs
from atoll.registry.models import Models
from atoll.runtime.conductor import Conductor
from atoll.runtime.desk import Desk
from atoll.runtime.files import RunFiles
from atoll.runtime.machine import AssignTo, Command, Dismiss, MakePlan, Merge, Publish, State, spent
from atoll.runtime.merging import merged
from atoll.runtime.planning import Planning
from atoll.spec.document import digest
from atoll.spec.event import Answer, Broken, Decided, Event, Joined, Planned, Published
from atoll.spec.job import EvaluateJob, PredictJob, TrainJob
from atoll.spec.message import Assign, Release, TaskName
from atoll.spec.model import Lineage, Model, Signature, Source
from atoll.spec.plan import Layout

_RETRY = 1.0  # seconds until what a full disk prevented is tried again
log = logging.getLogger(__name__)


class Performer:
    """Carries out what the machine commands. Slow work happens in threads and comes back as events."""

    def __init__(self, folder: Path, blobs: Blobs, models: Models, decided: dict[str, list[str]]) -> None:
        self._folder, self._blobs, self._models, self._decided = folder, blobs, models, decided
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="perform")
        self._files: dict[str, RunFiles] = {}
        self._turn = threading.Lock()
        self._publishing = threading.Lock()
        self.conductor: Conductor
        self.desk: Desk

    def files(self, run: str) -> RunFiles:
        with self._turn:
            if run not in self._files:
                self._files[run] = RunFiles(self._folder / run)
            return self._files[run]

    def perform(self, state: State, command: Command) -> None:
        match command:
            case MakePlan():
                self._later(state, self._plan)
            case AssignTo():
                self.desk.send(command.site, self._assignment(state))
            case Merge():
                self._later(state, lambda state: self._patiently(state, lambda: self._merge(state, command.answers)))
            case Publish():
                self._later(state, lambda state: self._patiently(state, lambda: self._publish(state)))
            case Dismiss():
                self._dismiss(state, command.words)
            case _:
                raise AssertionError(f"nobody performs {command}")

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _later(self, state: State, work: "Callable[[State], list[Event]]") -> None:
        def do() -> None:
            try:
                events = work(state)
            except AtollError as error:
                events = [Broken(run=state.run, site="hub", words=str(error), error=type(error).__name__)]
            except Exception as error:
                # Whatever it is, the run must end and say so; the log has the traceback.
                log.exception("run %s", state.run)
                events = [Broken(run=state.run, site="hub", words=f"fault in the hub: {error!r}")]
            if not self.conductor.closing:  # what a closing hub could not do is done by the one that resumes the run
                self.conductor.post(*events)

        self._pool.submit(do)

    def _patiently(self, state: State, work: "Callable[[], list[Event]]") -> list[Event]:
        """Do what needs only the hub's own disk. While that is full the run says so and waits; nothing is lost."""
        while not (self.conductor.closing or self.conductor.states[state.run].over):
            try:
                return work()
            except Unavailable as error:
                self.conductor.trouble = str(error)
                self.desk.changed(state.run)
                time.sleep(_RETRY)
        return []

    def _merge(self, state: State, answers: tuple[Answer, ...]) -> list[Event]:
        files = self.files(state.run)
        files.tidy(lambda position, site: spent(state, position, site))
        return [merged(state, answers, files)]

    # --- planning -----------------------------------------------------------------------------------------------

    def _plan(self, state: State) -> list[Event]:
        planning = Planning(self.desk, state.run, state.job, (state.code, self._code_bytes(state)), state.user)
        plan = planning.plan()
        sites = dict.fromkeys((*plan.sites, *plan.evaluators))
        said = [
            Decided(action="plan", subject=f"{site}/{state.job.name}", run=state.run, decision=answers["plan"])
            for site, answers in planning.answers.items()
            if "plan" in answers
        ]
        here = [Joined(run=state.run, site=site) for site in sites if self.desk.here(site)]
        # Presence first: whoever leaves after this is told of by its session, as this run is known to need it.
        return [*said, *here, Planned(run=state.run, plan=plan)]

    def _code_bytes(self, state: State) -> int:
        return self._blobs.size(state.code) if state.code is not None else 0

    # --- assignments --------------------------------------------------------------------------------------------

    def model_of(self, state: State) -> tuple[str, Signature]:
        """Return the weights a stage works with: the run's own, or those of the registered model it names."""
        if isinstance(state.job, EvaluateJob | PredictJob):
            model = self._models.get(state.job.model)
            return model.weights, model.signature
        if state.weights is None:
            raise Invalid(f"run {state.run} has no weights yet; wait for its first ones")
        return state.weights, state.signature

    def _assignment(self, state: State) -> Assign:
        assert state.plan is not None
        assert state.work is not None
        job, plan = state.job, state.plan
        assign = Assign(
            run=state.run,
            epoch=state.epoch,
            position=state.position,
            work=state.work,
            job=job,
            sync=plan.sync,
            layout=next(iter(plan.layouts.values()), Layout()),
            version=state.version,
            code=state.code,
            code_bytes=self._code_bytes(state),
            weights=state.weights,
            signature=state.signature,
            statistics=state.statistics,
            user=state.user,
        )
        if isinstance(job, TrainJob):
            done = state.version * plan.sync.period
            task = TaskName(file=job.task.file, name=job.task.name, params=job.task.params)
            steps = max(1, min(plan.sync.period, job.steps - done))
            return assign.model_copy(update={"task": task, "done": done, "steps": steps})
        if isinstance(job, EvaluateJob | PredictJob):
            model = self._models.get(job.model)
            task = TaskName(file=model.file, name=model.task, params=model.params)
            known = {"weights": model.weights, "signature": model.signature, "statistics": model.statistics}
            return assign.model_copy(update={"task": task, **known})
        return assign

    # --- the end ------------------------------------------------------------------------------------------------

    def _publish(self, state: State) -> list[Event]:
        job = state.job
        assert isinstance(job, TrainJob)
        assert state.plan is not None
        assert state.weights is not None
        assert state.code is not None
        weights = self._blobs.put(self.files(state.run).get(state.weights))
        fleet = self.desk.fleet()
        held = [(site, fleet.site(site)) for site in state.plan.sites]
        sets = [(name, site.dataset(job.data.dataset)) for name, site in held if site is not None]
        sources = tuple(
            Source(site=name, dataset=data.name, fingerprint=data.fingerprint, rows=data.rows)
            for name, data in sets
            if data is not None
        )
        columns: dict[str, str] = {}
        for _, data in sets:  # a column that one site never filled has type null there; another knows better
            known = data.columns if data is not None else {}
            columns |= {name: kind for name, kind in known.items() if columns.get(name, "null") == "null"}
        name = job.model or job.name
        with self._publishing:  # two runs that end together must not take the same version, nor one run two
            already = self._models.of_run(state.run)
            if already is not None:
                return [Published(run=state.run, model=already)]
            model = Model(
                name=name,
                version=self._models.next_version(name),
                weights=weights,
                code=state.code,
                task=job.task.name,
                file=job.task.file,
                params=job.task.params,
                signature=state.signature,
                columns=columns,
                statistics=state.statistics,
                metrics=state.result.metrics,
                lineage=Lineage(
                    run=state.run,
                    job=digest(job),
                    plan=digest(state.plan),
                    code=state.code,
                    sources=sources,
                    decisions=tuple(dict.fromkeys(self._decided.get(state.run, []))),
                ),
            )
            self.conductor.record(Published(run=state.run, model=model))
        return []

    def _dismiss(self, state: State, words: str) -> None:
        self.desk.abandon(f"run {state.run} is over: {words}", run=state.run)
        for site in self.desk.names():  # also those that were only probed for it
            self.desk.send(site, Release(run=state.run, words=words))
        with self._turn:
            files = self._files.pop(state.run, None) or RunFiles(self._folder / state.run)
        self._pool.submit(files.remove)
