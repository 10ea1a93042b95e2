"""A worker process: one rank, the only place at a site where user code runs. It has no channel, no key, no journal.

    python -m atoll.runtime.worker REPLY_FD [MIRROR_FD MIRROR_FD [GUEST_FD GUEST_FD]]

Orders come as JSON lines on stdin, replies leave as JSON lines on the given pipe; tensors lie in files whose paths the
agent chose. When stdin ends the agent is gone and so is this process, in the middle of a step if need be.

Which rank it is it hears from a `Form`, again and again: when a peer is lost, or comes back, the group meets anew and
the order under way is given once more. A rank that was at it carries over what it has of it.
"""

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from atoll.data.batches import batch, split
from atoll.data.catalogue import read_table, rows_of
from atoll.data.statistics import column_sums, pool
from atoll.errors import AtollError, TaskFailed
from atoll.inner import probe
from atoll.inner.learner import Learner, Work, made_ahead, make_learner
from atoll.inner.made import FEW, check_alone, count, make_examples
from atoll.inner.memory import Memory
from atoll.inner.mesh import LINKS, Mesh, broken, join, laid_out, leave
from atoll.inner.mirror import MIRRORS, Mirror
from atoll.inner.pace import Meter
from atoll.inner.personal import chosen, shared, shared_part
from atoll.inner.sample import sampled
from atoll.inner.task import Doing, fault_of, load_task, require
from atoll.inner.vector import load_vector, save_vector
from atoll.outer.metrics import totals
from atoll.runtime import faults
from atoll.spec.model import Moments, without_control
from atoll.spec.order import ORDER, Ahead, Evaluate, Form, Initialise, Open, Order, Predict, Probe, Ready, Reply, Train
from atoll.spec.privacy import PrivateSteps
from atoll.spec.task import Arrays, Rows

_FORM = b'{"kind":"form"'
_PROGRESS = 0.25  # seconds between two progress replies


