"""Context parallelism: each rank has a stretch of a sequence's positions, and only attention looks beyond it.

Where the ranks divide the heads they swap positions for heads around attention (Ulysses, Jacobs et al., 2023);
otherwise each gathers all keys and values. Torch's own has no rule for attention on a CPU (2.13).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from atoll.errors import TaskFailed
from atoll.inner.plans import nearest, plan_of, planned

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def stretch(model: nn.Module, over: DeviceMesh) -> None:
    """Do, to the modules that the model's `context_plan` names, what it says: split, attend, gather.

    split: of what the module returns, ``(batch, positions, ...)``, only this rank's positions go on. attend: the module
    is causal attention of q, k, v, each ``(batch, heads, positions, head width)``. gather: what it returns is made
    whole again, so that the loss sees every position, at every rank.
    """
    plan, group, ranks, rank = plan_of(model, "context_plan"), over.get_group(), over.size(), over.get_local_rank()
    for pattern, _, module in planned(model, plan):
        match plan[pattern]:
            case "split":
                module.register_forward_hook(partial(_own, ranks=ranks, rank=rank))
            case "gather":
                module.register_forward_hook(partial(_whole, group=group))
            case "attend":
                module.forward = _attending(module.forward, group, ranks, rank)
            case other:
                raise TaskFailed(f"context_plan: {pattern}: {other!r} is unknown; there is split, attend, gather")


def own_stretch(made: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Return this rank's positions of ``(batch, positions, ...)``. Raises `TaskFailed` unless all get as many."""
    positions = made.shape[1]
    if positions % ranks:
        raise TaskFailed(
            f"layout.context: {ranks} does not divide the {positions} positions of a sequence; set it to "
            f"{nearest(ranks, positions)}, or make sequences {positions // ranks * ranks or ranks} long"
        )
    return made.chunk(ranks, 1)[rank]


def _own(_: nn.Module, __: object, made: torch.Tensor, *, ranks: int, rank: int) -> torch.Tensor:
    return own_stretch(made, ranks, rank)


def _whole(_: nn.Module, __: object, made: torch.Tensor, *, group: dist.ProcessGroup) -> torch.Tensor:
    return _Gather.apply(made, group, 1)


def _attending(attend: Attend, group: dist.ProcessGroup, ranks: int, rank: int) -> Attend:
    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if k.shape[1] % ranks:
            return _gathered(q, k, v, group, rank)
        made = attend(*(_swap(part, 1, 2, group, ranks) for part in (q, k, v)))
        return _swap(made, 2, 1, group, ranks)

    return swapped


def _swap(x: torch.Tensor, cut: int, joined: int, group: dist.ProcessGroup, ranks: int) -> torch.Tensor:
    """Cut a tensor along one dimension among the ranks and join what comes along another."""
    parts = _Exchange.apply(torch.stack(x.chunk(ranks, cut)), group)
    return torch.cat(list(parts.unbind()), joined)


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, rank: int) -> torch.Tensor:
    k, v = (_GatherParts.apply(part, group, 2) for part in (k, v))
    every = torch.arange(k.shape[2], device=q.device)
    own = every[rank * q.shape[2] : (rank + 1) * q.shape[2]]
    seen = every <= own[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


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
