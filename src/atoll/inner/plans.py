"""What a model says of how it is spread: names by pattern, in the manner of transformers' `tp_plan`.

A model carries what it can: `tp_plan`, `context_plan`, `expert_plan`, `pipeline_split` with `pipeline_widths`, and
`heads` and `layers`, whose numbers degrees must divide or stay within; of transformers' models it is worked out. Data
and shard need none of it; a `shard_plan` may name what is made whole together.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from atoll.errors import TaskFailed
from atoll.inner import stages
from atoll.inner.mesh import Mesh

# The degrees that ask something of a model, and what of.
AXES = {
    "tensor": "tp_plan",
    "context": "context_plan",
    "expert": "expert_plan",
    "pipeline": "pipeline_split",
}
# Transformers' words, also of older releases, for how `atoll.inner.tensor` cuts a module over ranks; by the last three
# it is whole at each of them.
_CUT = ("colwise", "rowwise", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")
_CUT += ("embedding_rowwise", "embedding_colwise")
_WHOLE = ("moe_tp_experts", "mla_kv_a_proj", "replicate")
WAYS = (*_CUT, "replicated_with_grad_allreduce", *_WHOLE)
DISPATCHED = "ep_dispatch_experts"  # theirs, too: experts called with tokens and what was chosen for each


def planned(model: nn.Module, patterns: Iterable[str]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield pattern, name and module for each module whose name fits a pattern, in which ``*`` is a number."""
    modules = dict(model.named_modules())
    for pattern, name in _named(patterns, modules):
        yield pattern, name, modules[name]


