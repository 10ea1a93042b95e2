"""Steps that tell little of any one example: its gradient is clipped by itself, and noise is added to the sum.

DP-SGD (Abadi et al., 2016). Opacus, the extra `privacy`, gives the gradient of each example; only this module knows it,
and imports it with the first such step. The clipping, the sum and the noise are ours: Opacus draws noise nobody can
predict only where torchcsprng is, which is for no torch of today.
"""

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from atoll.errors import TaskFailed, Unavailable
from atoll.inner import chance
from atoll.inner.clock import Stopwatch
from atoll.inner.flops import load_of
from atoll.inner.parallelize import Batch, Parallel
from atoll.inner.steps import Bend, Start, Step, checked
from atoll.noise import Noise
from atoll.spec.privacy import AT_ONCE, PrivateSteps
from atoll.spec.task import Task

_PIECE = 1024  # numbers whose norm is found in float32, off by 4e-6 of it at most; all other sums of norms are float64
_ROUNDING = 1 - 2.0**-16  # with which a clipped gradient stays within its bound for all that is rounded
_FEW = 8  # examples by which a loss is tried
_DRAWS = 256  # of dropout and the like, at most, over which examples' gradients in two batches are compared by size,
_SURE = 16  # and how many sizes are at least; a sum over twice as many examples makes gradients
_TWICE = math.log(2) / 2  # nearer to twice as large than as large, in logarithms
_CLOSE = 1e-3  # how much of a gradient may be rounding
Gradients = dict[str, torch.Tensor]  # by parameter, examples first
_NO_INPUTS = "Full backward hook is firing when gradients are computed with respect to module outputs"


def private_steps(
    task: Task,
    spread: Parallel,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[Batch],
    at: Start,
    bends: Sequence[Bend],
    asked: PrivateSteps,
) -> Iterator[Step]:
    """Take one optimiser step per batch, which may be empty: then it is one of noise alone.

    Of a batch a step says how many examples one expects it to have, for how many it had tells of the rows. Raises
    `TaskFailed` for a model or a loss that mixes examples, `Unavailable` without the extra.
    """
    model = spread.model
    model.train()
    noise, pieces = Noise(asked.multiplier * asked.clip), spread.compute.microbatches
    most = max(1, math.ceil(AT_ONCE * asked.expected / pieces))
    with Stopwatch() as own, by_example(model):
        trial = _Trial(task, model)
        for number, batch in enumerate(batches, at.first):
            began, step = own.seconds(), at.done + number
            trial.once(batch, at.seed, step)
            chance.seed_step(at.seed, step, spread.mesh.share)
            loss, sums = _summed(task, model, batch, most, asked.clip, step)
            at.changes()
            put_noised(trained(model), sums, noise, asked.sampling * asked.rows)
            spread.settle()
            for bend in bends:
                bend.apply()
            optimiser.step()
            yield Step(number, loss, asked.expected, at.wishes(), own.seconds() - began, load_of(batch))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def clipped_sum(gradients: Sequence[torch.Tensor], bound: float) -> list[torch.Tensor]:
    """Return the sums over the first axis, on which examples lie, once each example's gradient is scaled to an L2 norm
    of at most ``bound`` over all tensors together.

    One that is not finite counts for nothing: to fail for it would tell of its row.
    """
    flat = [one.float().reshape(len(one), -1) for one in gradients]
    norms = torch.stack([_norms(one) for one in flat]).norm(dim=0)
    finite = norms.isfinite()
    if not bool(finite.all()):  # for the owner's eyes: a worker's log stays at its site
        words = f"{int((~finite).sum())} examples have gradients that are not finite, and count for nothing"
        print(words, file=sys.stderr)
        flat = [one.where(finite[:, None], 0.0) for one in flat]
    factors = torch.where(finite, (bound * _ROUNDING / norms).clamp(max=1.0), 0.0).float()
    return [(factors @ one).view(gradient.shape[1:]) for one, gradient in zip(flat, gradients, strict=True)]


