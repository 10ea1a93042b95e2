"""One run at one site: turns assignments into orders for workers, and their results into crossings.

An errand has a thread of its own and always works on the newest assignment. Everything it has computed for the hub
lies in the run's folder until the next round shows that the hub has it, so that a lost link, a restarted hub or a
restarted agent costs a resend and no training.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from atoll.boundary.gate import SiteGate
from atoll.data.catalogue import Catalogue
from atoll.data.query import answer, parse
from atoll.errors import AtollError, Corrupt, Denied, Invalid, LinkLost, TaskFailed, Unavailable
from atoll.outer.wire import Chunk, decode, encode, encoded_bytes
from atoll.registry.weights import save
from atoll.runtime.bundle import gathered, laid_out, write_bundle
from atoll.runtime.executor import Group
from atoll.runtime.groups import Groups
from atoll.runtime.kept import Kept, RunFolder, file_digest
from atoll.runtime.terms import Terms
from atoll.spec import message as orders
from atoll.spec.document import sha256
from atoll.spec.event import Answer, ColumnSums, Totals
from atoll.spec.fleet import Site
from atoll.spec.job import PredictJob, QueryJob, TrainJob
from atoll.spec.message import Assign, Done, Failure, Order, Parcel, Progress, Refusal, Reply
from atoll.spec.model import Bundle

_BUNDLE_LIMIT = 8 << 20  # bytes of a code bundle
_ATTEMPTS = 3  # how often an order is given anew to fresh workers after a rank died
_BACKOFF = (0.05, 2.0)  # seconds between two tries after a broken link: from, up to
log = logging.getLogger(__name__)
_NOTHING = ColumnSums(count=0, total=0.0, squares=0.0)
_PROGRESS = 0.25  # seconds between two signs of progress
_SETUP = 180.0  # seconds a group has to import torch and open a dataset


class Errand:
    """The site's side of one run."""

    def __init__(self, site: Site, home: Path, gate: SiteGate, groups: Groups, run: str) -> None:
        self._site, self._home, self._gate, self._groups = site, home, gate, groups
        self._terms = Terms(site, home)
        self._run = run
        self._folder = RunFolder(home / "runs" / run)
        self._inbox: queue.SimpleQueue[Assign | None] = queue.SimpleQueue()
        self._group: Group | None = None
        self._key: str = ""
        self._bundle_path = home
        self._catalogue = Catalogue(home)
        self._told = 0.0  # when progress was last sent
        self._over, self._busy = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"errand-{run}")
        self._thread.start()

    def assign(self, assign: Assign) -> None:
        """Take an assignment, unless one from a later epoch or stage was seen. Raises `Invalid` then."""
        self._folder.fence(assign.epoch, assign.position)
        self._inbox.put(assign)

    def end(self, keep: bool) -> None:
        """Stop at once, in the middle of a step if need be; `keep` the folder when the run may come back."""
        self._over.set()
        self._inbox.put(None)
        group = self._group
        ended = group is not None and self._busy.is_set()
        if group is not None and ended:
            group.close()  # the order under way ends with Unavailable, which nobody is told any more
        self._thread.join(timeout=10)
        if self._group is not None and not ended:
            self._groups.give_back(self._key, self._group)
        self._group = None
        if not keep:
            self._folder.remove()

    def _work(self) -> None:
        while not self._over.is_set():
            assign = self._newest()
            if assign is None:
                return
            wait = _BACKOFF[0]
            while not self._try(assign) and self._inbox.empty():
                self._over.wait(wait)
                wait = min(2 * wait, _BACKOFF[1])

    def _newest(self) -> Assign | None:
        assign = self._inbox.get()
        while not self._inbox.empty():
            assign = self._inbox.get()
        return assign

    def _try(self, assign: Assign) -> bool:
        """Do one assignment and tell the hub how it ended, in words it can show; False to try again.

        What was computed is kept, so that another try after a broken link is little more than sending it again.
        """
        try:
            self._do(assign)
        except LinkLost as error:
            log.info("run %s, stage %d: %s", self._run, assign.position, error)
            return self._over.is_set()
        except Denied as error:
            self._tell(Refusal(run=self._run, words=str(error)))
        except AtollError as error:
            kind = type(error).__name__
            self._tell(Failure(run=self._run, position=assign.position, words=str(error), error=kind))
        except OSError as error:
            words = _disk(error)
            self._tell(Failure(run=self._run, position=assign.position, words=words, error="Unavailable"))
        except Exception as error:
            # A fault of ours must not leave the hub waiting for its patience to run out.
            log.exception("run %s, stage %d", self._run, assign.position)
            self._tell(Failure(run=self._run, position=assign.position, words=f"fault in the agent: {error!r}"))
        return True

    def _tell(self, outcome: Refusal | Failure) -> None:
        if self._over.is_set():
            return
        try:
            self._gate.say(outcome)
        except LinkLost as error:
            log.info("run %s: %s", self._run, error)

    def _do(self, a: Assign) -> None:
        _DO[a.work](self, a)

    # --- workers ------------------------------------------------------------------------------------------------

    def _order(self, a: Assign, order: Order, steps: int = 0) -> Reply:
        """Give the run's workers an order; ranks that die are replaced and the order is given again."""
        timeout = a.sync.wait.patience
        for attempt in range(_ATTEMPTS):
            group = self._open(a)
            try:
                return self._give(group, order, timeout, lambda step: self._progress(a, "training", step, steps))
            except TaskFailed:
                if a.layout.ranks > 1:  # its other ranks may stand in the middle of a collective
                    self._group = None
                    group.close()
                raise
            except Unavailable:
                self._group = None
                group.close()
                if self._over.is_set() or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _give(self, group: Group, order: Order, timeout: float, on_step: Callable[[int], None] | None = None) -> Reply:
        """Have the group do an order. Busy is only who is at one: whoever answered last stays warm for the next run."""
        self._busy.set()
        try:
            if self._over.is_set():
                raise Unavailable(f"run {self._run}: is over; submit the job again")
            return group.order(order, timeout, on_step)
        finally:
            self._busy.clear()

    def _open(self, a: Assign) -> Group:
        """Return this run's group with the task imported and the dataset open, starting one when there is none."""
        assert a.task is not None, "a stage with a worker comes with code"
        assert not isinstance(a.job, QueryJob)
        entry = self._catalogue.entry(a.job.data.dataset)
        if self._group is None:
            self._progress(a, "starting")
            bundle = self._bundle(a)
            self._gate.ask(self._terms.request(a, "open"), f"{self._site.name}/{entry.dataset.name}")
            self._catalogue.verify(entry.dataset.name)
            self._key = f"{a.code} {a.layout.model_dump_json()} {a.user}"
            self._group = self._groups.take(self._key, a.layout)
            self._bundle_path = bundle
        opened = orders.Open(
            bundle=str(self._bundle_path),
            task=a.task,
            path=str(entry.path),
            format=entry.format,
            fingerprint=entry.dataset.fingerprint,
            data=a.job.data,
            seed=0 if isinstance(a.job, PredictJob) else a.job.seed,
            statistics=a.statistics,
        )
        try:
            self._give(self._group, opened, _SETUP)
        except Unavailable:
            self._group.close()
            self._group = None
            raise
        return self._group

    def _progress(self, a: Assign, state: str, step: int = 0, steps: int = 0) -> None:
        """Tell the hub how far this is, but not so often that short rounds would be spent on telling it."""
        now = time.monotonic()
        if now - self._told < _PROGRESS:
            return
        self._told = now
        self._gate.say(Progress(run=self._run, position=a.position, state=state, step=step, steps=steps))

    # --- what comes in ------------------------------------------------------------------------------------------

    def _bundle(self, a: Assign) -> Path:
        """Return the folder of the job's code, fetched once for each digest and verified before it is written."""
        assert a.code is not None
        folder = self._home / "code" / a.code.removeprefix("sha256:")
        if laid_out(folder, a.code):
            return folder
        request = self._terms.crossing(a, "code", out=False, size=a.code_bytes, digest=a.code)
        parcel, frames = self._gate.fetch(Parcel(run=self._run, purpose="code", size=0, digest=a.code), request)
        data = gathered(frames, min(parcel.size, _BUNDLE_LIMIT))
        if sha256(data) != a.code:
            raise Corrupt(f"code of run {self._run}: its digest is not {a.code[:19]}...; submit the job again")
        return write_bundle(Bundle.model_validate_json(data), folder)

    def _weights(self, a: Assign) -> Path:
        """Return a file with the flat weights of the assignment, fetched when the last ones are others."""
        assert a.weights is not None
        path = self._folder.weights(a.weights)
        if self._folder.has_weights(a.weights):
            return path
        self._progress(a, "fetching weights")
        size = sum(spec.size for spec in a.signature)
        request = self._terms.crossing(a, "model", out=False, size=size * 4, digest=a.weights)
        _, frames = self._gate.fetch(Parcel(run=self._run, purpose="weights", size=size, digest=a.weights), request)
        vector = np.empty(size, dtype=np.float32)
        filled = 0
        for frame in frames:
            window = decode(Chunk(frame.offset, frame.length, frame.data, frame.scales), (), size)
            vector[frame.offset : frame.offset + frame.length] = window
            filled += len(window)
        if filled != size or sha256(save(vector, a.signature)) != a.weights:
            raise Corrupt(f"weights of run {self._run}: what came is not {a.weights[:19]}...; the round is tried again")
        self._folder.put_weights(a.weights, vector)
        return path

    # --- stages -------------------------------------------------------------------------------------------------

    def _answer(self, a: Assign, **more: object) -> Answer:
        place = {"site": self._site.name, "position": a.position, "epoch": a.epoch, "version": a.version}
        return Answer.model_validate({**place, **more})

    def probe(self, a: Assign) -> None:
        assert isinstance(a.job, TrainJob)
        reply = self._order(a, orders.Probe(seed=a.job.seed, batch=a.job.batch, optimiser=a.job.optimiser))
        self._gate.say(Done(run=self._run, answer=self._answer(a, profile=reply.profile)))

    def measure(self, a: Assign) -> None:
        assert isinstance(a.job, TrainJob)
        reply = self._order(a, orders.Measure(columns=a.job.data.statistics))
        # A column that only a few rows have is told as one that no row has: its sum would be those rows' values.
        least = self._terms.dataset(a).min_group
        sums = {name: column if column.count >= least else _NOTHING for name, column in reply.sums.items()}
        done = Done(run=self._run, answer=self._answer(a, sums=sums))
        rows = min((column.count for column in sums.values() if column.count), default=reply.rows)
        self._gate.say(done, self._terms.crossing(a, "query", out=True, size=_size(done), rows=rows))

    def initialise(self, a: Assign) -> None:
        assert isinstance(a.job, TrainJob)
        output = self._folder.path / f"initial-{a.position}.f32"
        reply = self._order(a, orders.Initialise(seed=a.job.seed, output=str(output)))
        vector = np.fromfile(output, dtype=np.float32)
        parcel = Parcel(
            run=self._run, purpose="update", size=len(vector), answer=self._answer(a, signature=reply.signature)
        )
        self._gate.send(parcel, encode(vector, ()), self._terms.crossing(a, "model", out=True, size=vector.nbytes))
        output.unlink(missing_ok=True)

    def train(self, a: Assign) -> None:
        kept = self._folder.kept(a.position)
        if kept is None or kept.weights != a.weights:
            kept = self._train(a)
        self._progress(a, "sending", a.steps, a.steps)
        vector = np.fromfile(self._folder.update(a.position), dtype=np.float32)
        answer = self._answer(a, examples=kept.examples, loss=kept.loss, seconds=kept.seconds)
        wire = tuple(transform.kind for transform in a.sync.wire)
        parcel = Parcel(run=self._run, purpose="update", size=len(vector), wire=wire, answer=answer)
        size = encoded_bytes(len(vector), wire)
        request = self._terms.crossing(a, "update", out=True, size=size, wire=wire, rows=kept.examples)
        self._gate.send(parcel, encode(vector, a.sync.wire), request)
        self._folder.settle(a.position)

    def _train(self, a: Assign) -> Kept:
        assert isinstance(a.job, TrainJob)
        assert a.weights is not None
        weights = self._weights(a)
        output, keep = self._folder.update(a.position), a.sync.keep_optimiser
        state_in = self._folder.last_state(a.position) if keep else None
        order = orders.Train(
            seed=a.job.seed,
            weights=str(weights),
            signature=a.signature,
            output=str(output),
            state_in=str(state_in) if state_in else None,
            state_out=str(self._folder.state(a.position)) if keep else None,
            done=a.done,
            steps=a.steps,
            batch=a.job.batch,
            optimiser=a.job.optimiser,
            sync=a.sync,
        )
        self._progress(a, "training", 0, a.steps)
        began = time.monotonic()
        reply = self._order(a, order, a.steps)
        kept = Kept(a.weights, file_digest(output), reply.examples, reply.loss, time.monotonic() - began)
        self._folder.keep(a.position, kept)
        return kept

    def evaluate(self, a: Assign) -> None:
        weights = self._weights(a)
        self._progress(a, "evaluating")
        reply = self._order(a, orders.Evaluate(weights=str(weights), signature=a.signature))
        done = Done(run=self._run, answer=self._answer(a, totals=reply.totals, examples=reply.examples))
        rows = min((_fewest(total) for total in reply.totals.values()), default=reply.examples)
        self._gate.say(done, self._terms.crossing(a, "metric", out=True, size=_size(done), rows=rows))

    def predict(self, a: Assign) -> None:
        """Answers stay here, as a dataset under the source's terms; only their number leaves."""
        assert isinstance(a.job, PredictJob)
        self._check_output(a.job.output)
        weights = self._weights(a)
        source, output = self._terms.dataset(a), self._home / "data" / f"{a.job.output}-{self._run}.parquet"
        output.parent.mkdir(exist_ok=True)
        order = orders.Predict(weights=str(weights), signature=a.signature, output=str(output))
        reply = self._order(a, order)
        self._catalogue.add(a.job.output, output, purposes=source.purposes, min_group=source.min_group)
        done = Done(run=self._run, answer=self._answer(a, examples=reply.rows))
        self._gate.say(done, self._terms.crossing(a, "metric", out=True, size=_size(done), rows=reply.rows))

    def _check_output(self, name: str) -> None:
        """A job may write its answers anew, but never in place of a dataset that the owner added."""
        listed = {one.name for one in self._catalogue.datasets()}
        if name in listed and Path(self._catalogue.entry(name).path).parent != (self._home / "data").absolute():
            raise Invalid(f"output: {name!r} is a dataset of {self._site.name}'s owner; choose another name")

    def query(self, a: Assign) -> None:
        assert isinstance(a.job, QueryJob)
        query, dataset = parse(a.job.sql), self._catalogue.entry(a.job.dataset).dataset
        if query.dataset != dataset.name:
            raise Invalid(f"query: the FROM names {query.dataset!r} where the job's dataset is {dataset.name!r}")
        self._gate.ask(self._terms.request(a, "open"), f"{self._site.name}/{dataset.name}")
        groups, suppressed = answer(query, self._catalogue.table(dataset.name), dataset.min_group)
        done = Done(run=self._run, answer=self._answer(a, groups=groups, suppressed=suppressed))
        smallest = min((group.rows for group in groups), default=dataset.min_group)
        self._gate.say(done, self._terms.crossing(a, "query", out=True, size=_size(done), rows=smallest))


_DO: dict[str, Callable[[Errand, Assign], None]] = {
    "probe": Errand.probe,
    "measure": Errand.measure,
    "initialise": Errand.initialise,
    "train": Errand.train,
    "evaluate": Errand.evaluate,
    "predict": Errand.predict,
    "query": Errand.query,
}


def _fewest(total: Totals) -> int:
    """Return how many rows the smallest group in a metric stands for: a histogram tells each class apart."""
    classes = [sum(total.positives), sum(total.negatives)] if total.positives or total.negatives else [total.count]
    return min(classes)


def _size(done: Done) -> int:
    return len(done.model_dump_json())


def _disk(error: OSError) -> str:
    return f"{error.filename or 'disk'}: {error.strerror}; free some space and resume the run"