class Workspace:
    """What an `Open` order leaves behind: the task, its rows, and its examples and model once somebody needs them."""

    def __init__(self, order: Open, mesh: Mesh) -> None:
        self.order, self.met, self.mesh = order, mesh, _laid(mesh, order)
        self.bundle = Path(order.bundle)
        self.task = load_task(self.bundle, order.task, pretrained=order.pretrained)
        self.table = read_table(Path(order.path), order.format)
        self.train_rows, self.heldout_rows = split(self.table.num_rows, order.data.holdout, order.seed)
        self.ahead: Work | None = None  # a round that was begun before its order came
        self.live: Work | None = None  # the round under way
        self.left: Work | None = None  # the round that lost its group, in a model that is there yet
        self._examples: dict[bool | None, Arrays] = {}
        self._learner: Learner | None = None
        self._made: torch.nn.Module | None = None  # from the order's seed
        self._alone = False  # whether an example was seen to be made of its own row

    def examples(self, heldout: bool | None) -> Arrays:
        """Return the training (False), held-out (True) or all (None) rows as arrays with one entry each."""
        if heldout not in self._examples:
            rows = {False: self.train_rows, True: self.heldout_rows, None: np.arange(self.table.num_rows)}[heldout]
            taken = Rows(rows_of(self.table, rows), self._statistics(), asked=heldout is None)
            self._examples[heldout] = make_examples(self.task, taken, self.order.seed)
        return self._examples[heldout]

    def meet(self, order: Open, mesh: Mesh) -> None:
        """Have other peers, under another layout perhaps; rows and examples stay."""
        self.order, self.met, self.mesh = order, mesh, _laid(mesh, order)
        self.ahead = None
        if self._learner is not None and not self._learner.among(self.mesh):
            self._learner = None
        if self._learner is None:
            self.left = None

    def prepare(self) -> None:
        """Have ready what needs no other rank: those that are left go on only once a new one has it."""
        self.examples(False)
        self._made = made_ahead(self.task, self.order.seed)

    def opened_by(self, order: Open) -> bool:
        """Tell whether this is what the order opens, whatever the layout."""
        return self.order.model_copy(update={"layout": None}) == order.model_copy(update={"layout": None})

    def _statistics(self) -> Mapping[str, Moments]:
        """Return the pooled statistics; before they are pooled (a probe) this site's own stand in for them."""
        wanted = self.order.data.statistics
        return self.order.statistics or pool([column_sums(self.table, wanted, self.train_rows)])

    def learner(self) -> Learner:
        """Return the task's model, built once; whoever uses it writes its weights."""
        if self._learner is None:
            self._learner = self._built(self.order.seed)
        return self._learner

    def untouched(self, seed: int) -> Learner:
        """Return the task's model as it is built from a seed. Mostly it is the one that is then trained."""
        return self.learner() if self._learner is None and seed == self.order.seed else self._built(seed)

    def _built(self, seed: int) -> Learner:
        made, self._made = self._made, None
        return make_learner(self.task, seed, self.mesh, self.order.compute, made if seed == self.order.seed else None)

    def with_weights(self, order: Evaluate | Predict) -> Learner:
        learner, signature = self.learner(), order.signature
        vector = load_vector(Path(order.weights), signature)
        if isinstance(order, Evaluate) and order.control:
            signature, vector = without_control(signature), vector[: len(vector) // 2]
        learner.write(signature, vector, order.keep_local, order.local_in)
        return learner

    def batches_of(self, order: Train) -> Callable[[int], Iterator[Arrays]]:
        """Return what gives this rank's share of a round's batches, from a step of it on."""
        if order.private is not None:
            return partial(self._secret_batches, order, order.private)

        def batches(first: int) -> Iterator[Arrays]:
            position = (order.done + first) * order.batch
            return self.batches(order.seed, position, order.batch, order.steps - first, order.shares or None)

        return batches

    def batches(
        self, seed: int, position: int, size: int, steps: int, shares: tuple[int, ...] | None = None
    ) -> Iterator[Arrays]:
        """Yield this rank's share of ``steps`` batches from ``position`` (examples seen before) on."""
        examples = self.examples(False)
        rows = count(examples)
        mesh = self.mesh
        if size < mesh.shares:
            raise TaskFailed(f"batch: {size} examples cannot be shared by {mesh.shares} ranks; raise batch")
        for number in range(steps):
            share = batch(seed, rows, position + number * size, size, mesh.share, mesh.shares, shares)
            yield {name: array[share] for name, array in examples.items()}

    def _secret_batches(self, order: Train, private: PrivateSteps, first: int) -> Iterator[Arrays]:
        examples, rows = self.examples(False), self.train_rows
        if not self._alone:
            few = Rows(rows_of(self.table, rows[:FEW]), self._statistics())
            check_alone(examples, make_examples(self.task, few, self.order.seed))
            self._alone = True
        return sampled(examples, len(rows), private, order.steps - first)


def _laid(met: Mesh, order: Open) -> Mesh:
    return met if order.layout is None else laid_out(met, order.layout)


class Worker:
    """One process: folds orders into replies."""

    def __init__(self, replies: int, mirror: Sequence[int]) -> None:
        self._pipe, self._telling = os.fdopen(replies, "wb", buffering=0), threading.Lock()
        self._mesh, self._generation = Mesh(), 0
        self._coming = self._broken = 0  # the newest generation that was announced, and the newest after a loss
        self._space: Workspace | None = None
        own, guest = Mirror(mirror[:MIRRORS]), Mirror(mirror[MIRRORS:])
        node = os.environ.get("ATOLL_NODE", "")
        self._memory = Memory(own, guest, node, leaving=lambda: self._coming > self._generation)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._said = 0.0
        self._busy = threading.Event()

    def run(self, stream: IO[bytes]) -> None:
        torch.set_num_threads(1)
        threading.Thread(target=self._listen, args=(stream,), daemon=True).start()
        signal.signal(signal.SIGTERM, self._leave)
        while True:
            order = ORDER.validate_json(self._lines.get())
            self._busy.set()
            if isinstance(order, Form):
                self._form(order)
                continue
            reply = self._answer(order)
            if reply is not None:  # else it waits for its peers, and its life is still looked at
                self._reply(reply)
                self._busy.clear()

    def _listen(self, stream: IO[bytes]) -> None:
        """Take lines as they come, in a thread of its own: the main one may stand in a sum that never comes."""
        beating = False
        for line in stream:
            if line.startswith(_FORM):
                form = Form.model_validate_json(line)
                self._coming = form.generation
                if form.abort:
                    self._broken = form.generation
                    LINKS.sever()
                if not beating:
                    beating = True
                    threading.Thread(target=self._beat, args=(form.beat,), daemon=True).start()
            self._lines.put(line)
        os._exit(0)  # the agent closed our stdin or died: nobody wants the rest of this step

    def _beat(self, seconds: float) -> None:
        while self._busy.wait():
            self._reply(Reply(sign="alive"))
            time.sleep(seconds)

    def _leave(self, *_: object) -> None:
        """Hear a notice that this machine is to go (SIGTERM): another takes its place, and then stdin ends."""
        threading.Thread(target=self._reply, args=(Reply(sign="leaving"),), daemon=True).start()

    def _form(self, form: Form) -> None:
        """Meet the others. Whoever is lost meanwhile makes another generation, whose `Form` is on its way."""
        space = self._space
        if space is not None and space.live is not None:
            if space.mesh.device is None:
                self._memory.carried, space.left = space.live.carried(), space.live
            space.live = None
        leave()
        if not form.ranks:
            os._exit(0)
        self._generation, self._memory.again = form.generation, form.generation > 1  # whom it follows kept something
        try:
            self._mesh = join(form.rank, form.ranks, Path(form.meeting), lambda: self._broken > form.generation)
        except (RuntimeError, OSError) as error:
            self._mesh = Mesh(form.rank, form.ranks)
            self._lost(error)

    def _lost(self, error: BaseException) -> None:
        """Tell that peers are lost, and break with those that are left, who may not have noticed."""
        LINKS.sever()
        print(f"generation {self._generation}: {error}", file=sys.stderr)
        self._reply(Reply(sign="broken"))

    def _reply(self, reply: Reply) -> None:
        reply = reply.model_copy(update={"generation": self._generation})
        rest = memoryview(reply.model_dump_json(exclude_defaults=True).encode() + b"\n")
        with self._telling:
            while rest:
                rest = rest[self._pipe.write(rest) :]

    def _answer(self, order: Order) -> Reply | None:
        """Do one order; None when it is given again to other peers.

        Whatever the user's code raises becomes a `Fault`; the process stays fit for the next.
        """
        try:
            return self._do(order)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything; the log keeps it all
            if self._mesh.ranks > 1 and not isinstance(error, AtollError) and broken(error):
                self._lost(error)
                return None
            traceback.print_exc()
            bundle = Path(order.bundle) if isinstance(order, Open) else self._space.bundle if self._space else Path()
            return Reply(failed=fault_of(error, bundle))

    def _do(self, order: Order) -> Reply | None:
        if isinstance(order, Open):
            if self._space is None or not self._space.opened_by(order):
                self._space = None  # what the last one took must not be held while the new one is read
                self._space = Workspace(order, self._mesh)
            elif self._space.order != order or self._space.met is not self._mesh:
                self._space.meet(order, self._mesh)
            return Reply(rows=self._space.table.num_rows)
        if self._space is None:
            raise TaskFailed("worker: an order came before any dataset was opened")
        if isinstance(order, Ready):
            self._space.prepare()
            return Reply()
        if not isinstance(order, Train):
            self._space.ahead = self._space.left = self._memory.carried = None
        do, doing = _DO[type(order)]
        require(self._space.task, self._space.order.task, *doing)
        return do(self, self._space, order)

    def initialise(self, space: Workspace, order: Initialise) -> Reply:
        learner, first = space.untouched(order.seed), space.mesh.rank == 0
        personal = chosen(learner.signature, order.keep_local)
        if first or space.mesh.device is not None:  # ranks that hold parts read them together
            vector = learner.vector()
            if first:  # every rank has the same weights, and they share the file
                save_vector(shared_part(vector, learner.signature, personal), Path(order.output))
        faults.reached("worker", "written", "initialise")
        return Reply(signature=shared(learner.signature, personal))

    def probe(self, space: Workspace, order: Probe) -> Reply:
        batches = space.batches(order.seed, 0, max(order.batch, space.mesh.shares), probe.STEPS)
        examples, compute = space.examples(False), space.order.compute
        profile = probe.measure(space.task, order, space.mesh, compute, examples, batches, order.memory)
        return Reply(profile=profile)

    def ahead(self, space: Workspace, order: Ahead) -> Reply:
        work = space.learner().round(space.order, order.round, space.examples(False), self._memory)
        for _ in work.steps(space.batches_of(order.round)):
            pass
        space.ahead = work
        return Reply()

    def train(self, space: Workspace, order: Train) -> Reply | None:
        work, space.ahead = space.ahead, None
        if work is None or not work.ordered(order):
            work = space.learner().round(space.order, order, space.examples(False), self._memory, space.left)
        self._memory.carried, self._memory.again, space.live, space.left = None, False, work, None
        meter = Meter(space.mesh, space.learner().demand, space.order.compute.precision)
        for step in faults.along("worker", "step", "train", work.steps(space.batches_of(order))):
            meter.step(step)
            if step.flags.leave:
                return None  # a `Form` is here or comes at once, and the order after it
            if time.monotonic() - self._said > _PROGRESS:
                self._said = time.monotonic()
                self._reply(Reply(progress=step.number + 1, pace=meter.pace()))
        work.write_update(Path(order.output))
        work.keep_state()
        faults.reached("worker", "written", "train")
        return Reply(examples=work.examples, steps=work.step, loss=work.loss, pace=meter.pace())

    def evaluate(self, space: Workspace, order: Evaluate) -> Reply:
        if not len(space.heldout_rows):
            return Reply()
        examples, learner = space.examples(True), space.with_weights(order)
        return Reply(totals=totals(learner.evaluate(examples)), examples=count(examples))

    def predict(self, space: Workspace, order: Predict) -> Reply:
        examples, learner = space.examples(None), space.with_weights(order)
        answers = learner.predict(examples)
        if self._mesh.rank == 0:
            part = Path(order.output + ".part")
            pyarrow.parquet.write_table(_table(answers), part)
            os.replace(part, order.output)
        return Reply(rows=count(answers))


# Besides holding a model; whoever is probed is to be trained and evaluated, and hears of all of it at once.
_DO: dict[type[Order], tuple[Callable[..., Reply | None], tuple[Doing, ...]]] = {
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


def main(arguments: Sequence[str] | None = None) -> None:
    faults.arm()
    replies, *mirror = (int(number) for number in (sys.argv[1:] if arguments is None else arguments))
    # Orders are not user code's to read, and what it starts must not keep the pipes open when this process is gone.
    stream = os.fdopen(os.dup(0), "rb")
    _hide(0)
    for number in (replies, *mirror):
        os.set_inheritable(number, False)
    os.register_at_fork(after_in_child=lambda: _hide(replies))
    Worker(replies, mirror).run(stream)


if __name__ == "__main__":
    main()
