"""A worker process: one rank, the only place at a site where user code runs. It has no channel, no key, no journal.

    python -m atoll.runtime.worker RANK RANKS MEETING REPLY_FD

Orders come as JSON lines on stdin, replies leave as JSON lines on the given pipe; tensors lie in files whose paths the
agent chose. When stdin ends the agent is gone and so is this process, in the middle of a step if need be.
"""

import itertools
import os
import queue
import random
import resource
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch

from atoll.data.batches import batch, split
from atoll.data.catalogue import read_table
from atoll.data.statistics import column_sums, pool
from atoll.errors import AtollError, Corrupt, TaskFailed
from atoll.inner import evaluate, optimiser
from atoll.inner.mesh import Mesh, join, parallelize
from atoll.inner.steps import Pull, Step, gradient_steps, training_steps
from atoll.inner.task import load_task, task_failure
from atoll.inner.vector import read_vector, signature_of, write_vector
from atoll.outer.metrics import totals
from atoll.spec.document import canonical, sha256
from atoll.spec.fleet import Profile
from atoll.spec.message import ORDER, Evaluate, Initialise, Measure, Open, Order, Predict, Probe, Reply, Train
from atoll.spec.model import Moments, Signature
from atoll.spec.task import Arrays, Rows, Task

_PROGRESS = 0.25  # seconds between two progress replies
_PROBE_STEPS = 3


