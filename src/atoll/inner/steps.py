"""The training loop as a generator: the caller owns the loop, so logging, stopping and tests are plain for-loops."""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from atoll.errors import TaskFailed
from atoll.inner import chance
from atoll.inner.mesh import Mesh
from atoll.inner.vector import named
from atoll.spec.model import Signature
from atoll.spec.task import Task

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One inner step, over all ranks: its number within the round, mean loss, and how many examples it saw."""

    number: int
    loss: float
    examples: int
    last: bool = False  # time is up, for all ranks


@dataclass(frozen=True, slots=True)
class Start:
    """Where the steps start: dropout and the like are a function of it, and a failure names its step of the run."""

    seed: int
    done: int = 0  # steps of the run before this round
    first: int = 0  # steps of the round already taken, by a group that is gone
    until: float | None = None  # by rank 0's monotonic clock: the step in which that passes is the last


class Bend(Protocol):
    """What a local step follows besides its batch's gradient."""

    def apply(self) -> None:
        """Add to the gradients that are there."""
        ...


@dataclass(frozen=True, slots=True)
class Pull:
    """FedProx's proximal term (Li et al., 2020): mu/2 * |w - start|^2 is added to every local loss."""

    mu: float
    starts: tuple[tuple[torch.nn.Parameter, torch.Tensor], ...]

    @classmethod
    def from_here(cls, model: torch.nn.Module, mu: float, personal: Collection[str] = ()) -> "Pull":
        """Return the pull to what the model is now, but for the ``personal`` tensors: no other site's are near."""
        stay = {id(tensor) for tensor in named(model, personal).values()}
        return cls(mu, tuple((p, p.detach().clone()) for p in model.parameters() if id(p) not in stay))

    def apply(self) -> None:
        """Add the term's gradient, mu * (w - start), to gradients that are already there."""
        for parameter, start in self.starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.mu)


def training_steps(
    task: Task,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[Batch],
    mesh: Mesh,
    at: Start,
    bends: Sequence[Bend] = (),
) -> Iterator[Step]:
    """Take one optimiser step per batch. Each rank gets its own share of the batch, not necessarily an equal one.

    Raises `TaskFailed` with the step, counted from 1 over the whole run, when the loss is not a finite scalar.
    """
    model.train()
    for number, batch in enumerate(batches, at.first):
        optimiser.zero_grad(set_to_none=True)
        step = _backward(task, model, batch, mesh, at, number)
        for bend in bends:
            bend.apply()
        optimiser.step()
        yield step


def gradient_steps(
    task: Task,
    model: torch.nn.Module,
    batches: Iterable[Batch],
    mesh: Mesh,
    at: Start,
    total: np.ndarray,
    signature: Signature,
) -> Iterator[Step]:
    """Add each batch's gradient, times its examples, to the flat ``total`` (float64); the weights stay as they are."""
    model.train()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for number, batch in enumerate(batches, at.first):
        model.zero_grad(set_to_none=True)
        step = _backward(task, model, batch, mesh, at, number)
        start = 0
        for spec in signature:
            gradient = parameters[spec.name].grad if spec.name in parameters else None
            if gradient is not None:  # a buffer has none: it follows the initialising site
                total[start : start + spec.size] += gradient.reshape(-1).double().numpy() * step.examples
            start += spec.size
        yield step


def _backward(task: Task, model: torch.nn.Module, batch: Batch, mesh: Mesh, at: Start, number: int) -> Step:
    """Leave in the parameters the gradient of the mean loss over the whole batch, whatever each rank's share."""
    step = at.done + number
    chance.seed_step(at.seed, step, mesh.rank)
    mine = len(next(iter(batch.values())))
    loss = _checked(_loss(task, model, batch, mesh), step)
    value = float(loss.detach())
    # Rank 0's clock decides, and all hear of it with the loss: they stop at the same step for no sum more.
    late = mesh.rank == 0 and at.until is not None and time.monotonic() >= at.until
    sums = mesh.sum(torch.tensor([value * mine, mine, late], dtype=torch.float64))
    examples = int(sums[1])
    mean = float(sums[0]) / examples
    if not math.isfinite(mean):  # of any rank: all of them stop at the same step
        raise TaskFailed(_not_finite(mesh, value, batch, step))
    # Gradients are averaged over ranks, so each rank's share is weighted by its examples times the ranks.
    (loss * (mine * mesh.ranks / examples)).backward()
    return Step(number, mean, examples, last=bool(sums[2]))


def _loss(task: Task, model: torch.nn.Module, batch: Batch, mesh: Mesh) -> object:
    if mesh.ranks == 1:
        return task.loss(model, batch)
    called: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: called.append(True))
    try:
        loss = task.loss(model, batch)
    finally:
        hook.remove()
    if not called:  # DDP wakes with the model's own forward; without it every rank would train a model of its own
        raise TaskFailed("loss does not call model(...), so ranks cannot share gradients; call it, not its parts alone")
    return loss


def _checked(loss: object, step: int) -> torch.Tensor:
    at = f"loss at step {step + 1} of the run"
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskFailed(f"{at} is {shape}; return the mean over the batch, a scalar tensor")
    if not loss.is_floating_point():
        raise TaskFailed(f"{at} is {loss.dtype}; return a floating point tensor")
    if not loss.requires_grad:
        raise TaskFailed(f"{at} does not depend on the model's parameters; compute it from the model, without detach")
    return loss


def _not_finite(mesh: Mesh, value: float, batch: Batch, step: int) -> str:
    """Return the sentence. Every rank saw the sum that is not finite, so all are here, and all say the same."""
    names = sorted(batch)
    spoilt = [batch[name].is_floating_point() and not bool(batch[name].isfinite().all()) for name in names]
    ranks = mesh.gather([value, *spoilt])
    rank = next((number for number, row in enumerate(ranks) if not math.isfinite(row[0])), 0)
    where = f" at rank {rank}" if mesh.ranks > 1 else ""
    words = f"loss is {ranks[rank][0]:g} at step {step + 1} of the run{where}; "
    bad = [repr(name[:40]) for column, name in enumerate(names, 1) if any(row[column] for row in ranks)]
    if bad:
        holds = "holds" if len(bad) == 1 else "hold"
        return f"{words}{', '.join(bad[:4])} {holds} values that are not finite: fill or drop them in examples()"
    return f"{words}lower the optimiser's rate or look at the data"
