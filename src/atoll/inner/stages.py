"""Stages of a transformers model, by the plan that its configuration carries (`base_model_pp_plan`).

A stage is the model's own forward pass, in which parts that another stage has only pass on what they are given. So
embeddings, masks, positions and scores are computed as the model has them.
"""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from atoll.errors import TaskFailed

_LAYERS = "layers"
_TRIED = 8  # tokens, on which stages are held against the whole
_NEAR = 1e-4


def layers_of(model: nn.Module) -> int:
    """Return how many layers stages can be made of; 0 for a model without such a plan, or without what it names."""
    inner, names = _inner(model), _plan(model)
    if _LAYERS not in names or not all(isinstance(getattr(inner, name, None), nn.Module) for name in names):
        return 0
    layers = getattr(inner, _LAYERS)
    return len(layers) if isinstance(layers, nn.ModuleList) else 0


def unsplit(model: nn.Module) -> str:
    """Return why a model that has layers cannot be in stages, "" where it can."""
    kept = {id(value) for value in model.state_dict(keep_vars=True).values()}
    inner, names, heads = _inner(model), list(_plan(model)), _heads(model)
    ends = names[: names.index(_LAYERS)], names[names.index(_LAYERS) + 1 :]
    first, last = ([p for name in end for p in getattr(inner, name).parameters()] for end in ends)
    last += [p for name in heads for p in getattr(model, name).parameters()]
    if not {id(p) for p in first if id(p) in kept} & {id(p) for p in last}:
        return ""
    return (
        f"layout.pipeline: {type(model).__name__}'s embedding and head are one tensor, which the first and the last "
        "stage would both train; set pipeline to 1, or train an adapter (LoRA)"
    )


def split(model: nn.Module, stages: int) -> list[nn.Module]:
    """Return the model as consecutive stages, whose tensors are the model's own and bear the same names.

    Raises `TaskFailed` for one that cannot be in stages. They are held against the whole on a few tokens, for a model
    may do something between its layers that no plan tells.
    """
    if words := unsplit(model):
        raise TaskFailed(words)
    layers = layers_of(model)
    ends = [number * layers // stages for number in range(stages + 1)]
    parts = [_part(model, first, last) for first, last in pairwise(ends)]
    try:
        _hold(model, parts)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise TaskFailed(
            f"layout.pipeline: {type(model).__name__} computes something else in stages ({words}); set pipeline to 1 "
            "and use shard"
        ) from error
    return parts


def begins(stage: nn.Module) -> int:
    """Return at which layer a stage begins; of a whole model, 0."""
    return getattr(stage, "pipeline_begins", 0)


def heads(model: nn.Module) -> list[nn.Module]:
    """Return what the model has beside the layers' module: what makes scores of what the layers give."""
    return [getattr(model, name) for name in _heads(model)]


def answer_of(stage: nn.Module, made: torch.Tensor) -> Any:
    """Return what the model would have answered, from the tensor that its last stage gives."""
    kind = getattr(stage, "pipeline_answer", None)
    return made if kind is None else kind(logits=made)


def tried(model: nn.Module, positions: int) -> torch.Tensor:
    """Return what is given to the model, or to a stage of it, to try it on so many positions of one sequence."""
    if not begins(model):
        return torch.arange(positions)[None]
    width: int = model.pipeline_widths[0]  # pyright: ignore[reportIndexIssue, reportAssignmentType]
    return torch.linspace(-1, 1, positions * width).sin().view(1, positions, width)


def made_of(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return the scores that the model makes of it, or what a stage of it gives."""
    made = model(given) if hasattr(model, "pipeline_answer") else model(input_ids=given, use_cache=False).logits
    return made.float()


class _Elsewhere(nn.Module):
    """Stands for a part of the model that another stage has: it passes on what comes, or what it is ``given``."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        for name, value in vars(of).items():
            if isinstance(value, str | int | float) and not name.startswith("_"):  # what a model asks of its layers
                setattr(self, name, value)
        self.given: torch.Tensor | None = None
        self.came: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        self.came = x
        return x if self.given is None else self.given


def _part(model: nn.Module, first: int, last: int) -> nn.Module:
    """Return the stage of the layers from ``first`` to before ``last``."""
    stage, inner, names = _hollow(model), _hollow(_inner(model)), list(_plan(model))
    at, layers = names.index(_LAYERS), list(getattr(inner, _LAYERS))
    for name in (*(names[:at] if first else ()), *(names[at + 1 :] if last < len(layers) else ())):
        setattr(inner, name, _Elsewhere(getattr(inner, name)))
    for name in _heads(model) if last < len(layers) else ():
        setattr(stage, name, _Elsewhere(getattr(stage, name)))
    chosen = [layer if first <= number < last else _Elsewhere(layer) for number, layer in enumerate(layers)]
    inner.layers = nn.ModuleList(chosen)
    setattr(stage, cast("Any", model).base_model_prefix, inner)
    before = cast("_Elsewhere", chosen[first - 1]) if first else None
    after = cast("_Elsewhere", chosen[last]) if last < len(layers) else None
    kind = type(model)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if before is None:
            made = kind.forward(stage, input_ids=x, use_cache=False)
        else:  # what the model does to embeddings first is done in the first stage, and here in vain
            before.given = x
            made = kind.forward(stage, inputs_embeds=x, use_cache=False)
            before.given = before.came = None
        if after is None:
            return made.logits
        came, after.came = after.came, None
        assert came is not None, "a model calls its layers in turn"
        return came

    stage.forward = forward
    stage.__dict__["pipeline_begins"] = first
    return stage


def _hold(model: nn.Module, parts: list[nn.Module]) -> None:
    """Compare stages with the whole, and tell them what it answers with and the widths of what goes between them."""
    was = model.training
    tokens = torch.arange(_TRIED)[None]
    widths: list[int] = []
    with torch.no_grad():
        whole, x = model.eval()(input_ids=tokens, use_cache=False), tokens
        for part in parts:
            x = part.eval()(x)
            widths.append(x.shape[-1])
    if x.shape != whole.logits.shape or not torch.allclose(x, whole.logits, rtol=_NEAR, atol=_NEAR):
        raise ValueError("other scores than the whole")
    for part in parts:
        part.train(was).__dict__.update(pipeline_widths=(widths[0], widths[-1]), pipeline_answer=type(whole))
    model.train(was)


def _hollow(module: nn.Module) -> nn.Module:
    """Return a copy that has the same parts, and can be given others."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    return made


def _inner(model: nn.Module) -> Any:
    return getattr(model, getattr(model, "base_model_prefix", "") or "-", None)


def _plan(model: nn.Module) -> Mapping[str, object]:
    return getattr(getattr(model, "config", None), "base_model_pp_plan", None) or {}


def _heads(model: nn.Module) -> list[str]:
    """Return the names of what the model has beside the layers' module, as a head."""
    return [name for name in getattr(model, "_pp_plan", None) or {} if isinstance(model._modules.get(name), nn.Module)]