def _named(patterns: Iterable[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    known = {pattern: re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns}
    for name in names:
        for pattern, fitting in known.items():
            if fitting.fullmatch(name):
                yield pattern, name


def plan_of(model: nn.Module, name: str) -> Any:
    """Return what a model carries under a name; None when it carries none."""
    found = getattr(model, name, None) or None
    if found is None and name == AXES["pipeline"] and stages.layers_of(model):
        return partial(stages.split, model)
    if found is None and name == AXES["context"] and getattr(model, "_supports_attention_backend", False):
        return {str(model.base_model_prefix): "positions"} if stages.layers_of(model) else None
    if found is None and name == AXES["expert"]:
        theirs = getattr(model, "ep_plan", None) or {}
        return {name: way for name, way in theirs.items() if way == DISPATCHED} or None
    return found


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
    asked, answering = _heads(model)
    few = f"{asked} heads" if asked == answering else f"{asked} heads and {answering} of keys and values"
    _divides("tensor", layout.tensor, heads(model), few)
    _divides("expert", layout.expert, experts(model), f"{experts(model)} experts")
    around = [adapter for module in mixtures(model) if mesh.has("expert") for adapter in peeled(module)[:-1]]
    if not all(hasattr(adapter, "get_delta_factors") for adapter in around):
        raise TaskFailed(
            f"layout.expert: around {called}'s experts is an adapter other than plain LoRA; take that, or set expert "
            "to 1 and use shard"
        )
    if mesh.has("tensor") and (words := uncut(model, layout.tensor)):
        raise TaskFailed(words)


def heads(model: nn.Module) -> object:
    """Return how many heads there are to share, of a transformers model those of keys and values, too."""
    asked, answering = _heads(model)
    return math.gcd(asked, answering) if isinstance(asked, int) and isinstance(answering, int) else asked


def experts(model: nn.Module) -> int:
    """Return how many experts there are to share: the most that divides those of each layer; 0 where there are none."""
    return math.gcd(*(parameter.shape[0] for parameters in mixtures(model).values() for parameter in parameters))


def mixtures(model: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Return the modules in the model's `expert_plan`, and the parameters of each that have one expert per entry."""
    named = planned(model, plan_of(model, AXES["expert"]) or ())
    found = {module: list(peeled(module)[-1].parameters(recurse=False)) for _, _, module in named}
    return {module: parameters for module, parameters in found.items() if parameters}


def _heads(model: nn.Module) -> tuple[object, object]:
    config = plan_of(model, "config")
    asked, answering = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not isinstance(asked, int):
        asked = answering = plan_of(model, "heads")
    return asked, answering if isinstance(answering, int) else asked


def _divides(axis: str, degree: int, number: object, what: str) -> None:
    if degree == 1 or not isinstance(number, int) or number % degree == 0:
        return
    raise TaskFailed(f"layout.{axis}: {degree} does not divide the model's {what}; set it to {nearest(degree, number)}")


def cuts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, module and the way it is cut for what the `tp_plan` names, but for modules that share a parameter.

    Nor for those without any, which stand for a part of the model that is in another stage.
    """
    plan, uses = plan_of(model, "tp_plan") or {}, holders(model)
    for pattern, name, module in planned(model, plan):
        if {uses[id(parameter)] for parameter in module.parameters()} == {1}:
            yield name, module, plan[pattern]


def base(module: nn.Module) -> nn.Module:
    """Return the layer that an adapter of peft was put beside; of another module, itself."""
    found = getattr(module, "base_layer", None)
    return found if isinstance(found, nn.Module) else module


def peeled(module: nn.Module) -> list[nn.Module]:
    """Return the adapters of peft that were put around a layer, the outermost first, and then the layer itself."""
    found = [module]
    while base(found[-1]) is not found[-1]:
        found.append(base(found[-1]))
    return found


def uncut(model: nn.Module, degree: int) -> str:
    """Return why the model's `tp_plan` cannot be followed over so many ranks, "" where it can."""
    called = type(model).__name__
    mend = "set tensor to 1 and use shard, or give the task a method parallelize(model, mesh)"
    whole: list[str] = []
    for name, module, way in cuts(model):
        layer, of = base(module), f"layout.tensor: {called}'s tp_plan cuts {name} by {way!r}"
        if way not in WAYS:
            return f"{of}, and known are {', '.join(WAYS)}; {mend}"
        if way in _WHOLE:
            whole.append(f"{name}.")
        if way in _CUT and not isinstance(layer, nn.Linear | nn.Embedding):
            return f"{of}, and it is a {type(layer).__name__}, no linear layer or embedding; {mend}"
        if layer is not module and (not hasattr(module, "lora_B") or getattr(module, "lora_variant", None)):
            return f"{of}, and beside it is an adapter other than plain LoRA; take that, or {mend}"
        side = {"colwise": 0, "rowwise": 1}.get(way)
        if side is not None and isinstance(layer, nn.Linear) and (size := layer.weight.shape[side]) % degree:
            least = math.gcd(size, share) if isinstance(share := heads(model), int) else size
            return f"{of}, and {degree} does not divide its {size} numbers; set tensor to {nearest(degree, least)}"
    plan = plan_of(model, "tp_plan") or {}
    for pattern, name in _named(plan, (name for name, _ in model.named_parameters())):
        if not name.startswith(tuple(whole)):
            return f"layout.tensor: {called}'s tp_plan cuts {name} by {plan[pattern]!r}, and it is no module; {mend}"
    return ""


def nearest(degree: int, number: int) -> int:
    """Return the degree nearest to one that divides a number."""
    return min((found for found in range(1, number + 1) if number % found == 0), key=lambda found: abs(found - degree))


def check_stages(model: nn.Module, ranks: int, each: int) -> None:
    """Raise `TaskFailed` where a pipeline's stages, so many at each rank, are more than the model's `layers`."""
    layers = plan_of(model, "layers") or stages.layers_of(model)
    if not isinstance(layers, int) or not layers or ranks * each <= layers:
        return
    many = f"{ranks} ranks" if each == 1 else f"{ranks} ranks of {each} stages (compute.schedule)"
    mend = f"set it to {layers // each}" if layers >= 2 * each else "set it to 1"
    raise TaskFailed(f"layout.pipeline: {many} for the model's {layers} layers, where each stage has one; {mend}")


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
