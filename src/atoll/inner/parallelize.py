"""A model over a mesh: which of torch's ways are applied to it, in which order, and what a backward pass is then.

Data and shard ask nothing of a model; the other degrees follow the plan that it carries (`atoll.inner.plans`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from atoll.inner.copies import Copies
from atoll.inner.mesh import Mesh
from atoll.inner.plans import AXES, blocks, check
from atoll.spec.compute import Compute

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Parallel:
    """A model as this rank holds it, which is called as the task's own is, at all ranks of a share together."""

    model: nn.Module
    mesh: Mesh
    compute: Compute
    copies: Copies | None = None  # at each of several ranks that hold the whole of it

    def among(self, mesh: Mesh) -> "Parallel | None":
        """Return the same model among other ranks that hold the whole of it; None where it is in parts, or is to be."""
        if self.mesh.device is not None or mesh.device is not None:
            return None
        if self.copies is not None:
            self.copies.part()
        return _copied(self.model, mesh, self.compute)

    def numerics(self) -> AbstractContextManager[object]:
        """Return what the model computes within."""
        sharded = self.mesh.has("data") or self.mesh.has("shard")
        if self.compute.precision == "float32" or sharded:
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    @contextmanager
    def answering(self) -> Iterator["type[torch.inference_mode] | type[torch.no_grad]"]:
        """Let the model answer; yields in what mode.

        A sharded one's tensors are made whole for it and used for training after, which those of inference mode cannot.
        """
        with self.numerics():
            yield torch.inference_mode if self.mesh.device is None else torch.no_grad
        if hasattr(self.model, "reshard"):  # torch leaves the outermost module's parameters whole
            self.model.reshard()  # pyright: ignore[reportCallIssue]

    def hold_back(self, last: bool) -> None:
        """Have the next backward pass sum gradients over ranks only if it is the step's ``last``."""
        if self.copies is not None:
            self.copies.summing = last
        for name in ("set_is_last_backward", "set_requires_gradient_sync"):  # what torch adds to a module it spreads
            if hasattr(self.model, name):
                getattr(self.model, name)(last)

    def settle(self) -> None:
        """Finish the gradients that all backward passes of a step have left."""
        if self.mesh.device is not None:
            from atoll.inner.gradients import sum_over

            for axis in ("context", "expert"):
                if self.mesh.has(axis):
                    sum_over(self.mesh, axis, self.model.parameters())
            whole = [parameter for parameter in self.model.parameters() if parameter.ndim == 0]
            for axis in ("data", "shard"):  # what torch's sharding leaves alone
                if whole and self.mesh.has(axis):
                    sum_over(self.mesh, axis, whole, 1 / getattr(self.mesh.layout, axis))
        if self.compute.clip is not None:
            from atoll.inner.gradients import clip

            clip(self.mesh, self.model.parameters(), self.compute.clip)


def parallelize(
    model: nn.Module, mesh: Mesh, compute: Compute | None = None, by_task: Callable[..., object] | None = None
) -> Parallel:
    """Spread a model, which every rank has built alike, over the mesh: in place but for a pipeline.

    ``by_task(model, device_mesh)`` takes the place of the model's plan for tensor, context and expert; it changes the
    model in place, along the axes of those names. Raises `TaskFailed` for a degree that neither is there for, or that
    does not divide what it must.
    """
    compute = compute or Compute()
    if mesh.device is None:
        _prepare(model, compute)
        return _copied(model, mesh, compute)
    check(model, mesh, ("pipeline",) if by_task is not None else AXES)
    if by_task is not None and not mesh.has("pipeline"):
        by_task(model, mesh.device)
        _wrap(model, mesh, compute)
        return Parallel(model, mesh, compute)
    if not mesh.has("pipeline"):
        _spread(model, mesh, compute)
        return Parallel(model, mesh, compute)
    from atoll.inner.pipelined import Pipeline, split

    stages = split(model, mesh, compute)
    for stage in stages.here.values():
        _spread(stage, mesh, compute)
    return Parallel(Pipeline(stages, mesh, compute), mesh, compute)


def _copied(model: nn.Module, mesh: Mesh, compute: Compute) -> Parallel:
    return Parallel(model, mesh, compute, Copies(model) if mesh.ranks > 1 else None)


def _spread(model: nn.Module, mesh: Mesh, compute: Compute) -> None:
    # Here, because importing what shards and cuts takes a second that data parallelism does not need. The innermost
    # axis comes first: torch shards what was cut already, and hooks see what a module returns once it is whole.
    if mesh.has("expert"):
        from atoll.inner.expert import house

        house(model, mesh.axis("expert"))
    if mesh.has("tensor"):
        from atoll.inner.tensor import cut

        cut(model, mesh.axis("tensor"))
    if mesh.has("context"):
        from atoll.inner.context import stretch

        stretch(model, mesh.axis("context"))
    _wrap(model, mesh, compute)


def _wrap(model: nn.Module, mesh: Mesh, compute: Compute) -> None:
    _prepare(model, compute)
    if mesh.has("data") or mesh.has("shard"):
        from atoll.inner.sharded import shard

        shard(model, mesh, compute)


def _prepare(model: nn.Module, compute: Compute) -> None:
    for block in blocks(model) if compute.checkpointing or compute.compile else ():
        if compute.checkpointing:
            _recompute(block)
        if compute.compile:
            block.compile()


def _recompute(block: nn.Module) -> None:
    forward = block.forward
    # The state of random generators is put back for the second time, as the first had it.
    block.forward = lambda *given, **named: checkpoint(forward, *given, use_reentrant=False, **named)


def pieces(batch: Batch, wanted: int) -> Iterator[Batch]:
    """Cut a share of a batch into at most so many pieces, none empty, of lengths that differ by 1 at most."""
    length = len(next(iter(batch.values())))
    parts = {name: values.tensor_split(min(wanted, length)) for name, values in batch.items()}
    for number in range(min(wanted, length)):
        yield {name: values[number] for name, values in parts.items()}