class Workspace:
    """What an `Open` order leaves behind: the task, its rows, and its examples once somebody needs them."""

    def __init__(self, order: Open, mesh: Mesh) -> None:
        self.order, self.mesh = order, mesh
        self.bundle = Path(order.bundle)
        self.task: Task = load_task(self.bundle, order.task)
        self.table = read_table(Path(order.path), order.format)
        self.train_rows, self.heldout_rows = split(self.table.num_rows, order.data.holdout, order.seed)
        self._examples: dict[bool | None, Arrays] = {}
        self._model: torch.nn.Module | None = None

    def examples(self, heldout: bool | None) -> Arrays:
        """Return the training (False), held-out (True) or all (None) rows as arrays with one entry each."""
        if heldout not in self._examples:
            rows = {False: self.train_rows, True: self.heldout_rows, None: np.arange(self.table.num_rows)}[heldout]
            made = self.task.examples(Rows(self.table.take(rows), self._statistics()))
            self._examples[heldout] = _checked(made)
        return self._examples[heldout]

    def _statistics(self) -> Mapping[str, Moments]:
        """Return the pooled statistics; before they are pooled (a probe) this site's own stand in for them."""
        wanted = self.order.data.statistics
        return self.order.statistics or pool([column_sums(self.table, wanted, self.train_rows)])

    def model(self, seed: int = 0) -> torch.nn.Module:
        """Return the task's model, built once; whoever uses it writes its weights first."""
        if self._model is None:
            self._model = self.build(seed)
        return self._model

    def build(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = self.task.model()
        if not isinstance(model, torch.nn.Module):
            raise TaskFailed(f"model() returned {type(model).__name__}; return a torch.nn.Module")
        return parallelize(model, self.mesh)

    def batches(self, seed: int, position: int, size: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this rank's share of ``steps`` batches from ``position`` (examples seen before) on."""
        tensors = {name: torch.from_numpy(array) for name, array in self.examples(False).items()}
        rows = len(next(iter(tensors.values())))
        if size < self.mesh.ranks:
            raise TaskFailed(f"batch: {size} examples cannot be shared by {self.mesh.ranks} ranks; raise batch")
        for number in range(steps):
            share = batch(seed, rows, position + number * size, size, self.mesh.rank, self.mesh.ranks)
            index = torch.from_numpy(share)
            yield {name: tensor[index] for name, tensor in tensors.items()}


def _checked(examples: Arrays) -> Arrays:
    lengths = {name: len(array) for name, array in examples.items()}
    if not lengths or len(set(lengths.values())) != 1:
        raise TaskFailed(f"examples() returned arrays of lengths {lengths}; give at least one, all equally long")
    if not next(iter(lengths.values())):
        raise TaskFailed("examples() returned no examples; look at the dataset and at what the task filters out")
    return {name: np.ascontiguousarray(array) for name, array in examples.items()}


def _weights(path: str, signature: Signature) -> np.ndarray:
    vector = np.fromfile(path, dtype=np.float32)
    if len(vector) != sum(spec.size for spec in signature):
        raise Corrupt(f"weights: {len(vector)} numbers where the signature has another count; fetch them again")
    return vector


def _write(vector: np.ndarray, path: str) -> None:
    part = Path(path + ".part")
    with part.open("wb") as file:
        vector.tofile(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class Worker:
    """One rank: folds orders into replies."""

    def __init__(self, rank: int, ranks: int, meeting: Path, replies: int) -> None:
        self._rank, self._ranks, self._meeting = rank, ranks, meeting
        self._pipe = os.fdopen(replies, "wb", buffering=0)
        self._mesh: Mesh | None = None
        self._space: Workspace | None = None
        self._said = 0.0

    def run(self, orders: "queue.SimpleQueue[bytes]") -> None:
        torch.set_num_threads(1)
        self._mesh = join(self._rank, self._ranks, self._meeting)
        while True:
            self._reply(self._answer(orders.get()))

    def _reply(self, reply: Reply) -> None:
        self._pipe.write(reply.model_dump_json().encode() + b"\n")

    def _answer(self, line: bytes) -> Reply:
        """Do one order. Whatever the user's code raises becomes a sentence; the process stays fit for the next."""
        order: Order = ORDER.validate_json(line)
        try:
            return self._do(order)
        except AtollError as error:
            return Reply(failed=str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything; the log keeps it all
            traceback.print_exc()
            bundle = self._space.bundle if self._space else Path()
            # What user code raises may quote a row, and this sentence travels: the hub learns only what and where.
            return Reply(failed=str(task_failure(error, bundle, order.kind, quoted=False)))

    def _do(self, order: Order) -> Reply:
        if isinstance(order, Open):
            if self._space is None or self._space.order != order:
                assert self._mesh is not None
                self._space = Workspace(order, self._mesh)
            return Reply(rows=self._space.table.num_rows)
        if self._space is None:
            raise TaskFailed("worker: an order came before any dataset was opened")
        return _DO[type(order)](self, self._space, order)

    def initialise(self, space: Workspace, order: Initialise) -> Reply:
        model = space.build(order.seed)
        signature = signature_of(model)
        if self._rank == 0:  # every rank has the same weights, and they share the file
            _write(read_vector(model, signature), order.output)
        return Reply(signature=signature)

    def probe(self, space: Workspace, order: Probe) -> Reply:
        model = space.build(order.seed)
        made = optimiser.make(order.optimiser, model.parameters())
        assert self._mesh is not None
        batches = space.batches(order.seed, 0, max(order.batch, self._ranks), _PROBE_STEPS)
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in training_steps(space.task, model, made, batches, self._mesh)]
        seconds = min(after - before for before, after in itertools.pairwise(times))
        parameters = sum(spec.size for spec in signature_of(model))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Reply(profile=Profile(parameters=parameters, step_seconds=max(seconds, 1e-6), memory_bytes=memory))

    def measure(self, space: Workspace, order: Measure) -> Reply:
        rows = space.train_rows
        return Reply(sums=column_sums(space.table, order.columns, rows), rows=len(rows))

    def train(self, space: Workspace, order: Train) -> Reply:
        assert self._mesh is not None
        model, start = space.model(order.seed), _weights(order.weights, order.signature)
        write_vector(model, order.signature, start)
        # Dropout and the like are a function of where the run is, so that a round done again is done alike.
        seed = int(sha256(canonical([order.seed, order.done, self._rank]))[7:15], 16)
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        batches = space.batches(order.seed, order.done * order.batch, order.batch, order.steps)
        if order.sync.exchange == "gradient":
            total = np.zeros(len(start))
            steps = gradient_steps(space.task, model, batches, self._mesh, total, order.signature)
            loss, examples = self._follow(steps)
            update = (total / examples).astype(np.float32)
        else:
            made = optimiser.make(order.optimiser, model.parameters())
            if order.state_in is not None:
                optimiser.load_state(made, Path(order.state_in))
            pull = Pull.from_here(model, order.sync.proximal)
            loss, examples = self._follow(training_steps(space.task, model, made, batches, self._mesh, pull))
            update = read_vector(model, order.signature) - start
            if order.state_out is not None and self._rank == 0:
                optimiser.save_state(made, Path(order.state_out))
        if self._rank == 0:
            _write(update, order.output)
        return Reply(examples=examples, loss=loss)

    def _follow(self, steps: Iterator[Step]) -> tuple[float, int]:
        """Exhaust the generator; return the mean loss per example and how many examples there were."""
        total, examples = 0.0, 0
        for step in steps:
            total, examples = total + step.loss * step.examples, examples + step.examples
            if time.monotonic() - self._said > _PROGRESS:
                self._said = time.monotonic()
                self._reply(Reply(progress=step.number + 1))
        return total / examples, examples

    def evaluate(self, space: Workspace, order: Evaluate) -> Reply:
        if order.heldout and not len(space.heldout_rows):
            return Reply()
        model, examples = space.model(), space.examples(order.heldout)
        write_vector(model, order.signature, _weights(order.weights, order.signature))
        count = len(next(iter(examples.values())))
        return Reply(totals=totals(evaluate.evaluate(space.task, model, examples)), examples=count)

    def predict(self, space: Workspace, order: Predict) -> Reply:
        model = space.model()
        write_vector(model, order.signature, _weights(order.weights, order.signature))
        answers = evaluate.predict(space.task, model, space.examples(None))
        if self._rank == 0:
            columns = {name: pyarrow.array(list(array)) for name, array in answers.items()}
            part = Path(order.output + ".part")
            pyarrow.parquet.write_table(pyarrow.table(columns), part)
            os.replace(part, order.output)
        return Reply(rows=len(next(iter(answers.values()))))


_DO = {
    Initialise: Worker.initialise,
    Probe: Worker.probe,
    Measure: Worker.measure,
    Train: Worker.train,
    Evaluate: Worker.evaluate,
    Predict: Worker.predict,
}


def main() -> None:
    rank, ranks, meeting, replies = sys.argv[1:]
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            orders.put(line)
        os._exit(0)  # the agent closed our stdin or died: nobody wants the rest of this step

    threading.Thread(target=listen, daemon=True).start()
    Worker(int(rank), int(ranks), Path(meeting), int(replies)).run(orders)


if __name__ == "__main__":
    main()
