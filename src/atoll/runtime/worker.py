"""A worker process: one rank, the only place at a site where user code runs. It has no channel, no key, no journal.

    python -m atoll.runtime.worker RANK RANKS MEETING REPLY_FD

Orders come as JSON lines on stdin, replies leave as JSON lines on the given pipe; tensors lie in files whose paths the
agent chose. When stdin ends the agent is gone and so is this process, in the middle of a step if need be.
"""

import itertools
import os
import queue
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from atoll.data.batches import batch, split
from atoll.data.catalogue import read_table
from atoll.data.statistics import column_sums, pool
from atoll.errors import AtollError, TaskFailed
from atoll.inner.learner import Learner, Work, make_learner
from atoll.inner.made import count, make_examples
from atoll.inner.mesh import Mesh, join, laid_out
from atoll.inner.personal import chosen, shared, shared_part
from atoll.inner.task import Doing, load_task, require, task_failure
from atoll.inner.vector import load_vector, save_vector
from atoll.outer.metrics import totals
from atoll.runtime import faults
from atoll.spec.fleet import Profile
from atoll.spec.message import (
    ORDER,
    WORDS_LIMIT,
    Ahead,
    Evaluate,
    Initialise,
    Open,
    Order,
    Predict,
    Probe,
    Reply,
    Train,
)
from atoll.spec.model import Moments, elements, without_control
from atoll.spec.task import Arrays, Rows

_PROGRESS = 0.25  # seconds between two progress replies
_PROBE_STEPS = 3


