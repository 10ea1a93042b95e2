"""One round at one site: from the weights it is given to the update it gives, going on where a dead group stood."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.errors import Corrupt, TaskFailed
from atoll.inner import checkpoint, optimiser
from atoll.inner.control import Control, write_control
from atoll.inner.held import Held, changes, held, written
from atoll.inner.joint import Joint
from atoll.inner.made import tensors
from atoll.inner.memory import Carried, Memory, part_at, writes
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import Parallel
from atoll.inner.parts import Part
from atoll.inner.personal import chosen, write_personal
from atoll.inner.saved import Place, Writer
from atoll.inner.steps import Batch, Flags, Pull, Start, Step, gradient_steps, training_steps
from atoll.inner.streaming import mix_in, mixing_step
from atoll.inner.summed import Summed
from atoll.inner.vector import load_vector, matched, mend_variances, named, save_vector, signature_of, write_vector
from atoll.spec.document import canonical, digest, sha256
from atoll.spec.model import elements, without_control
from atoll.spec.order import Open, Train
from atoll.spec.plan import Layout
from atoll.spec.privacy import beyond_private
from atoll.spec.task import Arrays, Task

# Shares of the time that mirrors may take; the smaller one where others have all that is in them.
_OFTEN, _RARELY = 0.03, 0.01
_SHARE = 20  # times the last checkpoint's own seconds before the next one: they take 5 % of a round at most
_ELSEWHERE = {"weights", "output", "state_in", "state_out", "control_in", "control_out", "local_in", "local_out"}
_ELSEWHERE |= {"inputs", "checkpoint", "checkpoint_seconds", "checkpoint_steps"}
_ALONE = Mesh()  # who holds the whole
_FLOAT = 4  # bytes
_CUT = {"shares"}  # how a batch is cut among ranks, which may be others when it is gone on with
log = logging.getLogger(__name__)


class Round:
    """A round under way. Its update is a function of its orders alone, however many groups it took; of private steps
    it is one of secret samples and noise too, which nobody draws again.

    The caller owns the loop: `for step in round.steps(batches): ...`, then `round.update()`. A round that was ordered
    ahead of its weights takes the steps that need none, and goes on when it is given its order (`ordered`).
    """

    def __init__(
        self,
        opened: Open,
        order: Train,
        task: Task,
        spread: Parallel,
        memory: Memory | None = None,
        examples: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Write the first weights into the model, and then what a group that died here left behind, if it did.

        The tensors that stay at the site have their values already. ``examples`` is what `alike.digest` says of them.
        """
        self._opened, self._order, self._task, self._spread = opened, order, task, spread
        model = self._model = spread.model
        self._mesh, self._memory = spread.mesh, memory or Memory()
        if order.sync.keep_local and spread.mesh.has("pipeline"):
            raise TaskFailed("layout.pipeline: does not go with sync.keep_local; set it to 1 or leave that out")
        if order.private is not None and (words := _beyond_private(order, spread)):
            raise TaskFailed(f"privacy: does not go with {words}")
        self._path = Path(order.checkpoint) if order.checkpoint is not None else None
        self._signature = without_control(order.signature) if order.sync.control else order.signature
        self._start = self._weights()
        kept = checkpoint.read_tensors(Path(order.state_in))[0] if order.state_in is not None else {}
        self._personal = chosen(signature_of(model), order.sync.keep_local)
        write_vector(model, self._signature, self._own(kept), self._personal)
        self._optimiser: torch.optim.Optimizer | None = None
        self._control = Control.ordered(order, model, self._signature) if order.sync.control else None
        self._summed = self._control.summed if self._control is not None else None
        pull = Pull.from_here(model, order.sync.proximal, self._personal) if order.sync.proximal else None
        self._bends = [bend for bend in (self._control, pull) if bend is not None]  # the raw gradients are the first's
        self.step, self.examples, self._loss = 0, 0, 0.0
        self._began: float | None = None  # when the steps began, on this process's clock
        self._spent = 0.0  # seconds that a group which died here had taken of them
        self._writer = Writer()
        self._parts: dict[str, Part] = {}  # of its state, as it was kept last
        self._digest = examples
        if order.sync.exchange == "gradient":
            self._summed = Summed(model, self._signature)  # times examples
        else:
            self._optimiser = optimiser.make(order.optimiser, model)
            if order.state_in is not None:
                checkpoint.put_optimiser(self._optimiser, kept, model)
        self._mixing, self._mixed = mixing_step(order), False
        self._identified: str | None = None
        self._buffers = self._copied_buffers()
        self._resume()
        self._due = time.monotonic() + order.checkpoint_seconds

    @property
    def loss(self) -> float:
        """Mean loss per example so far."""
        return self._loss / self.examples

    def ordered(self, order: Train) -> bool:
        """Take the order of a round that was begun ahead, with its weights; False when it is another round's."""
        elsewhere = _ELSEWHERE - {"state_in"}
        if self._order.model_dump(exclude=elsewhere) != order.model_dump(exclude=elsewhere):
            return False
        self._order, self._path = order, Path(order.checkpoint) if order.checkpoint is not None else None
        self._start = self._weights()
        self._due = time.monotonic() + order.checkpoint_seconds
        return True

    def is_of(self, order: Train) -> bool:
        """Tell whether this is the round that is ordered, however many ranks are to share its batches."""
        return self._order.model_dump(exclude=_CUT) == order.model_dump(exclude=_CUT)

    def among(self, spread: Parallel, examples: tuple[float, float]) -> None:
        """Go on among other ranks with the same model, which has in it what this rank `carried`.

        Raises `ConnectionError` when there is nothing that all of them can go on from: they are to meet once more, and
        then begin anew.
        """
        self._spread, self._mesh, self._digest, self._began = spread, spread.mesh, examples, None
        if not self._resume(self._memory.carried):
            self._memory.carried = None
            raise ConnectionError("the ranks that are left have nothing in common to go on from")

    def steps(self, batches: Callable[[int], Iterable[Arrays]]) -> Iterator[Step]:
        """Take the steps that are left; ``batches(first)`` gives the round's batches from its step ``first`` on.

        Without its weights, those before they are needed.
        """
        yield from self._until(self._mixing, batches)
        if self._start is None:
            return
        if self._order.goes_on and not self._mixed:
            mix_in(self._order, self._held(_ALONE), torch.from_numpy(self._start))
            mend_variances(self._model)
            self._mixed = True
        yield from self._until(self._order.steps, batches)

    def _until(self, stop: int, batches: Callable[[int], Iterable[Arrays]]) -> Iterator[Step]:
        if self.step >= stop:
            return
        if self._began is None:
            self._began = time.monotonic() - self._spent
        seed, done, copied = self._order.seed, self._order.done, self._writer.copied
        at = Start(seed, done, self.step, self._wishes, self._kept, self._digest, copied)
        try:
            for step in self._taken(map(tensors, islice(batches(self.step), stop - self.step)), at):
                self.step = step.number + 1
                self._loss, self.examples = self._loss + step.loss * step.examples, self.examples + step.examples
                self._buffers = self._copied_buffers()
                self._keep(step.flags)
                yield step
                if step.flags.last or step.flags.leave:
                    return
        finally:
            self._writer.wait()  # also of who is dropped in mid-round: its successor reads what it wrote

    def _kept(self) -> int | None:
        """Return the step of the run that the last checkpoint is of."""
        self._writer.wait()
        return self._order.done + self._writer.step if self._writer.step is not None else None

    def _wishes(self) -> Flags:
        """Return what this rank wishes: rank 0's clocks are those that count."""
        budget, first = self._order.sync.seconds, self._mesh.rank == 0
        assert self._began is not None, "the steps have begun"
        late = first and budget is not None and time.monotonic() >= self._began + budget
        told = first and self._start is not None
        parts = self._mesh.device is not None
        due = self._memory.mirror.due(_OFTEN if parts or self._mesh.ranks == 1 else _RARELY)
        busy = self._writer.busy or (parts and not due)  # of parts the slowest is who counts
        return Flags(late, self._memory.leaving(), told and due, told and self._to_save(), busy)

    def _to_save(self) -> bool:
        """Return whether the step under way is to be on a disk: the round's last will be in its update."""
        done, every = self.step + 1, self._order.checkpoint_steps
        if self._path is None or done == self._order.steps:
            return False
        return bool(every and done % every == 0) or (time.monotonic() >= self._due and not self._writer.busy)

    def _keep(self, flags: Flags) -> None:
        """Mirror what the step has left, and have it written to a disk, where some rank wishes so: all hear of it."""
        if self._start is None or not (flags.save or flags.leave or (flags.mirror and not flags.busy)):
            return
        if self._mesh.device is None and self._mesh.rank:
            return  # another has the same, and does it for all
        self._writer.wait()  # it reads one of the two that are written by turns
        to = None
        if flags.save and not flags.last:
            self._due = time.monotonic() + max(self._order.checkpoint_seconds, _SHARE * self._writer.seconds)
            if self._path is not None and writes(self._mesh):
                to = Place(self._path, self.step, *part_at(self._mesh))
        # Of a copy others have the same. A part that nobody else has is mirrored before the next step begins, or a rank
        # that is killed early in it would cost the last one.
        self._writer.write(self._memory.keep(self._mesh, self.carried), to, beside=self._mesh.device is None)

    def carried(self) -> Carried:
        """Return the round as it stands at this rank after its last step: the tensors themselves, not copies."""
        # The folder's name is for the agent, who cannot tell rounds apart by their identity.
        folder = self._path.name if self._path is not None else ""
        about = {"round": self._identity(), "folder": folder, **self._said_of(time.monotonic())}
        state = checkpoint.state_of(self._model, self._optimiser, self._sums, self._parts)
        self._parts = state
        return Carried(about, [{**state, **checkpoint.whole_parts(self._buffers)}])

    @property
    def _sums(self) -> Mapping[str, torch.Tensor]:
        """Return the gradients that are summed over the round, if any are, by parameter."""
        return self._summed.tensors if self._summed is not None else {}

    def _said_of(self, now: float) -> dict[str, Any]:
        spent = now - self._began if self._began is not None else self._spent
        said = {"step": self.step, "examples": self.examples, "loss": self._loss, "spent": spent}
        return {**said, "mixed": self._mixed}

    def _copied_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers as the last whole step has left them: the next changes them before its ranks agree."""
        return {f"model.{name}": value.detach().clone() for name, value in self._model.named_buffers()}

    def update(self) -> np.ndarray:
        """Return the flat float32 update, of a rank that holds the whole model: the mean gradient, or what was changed
        in the weights of the round's span."""
        made = np.zeros(self._size(), np.float32)
        vector = torch.from_numpy(made)
        if not self._written(_ALONE, lambda one: one.of(vector).copy_(one.value)):
            raise TaskFailed(self._infinite())
        return made

    def write_update(self, path: Path) -> None:
        """Write the update as bare float32 numbers, whole or not at all.

        Where ranks hold parts each writes its own into the one file: none has the whole of it.
        """
        if self._mesh.device is None:
            update = self.update()
            if self._mesh.rank == 0:
                save_vector(update, path)
            return
        file = Joint(self._mesh, path, _FLOAT * self._size())
        try:
            if not file.written(self._written(self._mesh, file.write)):
                raise TaskFailed(self._infinite())
            file.put()
        finally:
            file.drop()

    def _size(self) -> int:
        """Return how many numbers the update has."""
        assert self._start is not None, "a round without its weights has taken some of its steps only"
        first, last = self._order.sync.span(self._start.size, self._order.version)
        return 2 * (last - first) if self._control is not None else last - first

    def _written(self, mesh: Mesh, write: Callable[[Held], object]) -> bool:
        """Have written what lies here of the update; tell whether it, and what is exchanged later, is finite."""
        assert self._start is not None, "a round that has its weights"
        self._writer.wait()
        if self._control is None and self._summed is not None:
            return written(self._summed.means(self.examples, mesh), write)
        first, last = self._order.sync.span(self._start.size, self._order.version)
        own, start = list(self._held(mesh)), torch.from_numpy(self._start)
        well = written(changes(own, start, first, last), write) and all(bool(one.value.isfinite().all()) for one in own)
        if self._control is not None:
            behind = (replace(one, at=last - first + one.at) for one in self._control.change(self.step, mesh))
            well = written(behind, write) and well
        return well

    def _held(self, mesh: Mesh) -> Iterator[Held]:
        """Yield what lies here of the model's tensors, of those that are exchanged."""
        return held(matched(self._model, self._signature, self._personal), self._signature, mesh)

    def _infinite(self) -> str:
        step = self._order.done + self.step
        return f"weights are not finite after step {step} of the run; lower the optimiser's rate"

    def keep_state(self) -> None:
        """Write what goes on from round to round where the order wants it: the optimiser's state, the own weights.

        All ranks take part: where each has a part of it, it writes that.
        """
        order, mesh, size = self._order, self._mesh, elements(self._signature)
        if mesh.device is None:
            if mesh.rank:
                return  # another has the same, and does it for all
            mesh = _ALONE
        if self._control is not None and order.control_out is not None:
            write_control(Path(order.control_out), size, self._control.after(self.step, mesh), mesh)
        if order.local_out is not None:
            write_personal(Path(order.local_out), named(self._model, self._personal), mesh)
        if order.state_out is not None and self._optimiser is not None:
            own = {"weights": (size, self._held(mesh))} if order.sync.streaming else {}
            state = checkpoint.optimiser_tensors(self._optimiser)
            checkpoint.write_tensors(Path(order.state_out), state, {}, mesh, self._model, own)

    def _weights(self) -> np.ndarray | None:
        """Return the weights that the update is told against, where they are here."""
        path, size = self._order.weights, elements(self._signature)
        return load_vector(Path(path), self._order.signature)[:size] if path is not None else None

    def _own(self, kept: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Return the weights that the steps begin from."""
        if not self._order.goes_on:
            assert self._start is not None, "only a round that goes on can be begun ahead"
            return self._start
        own = kept.get("weights")
        if own is None:
            raise Corrupt("the site's own weights are not in what it kept of the round before; submit the job again")
        return own.numpy()

    def _taken(self, batches: Iterable[Batch], at: Start) -> Iterator[Step]:
        task, spread = self._task, self._spread
        private = self._order.private
        if private is not None and self._optimiser is not None:
            from atoll.inner.private import private_steps

            return private_steps(task, spread, self._optimiser, batches, at, self._bends, private)
        if self._optimiser is None:
            assert self._summed is not None, "what takes no steps of its own sums gradients"
            return gradient_steps(task, spread, batches, at, self._summed)
        return training_steps(task, spread, self._optimiser, batches, at, self._bends)

    def _identity(self) -> str:
        """Digest of all that the update depends on: the orders without their paths, and the bytes behind the paths."""
        if self._identified is None:
            order = self._order
            assert order.weights is not None, "checkpoints are of a round that has its weights"
            paths = (order.weights, order.state_in, order.control_in, order.local_in)
            behind = order.inputs or [sha256(Path(path).read_bytes()) if path is not None else "" for path in paths]
            said = order.model_dump(mode="json", exclude=_ELSEWHERE | _CUT)
            opened = self._opened.model_copy(update={"layout": None})  # another one goes on where this one stood
            self._identified = sha256(canonical([digest(opened), said, behind]))
        return self._identified

    def _resume(self, own: Carried | None = None) -> bool:
        """Go on where the round stood, if anybody knows: a rank of the group that is gone, the mirrors, the disk.

        All ranks take what all of them can have, or begin anew: they hear of each other before anything is changed.
        What is this rank's ``own`` is in the model already. Returns whether anybody knew.
        """
        if self._start is None:
            return False  # it was begun ahead, and is nowhere else
        for found in self._memory.states(self._mesh, self._identity, self._path):
            here = found is not None and found is own
            fitted = self._fitted(found) if found is not None and not here else None
            if all(row[0] for row in self._mesh.gather([here or fitted is not None])) and found is not None:
                if fitted is not None:
                    fitted.put()
                else:
                    self._put_back_buffers()
                self._go_on(found.about)
                return True
        return False

    def _put_back_buffers(self) -> None:
        """Undo what a step that was broken off has made of them."""
        with torch.no_grad():
            for name, value in self._model.named_buffers():
                value.copy_(self._buffers[f"model.{name}"])

    def _fitted(self, found: Carried) -> checkpoint.Fitted | None:
        try:
            return checkpoint.Fitted(found.parts, self._model, self._optimiser, self._sums)
        except Corrupt as error:  # only time is lost
            log.warning("%s", error)
            return None

    def _go_on(self, about: Mapping[str, Any]) -> None:
        self.step, self.examples, self._loss = int(about["step"]), int(about["examples"]), float(about["loss"])
        self._spent, self._mixed = float(about["spent"]), bool(about["mixed"])
        self._buffers = self._copied_buffers()


def _beyond_private(order: Train, spread: Parallel) -> str | None:
    """Return what private steps do not go with, whoever it was that planned it."""
    layout = spread.mesh.layout if spread.mesh.device is not None else Layout(data=spread.mesh.ranks)
    return beyond_private(order.sync, layout, spread.compute)
