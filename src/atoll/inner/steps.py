"""The training loop as a generator: the caller owns the loop, so logging, stopping and tests are plain for-loops."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast

import torch

from atoll.errors import TaskFailed
from atoll.inner import chance
from atoll.inner.alike import Brought, check_step, weight_sum
from atoll.inner.clock import Stopwatch
from atoll.inner.flops import Load, load_of
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import Batch, Parallel, pieces
from atoll.inner.summed import Summed
from atoll.inner.vector import named
from atoll.spec.task import Task

if TYPE_CHECKING:
    from atoll.inner.pipelined import Pipeline


@dataclass(frozen=True, slots=True)
class Flags:
    """What a rank wishes after a step, and all of them hear of at once: it is so when any of them does."""

    last: bool = False  # time is up
    leave: bool = False  # the group is to meet anew
    mirror: bool = False  # what was computed is to be mirrored,
    save: bool = False  # and written to a disk, too
    busy: bool = False  # its last mirror is still being written to a disk


@dataclass(frozen=True, slots=True)
class Step:
    """One inner step, over all ranks: its number within the round, mean loss, and how many examples it saw."""

    number: int
    loss: float
    examples: int
    flags: Flags = Flags()
    seconds: float = 0.0  # this rank's own, without what it waited for others
    load: Load | None = None  # this rank's share; None of a task that steps by itself


@dataclass(frozen=True, slots=True)
class Start:
    """Where the steps start: dropout and the like are a function of it, and a failure names its step of the run."""

    seed: int
    done: int = 0  # steps of the run before this round
    first: int = 0  # steps of the round already taken, by a group that is gone
    wishes: Callable[[], Flags] = Flags  # of this rank, as the step ends
    kept: Callable[[], int | None] = lambda: None  # the step of the run that the last checkpoint is of
    examples: tuple[float, float] = (0.0, 0.0)  # `alike.digest` of all that this rank's batches are of
    changes: Callable[[], None] = lambda: None  # returns when what a step changes may be changed
    finite: bool = True  # a loss that is not ends the steps


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
        trained = (p for p in model.parameters() if p.requires_grad and id(p) not in stay)
        return cls(mu, tuple((p, p.detach().clone()) for p in trained))

    def apply(self) -> None:
        """Add the term's gradient, mu * (w - start), to gradients that are already there."""
        for parameter, start in self.starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self.mu)


def training_steps(
    task: Task,
    spread: Parallel,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[Batch],
    at: Start,
    bends: Sequence[Bend] = (),
) -> Iterator[Step]:
    """Take one optimiser step per batch. Each rank gets a share of the batch, not necessarily an equal one.

    Raises `TaskFailed` with the step, counted from 1 over the whole run, when the loss is not a finite scalar.
    """
    spread.model.train()
    with Stopwatch() as own:
        for number, batch in enumerate(batches, at.first):
            began = own.seconds()
            optimiser.zero_grad(set_to_none=True)
            step = _backward(task, spread, batch, at, number)
            at.changes()
            for bend in bends:
                bend.apply()
            optimiser.step()
            yield replace(step, seconds=own.seconds() - began, load=load_of(batch))


def gradient_steps(
    task: Task,
    spread: Parallel,
    batches: Iterable[Batch],
    at: Start,
    summed: Summed,
) -> Iterator[Step]:
    """Add each batch's gradient, times its examples, to what is ``summed``; the weights stay as they are."""
    model = spread.model
    model.train()
    with Stopwatch() as own:
        for number, batch in enumerate(batches, at.first):
            began = own.seconds()
            model.zero_grad(set_to_none=True)
            step = _backward(task, spread, batch, at, number)
            at.changes()
            summed.add(step.examples)
            yield replace(step, seconds=own.seconds() - began, load=load_of(batch))


def _backward(task: Task, spread: Parallel, batch: Batch, at: Start, number: int) -> Step:
    """Leave in the parameters the gradient of the mean loss over the whole batch, whatever each rank's share."""
    mesh, step = spread.mesh, at.done + number
    chance.seed_step(at.seed, step, mesh.share)
    mine = len(next(iter(batch.values())))
    # Gradients are averaged over some ranks, so each share is weighted by its examples times those.
    weight = mine * mesh.averaged
    # Before the forward pass, in which torch gives all ranks the first one's weights.
    brought = Brought(weight_sum(spread.model), at.examples) if mesh.ranks > 1 and number == at.first else None
    if spread.compute.microbatches == 1 and not mesh.has("pipeline"):
        with spread.numerics():
            loss = checked(_loss(task, spread, batch), step)
        value = float(loss.detach())
        mean, examples, flags = _agreed(mesh, value, mine, batch, at, step)
        (loss * (weight / examples)).backward()
    else:
        shares = mesh.gather([mine, mesh.speaks])
        value = _in_pieces(task, spread, batch, step, weight / sum(share for share, one in shares if one), shares)
        mean, examples, flags = _agreed(mesh, value, mine, batch, at, step)
    if brought is not None:
        check_step(mesh, spread.compute.precision, brought, batch, value, step)
    spread.settle()
    return Step(number, mean, examples, flags)