class Workspace:
    """What an `Open` order leaves behind: the task, its rows, and its examples and model once somebody needs them."""

    def __init__(self, order: Open, mesh: Mesh) -> None:
        self.order, self.mesh = order, mesh if order.layout is None else laid_out(mesh, order.layout)
        self.bundle = Path(order.bundle)
        self.task = load_task(self.bundle, order.task, pretrained=order.pretrained)
        self.table = read_table(Path(order.path), order.format)
        self.train_rows, self.heldout_rows = split(self.table.num_rows, order.data.holdout, order.seed)
        self.ahead: Work | None = None  # a round that was begun before its order came
        self._examples: dict[bool | None, Arrays] = {}
        self._learner: Learner | None = None

    def examples(self, heldout: bool | None) -> Arrays:
        """Return the training (False), held-out (True) or all (None) rows as arrays with one entry each."""
        if heldout not in self._examples:
            rows = {False: self.train_rows, True: self.heldout_rows, None: np.arange(self.table.num_rows)}[heldout]
            taken = Rows(self.table.take(rows), self._statistics(), asked=heldout is None)
            self._examples[heldout] = make_examples(self.task, taken, self.order.seed)
        return self._examples[heldout]

    def _statistics(self) -> Mapping[str, Moments]:
        """Return the pooled statistics; before they are pooled (a probe) this site's own stand in for them."""
        wanted = self.order.data.statistics
        return self.order.statistics or pool([column_sums(self.table, wanted, self.train_rows)])

    def build(self, seed: int) -> Learner:
        return make_learner(self.task, seed, self.mesh, self.order.compute)

    def learner(self) -> Learner:
        """Return the task's model, built once; whoever uses it writes its weights."""
        if self._learner is None:
            self._learner = self.build(self.order.seed)
        return self._learner

    def with_weights(self, order: Evaluate | Predict) -> Learner:
        learner, signature = self.learner(), order.signature
        vector = load_vector(Path(order.weights), signature)
        if isinstance(order, Evaluate) and order.control:
            signature, vector = without_control(signature), vector[: len(vector) // 2]
        learner.write(signature, vector, order.keep_local, order.local_in)
        return learner

    def batches_of(self, order: Train) -> Callable[[int], Iterator[Arrays]]:
        """Return what gives this rank's share of a round's batches, from a step of it on."""

        def batches(first: int) -> Iterator[Arrays]:
            return self.batches(order.seed, (order.done + first) * order.batch, order.batch, order.steps - first)

        return batches

    def batches(self, seed: int, position: int, size: int, steps: int) -> Iterator[Arrays]:
        """Yield this rank's share of ``steps`` batches from ``position`` (examples seen before) on."""
        examples = self.examples(False)
        rows = count(examples)
        mesh = self.mesh
        if size < mesh.shares:
            raise TaskFailed(f"batch: {size} examples cannot be shared by {mesh.shares} ranks; raise batch")
        for number in range(steps):
            share = batch(seed, rows, position + number * size, size, mesh.share, mesh.shares)
            yield {name: array[share] for name, array in examples.items()}


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
        rest = memoryview(reply.model_dump_json().encode() + b"\n")
        while rest:
            rest = rest[self._pipe.write(rest) :]

    def _answer(self, line: bytes) -> Reply:
        """Do one order. Whatever the user's code raises becomes a sentence; the process stays fit for the next."""
        order: Order = ORDER.validate_json(line)
        try:
            return self._do(order)
        except AtollError as error:
            words = str(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything; the log keeps it all
            traceback.print_exc()
            bundle = self._space.bundle if self._space else Path()
            # What user code raises may quote a row, and this sentence travels: the hub learns only what and where.
            words = str(task_failure(error, bundle, order.kind, quoted=False))
        return Reply(failed=words if len(words) <= WORDS_LIMIT else words[: WORDS_LIMIT - 3] + "...")

    def _do(self, order: Order) -> Reply:
        if isinstance(order, Open):
            if self._space is None or self._space.order != order:
                assert self._mesh is not None
                self._space = None  # what the last one took must not be held while the new one is read
                self._space = Workspace(order, self._mesh)
            return Reply(rows=self._space.table.num_rows)
        if self._space is None:
            raise TaskFailed("worker: an order came before any dataset was opened")
        if not isinstance(order, Train):
            self._space.ahead = None
        do, doing = _DO[type(order)]
        require(self._space.task, self._space.order.task, *doing)
        return do(self, self._space, order)

    def initialise(self, space: Workspace, order: Initialise) -> Reply:
        learner = space.build(order.seed)
        personal = chosen(learner.signature, order.keep_local)
        vector = learner.vector()
        if self._rank == 0:  # every rank has the same weights, and they share the file
            save_vector(shared_part(vector, learner.signature, personal), Path(order.output))
        faults.reached("worker", "written", "initialise")
        return Reply(signature=shared(learner.signature, personal))

    def probe(self, space: Workspace, order: Probe) -> Reply:
        learner = space.build(order.seed)
        batches = space.batches(order.seed, 0, max(order.batch, space.mesh.shares), _PROBE_STEPS)
        steps = learner.trial(order, space.examples(False), batches)
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in steps]
        profile = Profile(
            parameters=elements(learner.signature),
            step_seconds=max(min(after - before for before, after in itertools.pairwise(times)), 1e-6),
            memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            gradients=learner.gradients,
        )
        return Reply(profile=profile)

    def ahead(self, space: Workspace, order: Ahead) -> Reply:
        work = space.learner().round(space.order, order.round, space.examples(False))
        for _ in work.steps(space.batches_of(order.round)):
            pass
        space.ahead = work
        return Reply()

    def train(self, space: Workspace, order: Train) -> Reply:
        work, space.ahead = space.ahead, None
        if work is None or not work.ordered(order):
            work = space.learner().round(space.order, order, space.examples(False))
        for step in faults.along("worker", "step", "train", work.steps(space.batches_of(order))):
            if time.monotonic() - self._said > _PROGRESS:
                self._said = time.monotonic()
                self._reply(Reply(progress=step.number + 1))
        update = work.update()
        work.keep_state()
        if self._rank == 0:
            save_vector(update, Path(order.output))
        faults.reached("worker", "written", "train")
        return Reply(examples=work.examples, steps=work.step, loss=work.loss)

    def evaluate(self, space: Workspace, order: Evaluate) -> Reply:
        if not len(space.heldout_rows):
            return Reply()
        examples, learner = space.examples(True), space.with_weights(order)
        return Reply(totals=totals(learner.evaluate(examples)), examples=count(examples))

    def predict(self, space: Workspace, order: Predict) -> Reply:
        examples, learner = space.examples(None), space.with_weights(order)
        answers = learner.predict(examples)
        if self._rank == 0:
            part = Path(order.output + ".part")
            pyarrow.parquet.write_table(_table(answers), part)
            os.replace(part, order.output)
        return Reply(rows=count(answers))


# Besides holding a model; whoever is probed is to be trained and evaluated, and hears of all of it at once.
_DO: dict[type[Order], tuple[Callable[..., Reply], tuple[Doing, ...]]] = {
    Initialise: (Worker.initialise, ()),
    Probe: (Worker.probe, ("train", "evaluate")),
    Train: (Worker.train, ("train",)),
    Ahead: (Worker.ahead, ("train",)),
    Evaluate: (Worker.evaluate, ("evaluate",)),
    Predict: (Worker.predict, ("predict",)),
}


def _table(answers: Arrays) -> pyarrow.Table:
    columns: dict[str, pyarrow.Array] = {}
    for name, array in answers.items():
        try:
            columns[name] = pyarrow.array(list(array) if array.ndim < 3 else array.tolist())
        except pyarrow.ArrowException:
            raise TaskFailed(
                f"predict: {name[:40]!r} makes no column; return numbers, texts or arrays of them"
            ) from None
    return pyarrow.table(columns)


def _hide(number: int) -> None:
    """Let a file descriptor lead nowhere from here on."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, number)
    os.close(nothing)


def _listen(stream: IO[bytes], orders: "queue.SimpleQueue[bytes]") -> None:
    for line in stream:
        orders.put(line)
    os._exit(0)  # the agent closed our stdin or died: nobody wants the rest of this step


def main() -> None:
    faults.arm()
    rank, ranks, meeting, replies = sys.argv[1:]
    # Orders are not user code's to read, and what it starts must not keep the pipes open when this process is gone.
    stream = os.fdopen(os.dup(0), "rb")
    _hide(0)
    os.set_inheritable(int(replies), False)
    os.register_at_fork(after_in_child=lambda: _hide(int(replies)))
    orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(stream, orders), daemon=True).start()
    Worker(int(rank), int(ranks), Path(meeting), int(replies)).run(orders)


if __name__ == "__main__":
    main()
