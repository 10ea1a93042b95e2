"""Context parallelism of a transformers model: its tokens in stretches, its attention over all of them.

The model is given this rank's tokens with their positions, attends by a function of ours in the place of its own
(transformers' `AttentionInterface`), and its scores are joined again.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from atoll.errors import TaskFailed
from atoll.inner import stages
from atoll.inner.exchange import gather_parts, own_stretch, swap, whole_hook

_NAME = "atoll_context"
_TRIED = 4  # tokens of each rank, on which the spread model is held against the whole
_NEAR = 1e-4


def spread(model: nn.Module, inner: nn.Module, over: DeviceMesh) -> None:
    """Have the model compute this rank's stretch, in place. Raises `TaskFailed` where that is not what it computes.

    It is held against the whole on a few tokens, by all ranks: a model may mix positions elsewhere than in attention.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    was, ranks = model.training, over.size()
    given = stages.tried(model, ranks * _TRIED)
    with torch.no_grad():
        expected = stages.made_of(model.eval(), given)
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    config: Any = model.config
    config._attn_implementation = _NAME
    for module in inner.modules():
        module.__dict__["context"] = over
    inner.register_forward_pre_hook(partial(_own, over=over, later=stages.begins(model) > 0), with_kwargs=True)
    heads = [head for head in stages.heads(model) if any(True for _ in head.parameters())]
    for head in heads:
        head.register_forward_hook(whole_hook(over.get_group()))
    mine = own_stretch(given, ranks, over.get_local_rank()) if given.is_floating_point() else given
    with torch.no_grad():
        made = stages.made_of(model, mine)
    model.train(was)
    if not heads:
        expected = own_stretch(expected, ranks, over.get_local_rank())
    if made.shape != expected.shape or not torch.allclose(made, expected, rtol=_NEAR, atol=_NEAR):
        raise TaskFailed(
            f"layout.context: {type(model).__name__} computes something else over stretches of a sequence; set context "
            "to 1 and use shard"
        )


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally, of q, k, v each ``(batch, heads, this rank's positions, head width)``."""
    for name in ("softcap", "s_aux", "position_bias"):
        if more.get(name) is not None:
            raise TaskFailed(f"layout.context: the model's attention has {name}; set context to 1 and use shard")
    if mask is not None or not getattr(module, "is_causal", True):
        raise TaskFailed("layout.context: the model's attention is not the plain causal one; set context to 1")
    if more.get("dropout"):
        raise TaskFailed("layout.context: the model has an attention_dropout; set that to 0, or context to 1")
    over: DeviceMesh = module.context
    window: int | None = more.get("sliding_window")
    group, ranks, rank = over.get_group(), over.size(), over.get_local_rank()
    swapped, first = key.shape[1] % ranks == 0, 0
    if swapped:
        query, key, value = (swap(part, 1, 2, group, ranks) for part in (query, key, value))
    else:
        first = rank * query.shape[2]
        key, value = (gather_parts(part, group) for part in (key, value))
    seen = None
    if not swapped or (window is not None and window < key.shape[2]):
        every = torch.arange(key.shape[2], device=query.device)
        back = every[first : first + query.shape[2], None] - every
        seen = (back >= 0) & (back < (window or len(every)))
    made = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        seen,
        is_causal=seen is None,
        scale=more.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return (swap(made, 2, 1, group, ranks) if swapped else made).transpose(1, 2).contiguous(), None


def _own(
    _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], *, over: DeviceMesh, later: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give the model this rank's tokens, and where they are. What goes between stages is its own already."""
    tokens, between = named.get("input_ids"), named.get("inputs_embeds")
    beside = [name for name in ("attention_mask", "position_ids") if named.get(name) is not None]
    if args or beside or (tokens is None) is not later:
        raise TaskFailed("layout.context: call model(input_ids=...) with whole sequences, and no tensor beside them")
    if tokens is not None:
        named["input_ids"] = between = own_stretch(tokens, over.size(), over.get_local_rank())
    assert between is not None, "one of the two is given"
    first = over.get_local_rank() * between.shape[1]
    named["position_ids"] = torch.arange(first, first + between.shape[1], device=between.device)[None]
    return args, named
