"""Tensor parallelism: a layer's matrices cut over ranks, as the model's own `tp_plan` says (Shoeybi et al., 2019).

An adapter of low rank (LoRA) beside a cut matrix is cut where it meets that one's cut side, and whole elsewhere: of a
colwise layer B, of a rowwise layer A. What it computes, and its gradient, are those of one process.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

from atoll.inner.plans import base, cuts

# By transformers' words; `plans.WAYS` has the others.
_STYLES: Mapping[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    # A norm of each head, (batch, positions, heads, head width): its gradient is the sum of what all ranks' heads give.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}
HANDLED = (*_STYLES, "mla_kv_a_proj", "moe_tp_experts", "replicate")  # of the last two it is whole at each rank


def cut(model: nn.Module, over: DeviceMesh) -> None:
    """Keep this rank's part of each matrix in the plan, in place; `plans.check` has found that it can be.

    One that several modules share, as an embedding and the head may, stays whole: cut, it would be two.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    styles: dict[str, ParallelStyle] = {}
    for name, module, way in cuts(model):
        if way == "mla_kv_a_proj":
            _sum_rotated(module, cast("Any", model).config.qk_rope_head_dim, over)
        if way not in _STYLES:
            continue  # it is whole at each rank
        styles[name if base(module) is module else f"{name}.base_layer"] = _STYLES[way]()
        if base(module) is not module:
            styles |= _beside(name, module, way, over)
    # Each rank built the same weights from the seed: nobody needs to send them.
    parallelize_module(model, over, styles, src_data_rank=None)
    for name in frozen:  # torch makes a norm anew, to be trained
        model.get_parameter(name).requires_grad_(False)


def _beside(name: str, module: nn.Module, way: str, over: DeviceMesh) -> dict[str, ParallelStyle]:
    """Return how the adapters of a layer are cut; where the layer's input and output are whole, so are they."""
    adapted = cast("Any", module)
    if way == "colwise":
        return {f"{name}.lora_B.{adapter}": ColwiseParallel() for adapter in adapted.lora_B}
    if way != "rowwise":
        return {}
    for adapter, dropout in adapted.lora_dropout.items():
        if isinstance(dropout, nn.Dropout):
            adapted.lora_dropout[adapter] = _Dropout(dropout.p, over)
    return {f"{name}.lora_A.{adapter}": RowwiseParallel() for adapter in adapted.lora_A}


class _Dropout(nn.Module):
    """Dropout of this rank's part of the last dimension, drawn for all of it: as one process draws it."""

    def __init__(self, share: float, over: DeviceMesh) -> None:
        super().__init__()
        self._share, self._ranks, self._rank = share, over.size(), over.get_local_rank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        drawn = functional.dropout(x.new_ones(*x.shape[:-1], x.shape[-1] * self._ranks), self._share)
        return x * drawn.chunk(self._ranks, -1)[self._rank]


def _sum_rotated(module: nn.Module, width: int, over: DeviceMesh) -> None:
    """Sum the gradient of a projection's last ``width`` numbers, which all ranks' heads take as they are.

    The rest goes into a colwise matrix, which sums its gradient itself (latent attention of DeepSeek-V2, 2024).
    """

    def summed(_: nn.Module, __: object, made: torch.Tensor) -> torch.Tensor:
        rest, rotated = made[..., :-width], made[..., -width:]
        taken = DTensor.from_local(rotated, over, [Replicate()], run_check=False)
        return torch.cat([rest, taken.to_local(grad_placements=[Partial()])], dim=-1)

    module.register_forward_hook(summed)
