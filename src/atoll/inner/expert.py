"""Expert parallelism: a mixture's experts live on different ranks, and each token travels to its own and back.

Lepikhin et al. (2020), without a limit to an expert's tokens: as many travel as are chosen.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from atoll.errors import TaskFailed
from atoll.inner import stages
from atoll.inner.plans import DISPATCHED, mixtures, peeled, plan_of, planned

Grouped = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Dispatched = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Calls = dict[nn.Module, tuple[tuple[torch.Tensor, ...], torch.Tensor]]
_TRIED = 8  # tokens, on which experts that live apart are held against the whole
_NEAR = 1e-4  # of the norm of what they make


def house(model: nn.Module, over: DeviceMesh) -> None:
    """Keep this rank's experts of each module in the model's `expert_plan`, in place, and send tokens to theirs.

    Such a module's parameters have one expert per entry of their first dimension, and its forward sees those that live
    here. grouped: it takes tokens ``(tokens, width)`` in order of their experts, and how many there are for each expert
    that it has. ep_dispatch_experts: it takes tokens, for each the experts that were chosen, and what each is to count
    for, both ``(tokens, chosen)``, as transformers calls them. Adapters (LoRA) around it are whole at each rank, where
    their gradient is that of the experts that live there. Raises `TaskFailed` where experts compute something else.
    """
    plan, found = plan_of(model, "expert_plan"), mixtures(model)
    ways = {module: plan[pattern] for pattern, _, module in planned(model, plan) if module in found}
    calls = _tried(model, [module for module, way in ways.items() if way == DISPATCHED])
    for module, way in ways.items():
        many = found[module][0].shape[0]
        forward = _own(module, over, many // over.size())
        if way == DISPATCHED:
            cast("Any", peeled(module)[-1]).num_experts = many // over.size()  # by which transformers counts tokens
            module.forward = _sorted(_travelling(_grouped(forward), over), many)
        elif way == "grouped":
            module.forward = _travelling(forward, over)
        else:
            raise TaskFailed(f"expert_plan: {way!r} is unknown; there is grouped, {DISPATCHED}")
    _hold(model, calls)


def _own(module: nn.Module, over: DeviceMesh, each: int) -> Callable[..., torch.Tensor]:
    """Cut a module's experts, so many for each rank; return its forward by those here, with what adapters add."""
    *adapters, inner = peeled(module)
    for name, parameter in list(inner.named_parameters(recurse=False)):
        part = distribute_tensor(parameter.detach(), over, [Shard(0)], src_data_rank=None)
        inner.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    first, forward = over.get_local_rank() * each, inner.forward

    def owned(*given: torch.Tensor) -> torch.Tensor:
        whole = dict(inner._parameters)
        parts = {name: one.to_local() for name, one in whole.items() if isinstance(one, DTensor)}
        for adapter in cast("list[Any]", adapters):
            for name in adapter.lora_A:
                of = adapter.parameter_name
                parts[of] = _adapted(parts[of], adapter, name, slice(first, first + each))
        inner._parameters.update(cast("dict[str, nn.Parameter | None]", parts))
        try:
            return forward(*given)
        finally:
            inner._parameters.update(whole)

    return owned


def _adapted(weight: torch.Tensor, adapter: Any, name: str, experts: slice) -> torch.Tensor:
    """Return some experts' weights with what an adapter of peft adds to them, in their precision, as it does itself."""
    left, right, scale = adapter.get_delta_factors(name)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.baddbmm(weight, left[experts], right[experts], alpha=scale)


def _sorted(forward: Grouped, many: int) -> Dispatched:
    """Give tokens, each once for each of its chosen experts, in order of these to one that takes them so."""

    def dispatched(x: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        order = chosen.reshape(-1).argsort(stable=True)
        made = forward(x[order // chosen.shape[-1]], torch.bincount(chosen.reshape(-1), minlength=many))
        made = made[order.argsort()].view(*chosen.shape, -1)
        return (made * share.unsqueeze(-1)).sum(-2).to(x.dtype)

    return dispatched


def _grouped(forward: Dispatched) -> Grouped:
    """Give tokens in order of their experts to one that takes with each what was chosen."""

    def grouped(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        # Where none came, a zero goes to the first: what it makes has a gradient, for which other ranks wait.
        given = x if len(x) else x.sum(0, keepdim=True)
        expert = torch.arange(len(counts), device=x.device).repeat_interleave(counts) if len(x) else counts.new_zeros(1)
        return forward(given, expert[:, None], given.new_ones(len(given), 1))[: len(x)]

    return grouped


def _travelling(forward: Grouped, over: DeviceMesh) -> Grouped:
    group, ranks = over.get_group(), over.size()

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


def _tried(model: nn.Module, modules: Iterable[nn.Module]) -> Calls:
    """Return what a model calls some of its modules with, on a few tokens, and what they make of it."""
    calls: Calls = {}

    def note(module: nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, Any], made: torch.Tensor) -> None:
        shapes = [tensor.shape for tensor in given]
        if named or len(given) != 3 or len(shapes[0]) != 2 or shapes[1] != shapes[2] or made.shape != shapes[0]:
            raise _other(model)
        calls[module] = given, made

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    if hooks:
        was = model.training
        with torch.no_grad():
            stages.made_of(model.eval(), stages.tried(model, _TRIED))
        model.train(was)
    for hook in hooks:
        hook.remove()
    return calls


def _hold(model: nn.Module, calls: Calls) -> None:
    """Compare what modules make now with what they made whole: no plan tells all that a model does."""
    for module, (given, expected) in calls.items():
        with torch.no_grad():
            apart = module(*given) - expected
        if not apart.norm() <= _NEAR * expected.norm():
            raise _other(model)


def _other(model: nn.Module) -> TaskFailed:
    return TaskFailed(
        f"layout.expert: {type(model).__name__}'s experts compute something else apart; set expert to 1 and use shard"
    )
