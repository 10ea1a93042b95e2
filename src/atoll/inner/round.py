"""One round at one site: from the weights it is given to the update it gives, going on where a dead group stood."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.errors import Corrupt, TaskFailed
from atoll.inner import checkpoint, optimiser
from atoll.inner.control import Control, write_control
from atoll.inner.made import tensors
from atoll.inner.memory import Carried, Memory, part_at, writes
from atoll.inner.parallelize import Parallel
from atoll.inner.parts import Part
from atoll.inner.personal import chosen, write_personal
from atoll.inner.saved import Writer
from atoll.inner.steps import Batch, Flags, Pull, Start, Step, gradient_steps, training_steps
from atoll.inner.streaming import mix_in, mixing_step
from atoll.inner.vector import changed_parts, load_vector, named, read_vector, save_vector, signature_of, write_vector
from atoll.inner.whole import Staged, gathered
from atoll.spec.document import canonical, digest, sha256
from atoll.spec.message import Open, Train
from atoll.spec.model import elements, without_control
from atoll.spec.task import Arrays, Task

# Shares of the time that mirrors may take; the smaller one where others have all that is in them.
_OFTEN, _RARELY = 0.03, 0.01
_SHARE = 20  # times the last checkpoint's own seconds before the next one: they take 5 % of a round at most
_ELSEWHERE = {"weights", "output", "state_in", "state_out", "control_in", "control_out", "local_in", "local_out"}
_ELSEWHERE |= {"inputs", "checkpoint", "checkpoint_seconds", "checkpoint_steps"}
_CUT = {"shares"}  # how a batch is cut among ranks, which may be others when it is gone on with
log = logging.getLogger(__name__)


class Round:
    """A round under way. Its update is a function of its orders alone, however many groups it took.

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
        self._path = Path(order.checkpoint) if order.checkpoint is not None else None
        self._signature = without_control(order.signature) if order.sync.control else order.signature
        self._start = self._weights()
        kept = checkpoint.read_tensors(Path(order.state_in))[0] if order.state_in is not None else {}
        self._personal = chosen(signature_of(model), order.sync.keep_local)
        write_vector(model, self._signature, self._own(kept), self._personal)
        self._optimiser: torch.optim.Optimizer | None = None
        self._gradient: torch.Tensor | None = None  # float64: summed over examples
        self._control = Control.ordered(order, model, self._signature) if order.sync.control else None
        pull = Pull.from_here(model, order.sync.proximal, self._personal) if order.sync.proximal else None
        self._bends = [bend for bend in (self._control, pull) if bend is not None]  # the raw gradients are the first's
        self.step, self.examples, self._loss = 0, 0, 0.0
        self._began: float | None = None  # when the steps began, on this process's clock
        self._spent = 0.0  # seconds that a group which died here had taken of them
        self._writer = Writer()
        self._parts: dict[str, Part] = {}  # of its state, as it was kept last
        self._digest = examples
        if order.sync.exchange == "gradient":
            self._gradient = torch.zeros(elements(order.signature), dtype=torch.float64)
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
            own = self._read()
            mix_in(self._order, own, self._start)
            write_vector(self._model, self._signature, own, self._personal)
            self._mixed = True
        yield from self._until(self._order.steps, batches)

    def _until(self, stop: int, batches: Callable[[int], Iterable[Arrays]]) -> Iterator[Step]:
        if self.step >= stop:
            return
        if self._began is None:
            self._began = time.monotonic() - self._spent
        at = Start(self._order.seed, self._order.done, self.step, self._wishes, self._kept, self._digest)
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
        began = time.monotonic()
        file = self._memory.keep(self._mesh, self.carried())
        self._memory.mirror.took(time.monotonic() - began)
        if flags.save and not flags.last:
            self._due = time.monotonic() + max(self._order.checkpoint_seconds, _SHARE * self._writer.seconds)
            if file is not None and self._path is not None and writes(self._mesh):
                self._writer.write(self._path, self.step, *part_at(self._mesh), file)

    def carried(self) -> Carried:
        """Return the round as it stands at this rank after its last step: the tensors themselves, not copies."""
        # The folder's name is for the agent, who cannot tell rounds apart by their identity.
        folder = self._path.name if self._path is not None else ""
        about = {"round": self._identity(), "folder": folder, **self._said_of(time.monotonic())}
        state = checkpoint.state_of(self._model, self._optimiser, self._gradients(), self._parts)
        self._parts = state
        return Carried(about, [{**state, **checkpoint.whole_parts(self._buffers)}])

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients that are summed over the round, if any are, by parameter: those that are known here."""
        summed, found, start = self._summed, dict[str, torch.Tensor](), 0
        elsewhere = self._model.elsewhere if isinstance(self._model, Staged) else frozenset[str]()
        for spec in self._signature if summed is not None else ():
            if summed is not None and spec.name not in elsewhere:
                found[spec.name] = summed[start : start + spec.size]
            start += spec.size
        return found

    def _said_of(self, now: float) -> dict[str, Any]:
        spent = now - self._began if self._began is not None else self._spent
        said = {"step": self.step, "examples": self.examples, "loss": self._loss, "spent": spent}
        return {**said, "mixed": self._mixed}

    def _copied_buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers as the last whole step has left them: the next changes them before its ranks agree."""
        return {f"model.{name}": value.detach().clone() for name, value in self._model.named_buffers()}

    def update(self) -> np.ndarray:
        """Return the flat float32 update: the mean gradient, or what was changed in the weights of the round's span."""
        assert self._start is not None, "a round without its weights has taken some of its steps only"
        self._writer.wait()
        if self._gradient is not None:
            update = own = (self._joined(self._gradient).numpy() / self.examples).astype(np.float32)
        else:
            own = self._read()
            first, last = self._order.sync.span(own.size, self._order.version)
            update = own[first:last] - self._start[first:last]
        # What is not exchanged now is later.
        if not (np.isfinite(update).all() and (update.size == own.size or np.isfinite(own).all())):
            raise TaskFailed(self._infinite())
        if self._control is None:
            return update
        self._control.sum = self._joined(self._control.sum)
        return np.concatenate([update, self._control.change(self.step)])

    def write_update(self, path: Path) -> None:
        """Write the update as bare float32 numbers, whole or not at all.

        Where ranks hold parts each writes its own into the one file: none has the whole of it.
        """
        sync = self._order.sync
        if self._mesh.device is None or sync.exchange == "gradient" or sync.control or sync.streaming:
            update = self.update()
            if self._mesh.rank == 0:
                save_vector(update, path)
            return
        assert self._start is not None, "a round that has its weights"
        self._writer.wait()
        first, part = self._mesh.rank == 0, path.with_name(path.name + ".part")
        if first:
            with part.open("wb") as file:
                file.truncate(self._start.nbytes)
        self._mesh.gather([first])  # it is there
        made = np.memmap(part, np.float32, "r+")
        finite = True
        for place, where, shape, change in changed_parts(self._model, self._signature, self._start, self._personal):
            finite = finite and bool(np.isfinite(change).all())
            made[place].reshape(shape)[where] = change
        del made
        if not all(row[0] for row in self._mesh.gather([finite])):
            raise TaskFailed(self._infinite())
        if first:
            os.replace(part, path)

    def _infinite(self) -> str:
        step = self._order.done + self.step
        return f"weights are not finite after step {step} of the run; lower the optimiser's rate"

    def keep_state(self) -> None:
        """Write what goes on from round to round where the order wants it: the optimiser's state, the own weights.

        All ranks take part, for each may have a part of it; the first writes.
        """
        order, first = self._order, self._mesh.rank == 0
        if first and self._control is not None and order.control_out is not None:
            write_control(Path(order.control_out), self._control.after(self.step))
        if order.local_out is not None:
            stay = gathered(named(self._model, self._personal), first, self._model)
            if first:
                write_personal(Path(order.local_out), stay)
        if order.state_out is None or self._optimiser is None:
            return
        own = {"weights": torch.from_numpy(self._read())} if order.sync.streaming else {}
        state = gathered(checkpoint.optimiser_tensors(self._optimiser), first, self._model)
        if first:
            checkpoint.write_tensors(Path(order.state_out), {**state, **own}, {})

    @property
    def _summed(self) -> torch.Tensor | None:
        """Return the gradients that are summed over the round, if any are."""
        return self._control.sum if self._control is not None else self._gradient

    def _read(self) -> np.ndarray:
        """Return what the model's tensors are now, of those that are exchanged."""
        return read_vector(self._model, self._signature, self._personal)

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
        if self._gradient is not None:
            total = self._gradient.numpy()
            return gradient_steps(task, spread, batches, at, total, self._signature)
        assert self._optimiser is not None
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

    def _joined(self, summed: torch.Tensor) -> torch.Tensor:
        """Return a sum of gradients with those of all stages of a pipeline, which are zero elsewhere."""
        if isinstance(self._model, Staged):
            summed = summed.clone()
            self._model.add(summed)
        return summed

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
            return checkpoint.Fitted(found.parts, self._model, self._optimiser, self._gradients())
        except Corrupt as error:  # only time is lost
            log.warning("%s", error)
            return None

    def _go_on(self, about: Mapping[str, Any]) -> None:
        self.step, self.examples, self._loss = int(about["step"]), int(about["examples"]), float(about["loss"])
        self._spent, self._mixed = float(about["spent"]), bool(about["mixed"])
        self._buffers = self._copied_buffers()
