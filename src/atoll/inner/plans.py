"""What a model says of how it is spread: names by pattern, in the manner of transformers' `tp_plan`.

A model carries what it can: `tp_plan`, `context_plan`, `expert_plan`, `pipeline_split` with `pipeline_widths`, and
`heads`, `experts` and `layers`, whose numbers degrees must divide or stay within. Data and shard need none of it; a
`shard_plan` may name what is made whole together.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.mesh import Mesh

# The degrees that ask something of a model, and what of.
AXES = {
    "tensor": "tp_plan",
    "context": "context_plan",
    "expert": "expert_plan",
    "pipeline": "pipeline_split",
}


def planned(model: nn.Module, patterns: Iterable[str]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield pattern, name and module for each module whose name fits a pattern, in which ``*`` is a number."""
    known = {pattern: re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns}
    for name, module in model.named_modules():
        for pattern, names in known.items():
            if names.fullmatch(name):
                yield pattern, name, module


def plan_of(model: nn.Module, name: str) -> Any:
    """Return what a model carries under a name; None when it carries none."""
    return getattr(model, name, None) or None


def check(model: nn.Module, mesh: Mesh, axes: Collection[str]) -> None:
    """Raise `TaskFailed` for a degree that the model brings no plan for, or that its sizes are no multiple of."""
    layout, called = mesh.layout, type(model).__name__
    for axis, plan in AXES.items():
        if axis in axes and mesh.has(axis) and plan_of(model, plan) is None:
            raise TaskFailed(
                f"layout.{axis}: {called} carries no {plan}, by which it would be spread; set {axis} to 1, use "
                "shard, give the task a method parallelize(model, mesh), or take atoll.tasks.gpt.GPT"
            )
        names = plan_of(model, plan) if axis in axes and axis != "pipeline" and mesh.has(axis) else None
        if names is not None and not any(True for _ in planned(model, names)):
            raise TaskFailed(f"layout.{axis}: {called} has no module in its {plan}; set {axis} to 1")
    if "tensor" not in axes:
        return
    _divides("tensor", layout.tensor, heads(model), "heads")
    _divides("expert", layout.expert, plan_of(model, "experts"), "experts")


def heads(model: nn.Module) -> object:
    """Return how many heads there are to share, of a transformers model those of keys and values, too."""
    config = plan_of(model, "config")
    asked, answering = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(asked, int):
        return math.gcd(asked, answering) if isinstance(answering, int) else asked
    return plan_of(model, "heads")


def _divides(axis: str, degree: int, number: object, what: str) -> None:
    if degree == 1 or not isinstance(number, int) or number % degree == 0:
        return
    raise TaskFailed(
        f"layout.{axis}: {degree} does not divide the model's {number} {what}; set it to {nearest(degree, number)}"
    )


def nearest(degree: int, number: int) -> int:
    """Return the degree nearest to one that divides a number."""
    return min((found for found in range(1, number + 1) if number % found == 0), key=lambda found: abs(found - degree))


def check_stages(model: nn.Module, ranks: int, each: int) -> None:
    """Raise `TaskFailed` where a pipeline's stages, so many at each rank, are more than the model's `layers`."""
    layers = plan_of(model, "layers")
    if not isinstance(layers, int) or ranks * each <= layers:
        return
    stages = f"{ranks} ranks" if each == 1 else f"{ranks} ranks of {each} stages (compute.schedule)"
    mend = f"set it to {layers // each}" if layers >= 2 * each else "set it to 1"
    raise TaskFailed(f"layout.pipeline: {stages} for the model's {layers} layers, where each stage has one; {mend}")


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost members of a model's lists of modules: what is repeated, and takes turns in memory.

    One that shares a parameter with what is outside of it is left out.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():  # parents come before their children
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and id(module) not in inside:
            members = list(module.values() if isinstance(module, nn.ModuleDict) else module)
            for member in members:
                if not isinstance(member, nn.ModuleList | nn.ModuleDict) and any(True for _ in member.parameters()):
                    found.append(member)
                    inside |= {id(child) for child in member.modules()}
    held = holders(model)
    return [block for block in found if all(held[id(p)] == _count(block, p) for p in block.parameters())]


def holders(model: nn.Module) -> Mapping[int, int]:
    """Return for each parameter, by its identity, under how many names it is."""
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _count(block: nn.Module, parameter: nn.Parameter) -> int:
    return sum(found is parameter for _, found in block.named_parameters(remove_duplicate=False))
