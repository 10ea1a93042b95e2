"""Ranks that each hold the whole model: gradients are averaged over them as a backward pass computes them.

By torch's own reducer, as `DistributedDataParallel` uses it, to the same bits. The class is done without: it imports
what compiles and what shards models, over a second of processor in each rank, and cannot be taken off a model again.
Here a model that was among others goes on among those that are left.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import (
    Reducer,
    _broadcast_coalesced,
    _compute_bucket_assignment_by_size,
    _verify_params_across_processes,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

from atoll.inner.mesh import LINKS

# What a sum begins with while the rest is computed yet; torch's own sizes.
_FIRST, _BUCKET = 1 << 20, 25 << 20  # bytes: the gradients that come first, and of those that come after
_PIECE = 16 << 20  # bytes of weights that go to the others at once
_LOOKS = 16  # times in a backward pass


class Copies:
    """What averages a model's gradients over the group that there is, from its next forward pass on.

    It hooks the module, so that the user's loss sees the class it built, not a wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.summing = True  # whether the next backward pass is to sum, or only to add to what is there
        self._model = model
        self._reducer: Reducer | None = None
        # Let go after the reducer, which waits for the group's threads while it has Python's lock, which they may want.
        self._group: dist.ProcessGroup | None = None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]
        for parameter in trained[:: -(-len(trained) // _LOOKS)]:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_look))

    def part(self) -> None:
        """Leave the model as it was built, but for its values; also after a backward pass that was broken off."""
        for hook in self._hooks:
            hook.remove()
        self._reducer = None  # with it go its hooks on the parameters
        self._group = None
        self._model.zero_grad(set_to_none=True)

    def _before(self, *_: object) -> None:
        if not torch.is_grad_enabled():
            return
        _look()
        if self._reducer is None:
            self._group = dist.group.WORLD
            self._reducer = _met(self._model)
        if self.summing:
            self._reducer.prepare_for_forward()

    def _after(self, _: nn.Module, given: object, output: Any) -> Any:
        if not torch.is_grad_enabled() or self._reducer is None:
            return None
        _look()
        if self.summing:
            self._reducer.prepare_for_backward(list(_tensors(output)))
        found, form = tree_flatten(output)
        through = _Through.apply(*found)
        assert isinstance(through, tuple)
        # What no gradient comes to stays the very tensor that it is.
        return tree_unflatten([new if _grown(old) else old for old, new in zip(found, through, strict=True)], form)


class _Through(torch.autograd.Function):
    """Makes one node of all outputs: of those that a loss leaves out the reducer then hears that no gradient comes."""

    @staticmethod
    def forward(ctx: Any, *found: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        return tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return gradients


def _look(*_: object) -> None:
    """End a step that is done for nothing: its sum would tell so too, once all of it is computed."""
    if LINKS.severed:
        raise ConnectionError("the group was broken off while a step was computed")


def _met(model: nn.Module) -> Reducer:
    """Return a reducer for the model, which has the first rank's parameters at all of them from here on.

    Looking for unused parameters lets a model have some; and without it the buckets are laid out anew after a group's
    first step, which changes the order in which three and more ranks are added, and so the bits of a round that another
    group begins in the middle.
    """
    group = dist.group.WORLD
    assert group is not None, "several ranks have met"
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained: list[torch.Tensor] = list(named.values())
    _verify_params_across_processes(group, trained, None)
    _broadcast_coalesced(group, [parameter.detach() for parameter in model.parameters()], _PIECE, 0)
    dense = [False] * len(trained)
    buckets, limits = _compute_bucket_assignment_by_size(trained, [_FIRST, _BUCKET], dense)
    return Reducer(
        trained,
        list(reversed(buckets)),  # the last come first in a backward pass
        list(reversed(limits)),
        group,
        dense,
        _BUCKET,
        True,  # look for unused parameters
        True,  # gradients are where they are summed
        dict(enumerate(named)),
        _FIRST,
    )


def _tensors(output: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in what a model returned, as deep as torch looks for them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for one in output:
            yield from _tensors(one)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif is_dataclass(output):
        yield from _tensors([getattr(output, field.name) for field in fields(output)])


def _grown(one: object) -> bool:
    return isinstance(one, torch.Tensor) and one.grad_fn is not None
