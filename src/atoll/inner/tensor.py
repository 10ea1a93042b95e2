"""Tensor parallelism: a layer's matrices cut over ranks, as the model's own `tp_plan` says (Shoeybi et al., 2019)."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from atoll.errors import TaskFailed
from atoll.inner.plans import holders, plan_of, planned

# Transformers' words; those of older releases mean the same.
_STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    # A norm of each head, (batch, positions, heads, head width): its gradient is the sum of what all ranks' heads give.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def cut(model: nn.Module, over: DeviceMesh) -> None:
    """Keep this rank's part of each matrix in the plan, in place. Raises `TaskFailed` for a way that is not known.

    One that several modules share, as an embedding and the head may, stays whole: cut, it would be two.
    """
    plan = plan_of(model, "tp_plan")
    styles: dict[str, ParallelStyle] = {}
    uses = holders(model)
    for pattern, name, module in planned(model, plan):
        if plan[pattern] not in _STYLES:
            raise TaskFailed(
                f"tp_plan: {pattern}: {plan[pattern]!r} is no way to cut a matrix here; there is {', '.join(_STYLES)}"
            )
        if any(uses[id(parameter)] > 1 for parameter in module.parameters()):
            continue
        styles[name] = _STYLES[plan[pattern]]()
    # Each rank built the same weights from the seed: nobody needs to send them.
    parallelize_module(model, over, styles, src_data_rank=None)