def _in_pieces(
    task: Task, spread: Parallel, batch: Batch, step: int, weight: float, shares: Sequence[Sequence[float]]
) -> float:
    """Leave ``weight`` times the gradient of a share's mean loss, piece by piece; return that mean."""
    with spread.numerics():
        if spread.mesh.has("pipeline"):
            pipeline = cast("Pipeline", spread.model)
            return pipeline.step(lambda model, piece: checked(task.loss(model, piece), step), batch, weight)
    mine, value = len(next(iter(batch.values()))), 0.0
    # As many at each rank, or one would wait in vain for what another has no piece to do with.
    wanted = min(spread.compute.microbatches, *(int(share) for share, _ in shares))
    for number, piece in enumerate(pieces(batch, wanted), 1):
        spread.hold_back(last=number == wanted)
        with spread.numerics():
            loss = checked(_loss(task, spread, piece), step)
        of_share = len(next(iter(piece.values()))) / mine
        value += float(loss.detach()) * of_share
        (loss * (of_share * weight)).backward()
    return value


def _agreed(mesh: Mesh, value: float, mine: int, batch: Batch, at: Start, step: int) -> tuple[float, int, Flags]:
    """Return the mean loss of all shares, their examples, and what any rank wishes."""
    # All hear of wishes with the loss: they do the same after the same step, for no sum more.
    wish = at.wishes()
    said = [value * mine, mine] if mesh.speaks else [0.0, 0.0]
    sums = mesh.sum(torch.tensor([*said, *astuple(wish)], dtype=torch.float64))
    examples = int(sums[1])
    mean = float(sums[0]) / examples
    if at.finite and not math.isfinite(mean):  # of any rank: all of them stop at the same step
        raise TaskFailed(_not_finite(mesh, value, batch, at, step))
    return mean, examples, Flags(*(bool(one) for one in sums[2:]))


def _loss(task: Task, spread: Parallel, batch: Batch) -> object:
    model = spread.model
    if spread.mesh.ranks == 1:
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


def checked(loss: object, step: int) -> torch.Tensor:
    """Return what a task's loss gave, if a gradient can be had of it; raise `TaskFailed` naming the step of the run."""
    at = f"loss at step {step + 1} of the run"
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskFailed(f"{at} is {shape}; return the mean over the batch, a scalar tensor")
    if not loss.is_floating_point():
        raise TaskFailed(f"{at} is {loss.dtype}; return a floating point tensor")
    if not loss.requires_grad:
        raise TaskFailed(f"{at} does not depend on the model's parameters; compute it from the model, without detach")
    return loss


def _not_finite(mesh: Mesh, value: float, batch: Batch, at: Start, step: int) -> str:
    """Return the sentence. Every rank saw the sum that is not finite, so all are here, and all say the same.

    Of copies one rank writes checkpoints, and of parts each writes its own: what all who do have written is whole.
    """
    names = sorted(batch)
    spoilt = [batch[name].is_floating_point() and not bool(batch[name].isfinite().all()) for name in names]
    mine = at.kept()
    ranks = mesh.gather([value, -1 if mine is None else mine, *spoilt])
    rank = next((number for number, row in enumerate(ranks) if not math.isfinite(row[0])), 0)
    where = f" at rank {rank}" if mesh.ranks > 1 else ""
    last = min((int(row[1]) for row in ranks if row[1] >= 0), default=None)
    kept = f", and the last good checkpoint is of step {last}" if last is not None else ""
    words = f"loss is {ranks[rank][0]:g} at step {step + 1} of the run{where}{kept}"
    bad = [repr(name[:40]) for column, name in enumerate(names, 2) if any(row[column] for row in ranks)]
    if bad:
        names = ", ".join(bad[:4])
        if len(bad) == 1:
            return f"{words}; {names} holds values that are not finite: fill or drop them in examples()"
        return f"{words}; {names} hold values that are not finite: fill or drop them in examples()"
    return f"{words}; lower the optimiser's rate or look at the data"
