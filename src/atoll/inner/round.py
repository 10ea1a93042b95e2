"""One round at one site: from the weights it is given to the update it gives, going on where a dead group stood."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atoll.errors import Corrupt, TaskFailed
from atoll.inner import checkpoint, optimiser
from atoll.inner.made import tensors
from atoll.inner.mesh import Mesh
from atoll.inner.steps import Batch, Pull, Start, Step, gradient_steps, training_steps
from atoll.inner.vector import load_vector, read_vector, write_vector
from atoll.spec.document import canonical, digest, sha256
from atoll.spec.message import Open, Train
from atoll.spec.task import Arrays, Task

_SHARE = 20  # times the last checkpoint's own seconds before the next one: they take 5 % of a round at most
_ELSEWHERE = {"weights", "output", "state_in", "state_out", "checkpoint", "checkpoint_seconds", "checkpoint_steps"}
log = logging.getLogger(__name__)


class Round:
    """A round under way. Its update is a function of its orders alone, however many groups it took.

    The caller owns the loop: `for step in round.steps(batches): ...`, then `round.update()`.
    """

    def __init__(self, opened: Open, order: Train, task: Task, model: torch.nn.Module, mesh: Mesh) -> None:
        """Write the first weights into the model, and then what a group that died here left behind, if it did."""
        self._opened, self._order, self._task, self._model, self._mesh = opened, order, task, model, mesh
        self._path = Path(order.checkpoint) if order.checkpoint is not None else None
        self._start = load_vector(Path(order.weights), order.signature)
        write_vector(model, order.signature, self._start)
        self._optimiser: torch.optim.Optimizer | None = None
        self._gradient: torch.Tensor | None = None  # float64: summed over examples
        self._pull = Pull.from_here(model, order.sync.proximal)
        self.step, self.examples, self._loss = 0, 0, 0.0
        if order.sync.exchange == "gradient":
            self._gradient = torch.zeros(len(self._start), dtype=torch.float64)
        else:
            self._optimiser = optimiser.make(order.optimiser, model.parameters())
            if order.state_in is not None:
                checkpoint.load_optimiser(self._optimiser, Path(order.state_in))
        self._identified: str | None = None
        self._resume()
        self._due = time.monotonic() + order.checkpoint_seconds

    @property
    def loss(self) -> float:
        """Mean loss per example so far."""
        return self._loss / self.examples

    def steps(self, batches: Callable[[int], Iterable[Arrays]]) -> Iterator[Step]:
        """Take the steps that are left; ``batches(first)`` gives the round's batches from its step ``first`` on."""
        at = Start(self._order.seed, self._order.done, self.step)
        for step in self._taken(map(tensors, batches(self.step)), at):
            self.step = step.number + 1
            self._loss, self.examples = self._loss + step.loss * step.examples, self.examples + step.examples
            self._save()
            yield step

    def update(self) -> np.ndarray:
        """Return the flat float32 update: the mean gradient, or what the steps changed in the weights."""
        if self._gradient is not None:
            update = (self._gradient.numpy() / self.examples).astype(np.float32)
        else:
            update = read_vector(self._model, self._order.signature) - self._start
        if not np.isfinite(update).all():
            step = self._order.done + self.step
            raise TaskFailed(f"weights are not finite after step {step} of the run; lower the optimiser's rate")
        return update

    def keep_optimiser(self) -> None:
        """Write the optimiser's state where the order wants it."""
        if self._order.state_out is not None and self._optimiser is not None:
            checkpoint.save_optimiser(self._optimiser, Path(self._order.state_out))

    def _taken(self, batches: Iterable[Batch], at: Start) -> Iterator[Step]:
        task, model, mesh = self._task, self._model, self._mesh
        if self._gradient is not None:
            total = self._gradient.numpy()
            return gradient_steps(task, model, batches, mesh, at, total, self._order.signature)
        assert self._optimiser is not None
        return training_steps(task, model, self._optimiser, batches, mesh, at, self._pull)

    def _identity(self) -> str:
        """Digest of all that the update depends on: the orders without their paths, and the bytes behind the paths."""
        if self._identified is None:
            order, state = self._order.model_dump(mode="json", exclude=_ELSEWHERE), self._order.state_in
            before = sha256(Path(state).read_bytes()) if state is not None else ""
            start, opened = sha256(self._start.tobytes()), digest(self._opened)
            self._identified = sha256(canonical([opened, order, start, before, self._mesh.ranks]))
        return self._identified

    def _save(self) -> None:
        """Rank 0 writes a checkpoint when one is due; its peers wait for it in their next sum."""
        order, now = self._order, time.monotonic()
        by_steps = order.checkpoint_steps > 0 and self.step % order.checkpoint_steps == 0
        if self._path is None or self._mesh.rank or self.step == order.steps or not (by_steps or now >= self._due):
            return
        about = {"round": self._identity(), "step": self.step, "examples": self.examples, "loss": self._loss}
        tensors = checkpoint.tensors_of(self._model, self._optimiser, self._gradient)
        try:
            checkpoint.write_tensors(self._path, tensors, about)
        except OSError as error:  # the round needs none unless a rank dies, and then does more of itself again
            log.warning("no checkpoint after step %d of the round: %s", self.step, error)
        after = time.monotonic()
        self._due = after + max(order.checkpoint_seconds, _SHARE * (after - now))

    def _resume(self) -> None:
        """Go on from the checkpoint if there is one of this very round, and every rank could read it.

        All ranks read before any takes a step, and rank 0 writes only after a step that all took: it is one file.
        """
        if self._path is None:
            return
        tensors, about = self._left(self._path)
        step = int(about["step"]) if about else 0
        if any(row != [step] for row in self._mesh.gather([step])) or not step:
            return
        try:
            checkpoint.put_tensors(tensors, self._model, self._optimiser, self._gradient)
        except Corrupt as error:
            log.warning("%s", error)
            return
        self.step, self.examples, self._loss = step, int(about["examples"]), float(about["loss"])

    def _left(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return what lies at the checkpoint's place: nothing when it is another round's or not whole."""
        if not path.exists():
            return {}, {}
        try:
            tensors, about = checkpoint.read_tensors(path)
        except Corrupt as error:  # only time is lost
            log.warning("%s", error)
            return {}, {}
        return (tensors, about) if about.get("round") == self._identity() else ({}, {})
