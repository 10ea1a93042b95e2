"""What ranks that share sequences do with tensors: cut, join, and exchange positions for heads, with gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.plans import nearest


def own_stretch(made: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Return this rank's positions of ``(batch, positions, ...)``. Raises `TaskFailed` unless all get as many."""
    positions = made.shape[1]
    if positions % ranks:
        raise TaskFailed(
            f"layout.context: {ranks} does not divide the {positions} positions of a sequence; set it to "
            f"{nearest(ranks, positions)}, or make sequences {positions // ranks * ranks or ranks} long"
        )
    return made.chunk(ranks, 1)[rank]


def whole_hook(group: dist.ProcessGroup) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
    """Return a forward hook by which what a module returns of its positions is joined."""
    return lambda _, __, made: _Gather.apply(made, group, 1)


def swap(x: torch.Tensor, cut: int, joined: int, group: dist.ProcessGroup, ranks: int) -> torch.Tensor:
    """Cut a tensor along one dimension among the ranks and join what comes along another."""
    parts = _Exchange.apply(torch.stack(x.chunk(ranks, cut)), group)
    return torch.cat(list(parts.unbind()), joined)


def gather_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return all ranks' positions of ``(batch, heads, positions, head width)``, of which each makes something else."""
    return _GatherParts.apply(x, group, 2)


def _all(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    x = x.contiguous()
    parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim)


class _Exchange(torch.autograd.Function):
    """Slice i of the first dimension goes to rank i; its own inverse, so backward is the same."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x = x.contiguous()
        # By shape: like a permuted tensor it would have that one's strides, and gloo would write past them.
        made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(made, x, group=group)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    """All ranks' stretches joined. What follows is the same at all ranks, so each has the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _all(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        parts = gradients[0].chunk(dist.get_world_size(ctx.group), ctx.dim)
        return parts[dist.get_rank(ctx.group)].contiguous(), None, None


class _GatherParts(_Gather):
    """As `_Gather`, but of what is joined each rank makes something else: their gradients are summed."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return _Gather.backward(ctx, gradient)
