"""What a model is to a planner: sizes that layouts must divide, and what an example leaves in memory, in one pass."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from atoll.inner import chance, stages
from atoll.inner.plans import AXES, blocks, cuts, experts, heads, mixtures, plan_of, planned, uncut
from atoll.spec.fleet import Degree, ModelShape
from atoll.spec.task import Task

_EXAMPLES = 2  # that are passed: a batch norm takes no single one


@dataclass(frozen=True, slots=True)
class Described:
    """A model's shape, and the seconds that one example's forward pass took; 0 where it could not be passed alone."""

    shape: ModelShape
    seconds: float


def describe(task: Task, model: nn.Module, batch: Mapping[str, torch.Tensor], seed: int) -> Described:
    """Describe a model that nothing was done to yet, by its plans and by passing the first examples of a batch."""
    found = blocks(model)
    few = {name: values[:_EXAMPLES].clone() for name, values in batch.items()}  # a part would count as the whole of it
    seen = _Seen(len(next(iter(few.values()))), {_place(p) for p in model.parameters()})
    seconds = _passed(task, model, few, found, seen, seed)
    # Frozen tensors below an adapter are no part of the state: the measured worker holds them beside all this.
    kept = {id(value) for value in model.state_dict(keep_vars=True).values()}
    shape = ModelShape(
        axes=_axes(model),
        layers=len(found),
        heads=_number(heads(model)),
        experts=experts(model),
        positions=seen.positions,
        width=seen.width,
        activation_bytes=seen.bytes // seen.examples,
        block_parameters=_count(kept, (p for block in found for p in block.parameters())),
        tensor_parameters=_count(
            kept, (p for _, module, way in cuts(model) if "wise" in way for p in module.parameters())
        ),
        expert_parameters=_count(kept, (p for parameters in mixtures(model).values() for p in parameters)),
    )
    return Described(shape, seconds / seen.examples)


@dataclass(slots=True)
class _Seen:
    """What a pass shows: what goes between two blocks, and the memory that is kept for a gradient, each once."""

    examples: int
    weights: set[int]
    positions: int = 0
    width: int = 0
    kept: dict[int, torch.UntypedStorage] = field(default_factory=dict[int, torch.UntypedStorage])

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if _place(tensor) not in self.weights:
            self.kept[_place(tensor)] = tensor.untyped_storage()  # held, so that no other comes to lie there
        return tensor

    def block(self, _: nn.Module, __: Any, made: Any) -> None:
        first = made[0] if isinstance(made, tuple) and made else made
        if not self.width and isinstance(first, torch.Tensor) and first.ndim > 1 and len(first) == self.examples:
            self.positions, self.width = first[0].numel() // first.shape[-1], first.shape[-1]


def _passed(
    task: Task, model: nn.Module, batch: Mapping[str, torch.Tensor], found: list[nn.Module], seen: _Seen, seed: int
) -> float:
    hooks = [block.register_forward_hook(seen.block) for block in found]
    chance.seed_step(seed, 0, 0)
    began = time.perf_counter()
    try:
        with torch.autograd.graph.saved_tensors_hooks(seen.keep, lambda tensor: tensor):
            task.loss(model.train(), batch)
        return time.perf_counter() - began
    except Exception:  # noqa: BLE001 - user code, which need not take so few examples; the step that follows does, or tells
        seen.kept.clear()
        return 0.0
    finally:
        for hook in hooks:
            hook.remove()


def _axes(model: nn.Module) -> tuple[Degree, ...]:
    """Return the degrees that the model carries a plan for, and has modules of."""
    carried: list[Degree] = []
    for axis, plan in AXES.items():
        names = plan_of(model, plan)
        if not names or (axis != "pipeline" and not any(True for _ in planned(model, names))):
            continue
        if not (axis == "tensor" and uncut(model, 1)) and not (axis == "pipeline" and _tied(model)):
            carried.append(cast("Degree", axis))
    return tuple(carried)


def _tied(model: nn.Module) -> bool:
    return stages.layers_of(model) > 0 and bool(stages.unsplit(model))


def _count(kept: set[int], parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters if id(p) in kept}.values())


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
