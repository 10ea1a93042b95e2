"""Expert parallelism: a mixture's experts live on different ranks, and each token travels to its own and back.

Lepikhin et al. (2020), without a limit to an expert's tokens: as many travel as are chosen.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from atoll.inner.plans import plan_of, planned

Grouped = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def house(model: nn.Module, over: DeviceMesh) -> None:
    """Keep this rank's experts of each module in the model's `expert_plan`, in place, and send tokens to theirs.

    Such a module's parameters have one expert per entry of their first dimension, and its forward takes tokens
    ``(tokens, width)`` in order of their experts, and how many there are for each expert that it has.
    """
    for _, _, module in planned(model, plan_of(model, "expert_plan")):
        for name, parameter in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), over, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        module.forward = _travelling(module.forward, over.get_group(), over.size())


def _travelling(forward: Grouped, group: dist.ProcessGroup, ranks: int) -> Grouped:
    def travelled(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        sent = counts.view(ranks, -1)
        came = torch.empty(sent.shape, dtype=sent.dtype, device=sent.device)
        dist.all_to_all_single(came, sent.contiguous(), group=group)
        going, coming = sent.sum(1).tolist(), came.sum(1).tolist()
        here = _Travel.apply(x, coming, going, group)
        # They came by rank and expert, and are taken by expert and rank.
        expert = torch.arange(came.shape[1], device=x.device).repeat(ranks).repeat_interleave(came.reshape(-1))
        order = expert.argsort(stable=True)
        made = forward(here[order], came.sum(0))
        return _Travel.apply(made[order.argsort()], going, coming, group)

    return travelled


class _Travel(torch.autograd.Function):
    """Rows to their ranks: ``going`` of them to each, ``coming`` from each."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, coming: list[int], going: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.coming, ctx.going, ctx.group = coming, going, group
        made = torch.empty((sum(coming), *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_to_all_single(made, x.contiguous(), coming, going, group=group)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Travel.apply(gradients[0], ctx.going, ctx.coming, ctx.group), None, None, None