def _norms(flat: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms of the rows of ``(examples, numbers)``, in float64; to make all of it float64 takes longer
    than the gradients do."""
    even = flat.shape[1] - flat.shape[1] % _PIECE
    parts = [flat[:, :even].unflatten(1, (-1, _PIECE))] if even else []
    parts += [flat[:, None, even:]] if even < flat.shape[1] else []
    return torch.cat([torch.linalg.vector_norm(part, dim=2).double() for part in parts], dim=1).norm(dim=1)


def put_noised(
    parameters: dict[str, nn.Parameter], sums: dict[str, torch.Tensor], noise: Noise, expected: float
) -> None:
    """Leave in every parameter the sum of its clipped gradients, or nothing, with noise, over the ``expected`` number
    of examples. Also one that no example has a gradient of gets noise: that none has would tell of them."""
    for name, parameter in parameters.items():
        made = torch.from_numpy(noise.take(parameter.numel())).view(parameter.shape)
        if name in sums:
            made += sums[name]
        parameter.grad = (made / expected).to(parameter.dtype)


def _summed(
    task: Task, model: nn.Module, batch: Batch, most: int, bound: float, step: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss of a batch, with 0 for each part of it that has no finite one, and the sum of its clipped
    gradients by parameter."""
    count, total = len(next(iter(batch.values()))), 0.0
    sums: dict[str, torch.Tensor] = {}
    for first in range(0, count, most):
        piece = {name: values[first : first + most] for name, values in batch.items()}
        loss, found = gradients(task, model, piece, step)
        if math.isfinite(loss):  # else of an example that counts for nothing: to end for it would tell of its row
            total += loss * len(next(iter(piece.values()))) / count
        for name, made in zip(found, clipped_sum(list(found.values()), bound) if found else (), strict=True):
            sums[name] = sums[name] + made if name in sums else made
    return total, sums


def gradients(task: Task, model: nn.Module, batch: Batch, step: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of some examples, and each one's own gradient by parameter, examples first; within `by_example`.

    The mean of them is left in the parameters. Raises `TaskFailed` where a gradient is of no single example.
    """
    count = len(next(iter(batch.values())))
    before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue] - Opacus', as the one below
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NO_INPUTS)  # of a first layer, whose inputs need none; its hook is told all
        loss = _loss(task, model, batch, step)
        try:
            loss.backward()
        except (TypeError, RuntimeError, NotImplementedError) as error:  # of Opacus' hooks; a plain pass raises none
            print(f"{type(error).__name__}: {error}", file=sys.stderr)  # it may quote a row, and the sentence travels
            raise TaskFailed(
                f"model: Opacus cannot tell its gradients apart by example ({type(error).__name__}, see the worker's "
                "log); privacy needs layers that take one tensor each, whose first axis is the examples"
            ) from error
    for name, buffer in model.named_buffers():
        if name not in before or before[name][0] is not buffer or before[name][1] != buffer._version:
            raise TaskFailed(
                f"model: buffer {name[:80]!r} changes as the model learns, and would leave without noise; privacy "
                "needs a model that keeps what it learns in parameters"
            )
    found: dict[str, torch.Tensor] = {}
    for name, parameter in trained(model).items():
        made: Any = getattr(parameter, "grad_sample", None)
        if made is None and parameter.grad is None:
            continue
        if not isinstance(made, torch.Tensor) or len(made) != count:
            raise TaskFailed(_unshared(name))
        found[name] = made
    return float(loss.detach()), found


def _loss(task: Task, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
    try:
        return checked(task.loss(model, batch), step)
    except TaskFailed as error:  # it tells of the step, and by a shape of how many rows are in it
        print(error, file=sys.stderr)
        raise TaskFailed(
            "loss: is no number to take a gradient of (see the worker's log); return the mean over the batch, a scalar "
            "floating point tensor, computed from the model without detach"
        ) from None


def _unshared(name: str) -> str:
    return (
        f"model: the gradient of {name[:80]!r} cannot be told apart by example, as privacy needs it; call its layer on "
        "a batch whose first axis is the examples, and have neither another layer nor the loss use it"
    )


@dataclass(slots=True)
class _Trial:
    """Finds out, by a few examples, whether an example's gradient is its own. It finds mistakes, and proves nothing."""

    task: Task
    model: nn.Module
    done: bool = False

    def once(self, batch: Batch, seed: int, step: int) -> None:
        """Raise `TaskFailed` where gradients do not add up to the batch's, or change with the other examples, be it
        with how many they are."""
        if self.done or len(next(iter(batch.values()))) < 2:
            return
        few = {name: values[:_FEW] for name, values in batch.items()}
        own = self._own(few, seed, step)
        finite = torch.stack([one.flatten(1).isfinite().all(1) for one in own.values()]).all(0) if own else None
        if finite is not None and not bool(finite.all()):  # of one that is not finite nothing can be seen
            few = {name: values[finite.to(values.device)] for name, values in few.items()}
            if len(next(iter(few.values()))) < 2:
                return
            own = self._own(few, seed, step)
        self.done = True
        for name, parameter in trained(self.model).items():
            if name in own and parameter.grad is not None and not _alike(own[name].mean(0), parameter.grad):
                raise TaskFailed(_unshared(name))
        others = {name: values[:1].expand(len(values), *values.shape[1:]).clone() for name, values in few.items()}
        if not _first_alike(own, self._own(others, seed, step)):
            raise TaskFailed(
                "loss: an example's gradient changes with the other examples of its batch, and privacy is of each by "
                "itself; compute them one by one and return the plain mean, without normalising over the batch"
            )
        if not self._keeps_size(own, few, seed, step):
            raise TaskFailed(
                "loss: an example's gradient changes with how many examples its batch has, so that one row more would "
                "weigh all others anew; return the plain mean over the batch, neither a sum nor one over a constant"
            )

    def _keeps_size(self, own: Gradients, few: Batch, seed: int, step: int) -> bool:
        """Tell whether the first example has the same gradient in half of the few, or one as large where it is drawn:
        in a smaller batch a second dropout draws other numbers."""
        half = {name: values[: len(values) // 2] for name, values in few.items()}
        if _first_alike(own, self._own(half, seed, step)):
            return True
        if _first_alike(own, self._own(few, seed, step, draw=1)):
            return False  # nothing is drawn
        ratios: list[float] = []  # their logarithms
        for draw in range(_DRAWS):
            whole, part = (_sizes(self._own(one, seed, step, draw)) for one in (few, half))
            ratios += [math.log(one / other) for one, other in zip(whole, part, strict=False) if one and other]
            if len(ratios) >= _SURE and 5 * stdev(ratios) / math.sqrt(len(ratios)) < abs(abs(median(ratios)) - _TWICE):
                break
        return not ratios or abs(median(ratios)) < _TWICE

    def _own(self, batch: Batch, seed: int, step: int, draw: int = 0) -> Gradients:
        chance.seed_step(seed, step, draw)  # each place in a batch of one size draws the same dropout each time
        return gradients(self.task, self.model, batch, step)[1]


def _first_alike(one: Gradients, other: Gradients) -> bool:
    return all(_alike(one[name][0], other[name][0]) for name in one if name in other)


def _sizes(gradients: Gradients) -> list[float]:
    """Return the norm of each example's gradient, where it is finite, and else 0."""
    norms = torch.stack([_norms(one.float().reshape(len(one), -1)) for one in gradients.values()]).norm(dim=0)
    return norms.where(norms.isfinite(), 0.0).tolist()


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not bool(one.isfinite().all() and other.isfinite().all()):
        return True  # such a gradient counts for nothing, and tells nothing here
    return float((one - other).norm()) <= _CLOSE * max(float(one.norm()), float(other.norm())) + 1e-7


@contextmanager
def by_example(model: nn.Module) -> Iterator[None]:
    """Have backward passes leave each example's own gradient beside the mean. The module stays the user's own.

    Raises `TaskFailed` for a layer that mixes examples, or whose gradients Opacus cannot tell apart.
    """
    hooks = _hooked(model)
    try:
        yield
    finally:
        hooks.cleanup()
        for layer in model.modules():  # what a pass that was broken off has left with Opacus' layers
            for name in ("activations", "max_batch_len"):
                vars(layer).pop(name, None)


def _hooked(model: nn.Module) -> Any:
    try:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
        from opacus.validators import ModuleValidator
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{error.name}: is not installed, and private steps are taken with it; pip install 'atoll[privacy]'"
        ) from None
    for name, layer in model.named_modules():
        kind, called = type(layer).__name__, repr(name[:80]) if name else "it"
        if isinstance(layer, _BatchNorm):
            raise TaskFailed(
                f"model: {called} is a {kind}, in which examples change each other; privacy is of each by itself: use "
                "GroupNorm or LayerNorm"
            )
        if type(layer) in ModuleValidator.VALIDATORS and ModuleValidator.VALIDATORS[type(layer)](layer):
            raise TaskFailed(
                f"model: {called} is a {kind}, whose gradients Opacus cannot tell apart by example; use its own layer "
                "of that kind (opacus.layers), or another one"
            )
    try:
        return GradSampleHooks(model)
    except NotImplementedError as error:
        words = " ".join(str(error).split())[:200]
        raise TaskFailed(f"model: its gradients cannot be told apart by example ({words}); use other layers") from None
