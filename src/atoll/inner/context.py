"""Context parallelism: each rank has a stretch of a sequence's positions, and only attention looks beyond it.

Where the ranks divide the heads they swap positions for heads around attention (Ulysses, Jacobs et al., 2023);
otherwise each gathers all keys and values. Torch's own has no rule for attention on a CPU (2.13).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from atoll.errors import TaskFailed
from atoll.inner.exchange import gather_parts, own_stretch, swap, whole_hook
from atoll.inner.plans import plan_of, planned

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def stretch(model: nn.Module, over: DeviceMesh) -> None:
    """Do, to the modules that the model's `context_plan` names, what it says: split, attend, gather.

    split: of what the module returns, ``(batch, positions, ...)``, only this rank's positions go on. attend: the module
    is causal attention of q, k, v, each ``(batch, heads, positions, head width)``. gather: what it returns is made
    whole again, so that the loss sees every position, at every rank. positions: the module is that of a transformers
    model below its head.
    """
    plan, group, ranks, rank = plan_of(model, "context_plan"), over.get_group(), over.size(), over.get_local_rank()
    for pattern, _, module in list(planned(model, plan)):
        match plan[pattern]:
            case "split":
                module.register_forward_hook(partial(_own, ranks=ranks, rank=rank))
            case "gather":
                module.register_forward_hook(whole_hook(group))
            case "attend":
                module.forward = _attending(module.forward, group, ranks, rank)
            case "positions":
                from atoll.inner.positions import spread

                spread(model, module, over)
            case other:
                raise TaskFailed(f"context_plan: {pattern}: {other!r} is unknown; there is split, attend, gather")


def _own(_: nn.Module, __: object, made: torch.Tensor, *, ranks: int, rank: int) -> torch.Tensor:
    return own_stretch(made, ranks, rank)


def _attending(attend: Attend, group: dist.ProcessGroup, ranks: int, rank: int) -> Attend:
    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if k.shape[1] % ranks:
            return _gathered(q, k, v, group, rank)
        made = attend(*(swap(part, 1, 2, group, ranks) for part in (q, k, v)))
        return swap(made, 2, 1, group, ranks)

    return swapped


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, rank: int) -> torch.Tensor:
    k, v = (gather_parts(part, group) for part in (k, v))
    every = torch.arange(k.shape[2], device=q.device)
    own = every[rank * q.shape[2] : (rank + 1) * q.shape[2]]
    seen = every <= own[:, None]
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
