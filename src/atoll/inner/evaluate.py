"""A model over examples without training it: metrics and answers, in pieces that fit in memory."""

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from atoll.errors import TaskFailed
from atoll.inner import chance
from atoll.inner.made import count, tensors
from atoll.spec.task import Arrays, Mean, Scores, Task

_PIECE = 4096  # examples in one forward pass
Mode = type[torch.inference_mode] | type[torch.no_grad]


def evaluate(
    task: Task, model: torch.nn.Module, examples: Arrays, mode: Mode = torch.inference_mode
) -> dict[str, Mean | Scores]:
    """Return the task's metrics over all the examples."""
    model.eval()
    chance.seed(0)
    with mode():
        return joined_metrics(task.metrics(model, piece) for piece in pieces(examples))


def predict(
    task: Task, model: torch.nn.Module, examples: Arrays, mode: Mode = torch.inference_mode
) -> dict[str, np.ndarray]:
    """Return the task's answers: name -> array with one entry per example."""
    model.eval()
    chance.seed(0)
    with mode():
        return joined_answers((task.predict(model, piece), count(piece)) for piece in pieces(examples))


def pieces(examples: Arrays) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the examples in order, as tensors, at most 4,096 at a time."""
    for start in range(0, count(examples), _PIECE):
        yield tensors({name: array[start : start + _PIECE] for name, array in examples.items()})


def joined_metrics(made: Iterable[object]) -> dict[str, Mean | Scores]:
    """Join what `metrics` returned for piece after piece, as they are made; `TaskFailed` for what are no metrics."""
    found: dict[str, list[Mean | Scores]] = {}
    for piece in made:
        for name, metric in _table(piece, "metrics", "atoll.Mean or Scores").items():
            found.setdefault(name, []).append(metric)
    return {name: _joined(name, parts) for name, parts in found.items()}


def joined_answers(made: Iterable[tuple[object, int]]) -> dict[str, np.ndarray]:
    """Join what `predict` returned for piece after piece of so many examples; `TaskFailed` unless each has one."""
    found: list[dict[str, np.ndarray]] = []
    for piece, expected in made:
        table = _table(piece, "predict", "one entry per example")
        found.append({name: _answers(name, value, expected) for name, value in table.items()})
    if len({tuple(sorted(piece)) for piece in found}) > 1 or not found[0]:
        raise TaskFailed(
            "predict() gave no names, or not the same for all examples; give at least one, always the same"
        )
    return {name: np.concatenate([piece[name] for piece in found]) for name in found[0]}


def _joined(name: str, parts: list[Mean | Scores]) -> Mean | Scores:
    called = f"metrics: {name[:40]!r}"
    means = [part for part in parts if isinstance(part, Mean)]
    scores = [part for part in parts if isinstance(part, Scores)]
    try:
        if means and len(means) == len(parts):
            total, number = sum(float(part.total) for part in means), sum(operator.index(part.count) for part in means)
            return Mean(total, number, means[0].power)
        if scores and len(scores) == len(parts):
            joined = (np.concatenate([np.asarray(getattr(p, field)) for p in scores]) for field in ("scores", "labels"))
            return Scores(*joined)
    except (TypeError, ValueError, RuntimeError):  # what it says may quote an example's values
        raise TaskFailed(
            f"{called} is not made of numbers; give Mean(sum, whole count), or Scores of two flat arrays"
        ) from None
    raise TaskFailed(f"{called} is neither a Mean nor Scores; return atoll.Mean(sum, count)")


def _answers(name: str, value: object, expected: int) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor on an accelerator, or of a kind that numpy does not have
        raise TaskFailed(
            f"predict: {name[:40]!r} is no array; return it .float().cpu(), or as a list of texts"
        ) from None
    if array.ndim == 0 or len(array) != expected:
        shape = list(array.shape)
        raise TaskFailed(f"predict: {name[:40]!r} has shape {shape} for {expected} examples; give one each")
    return array


def _table(made: object, method: str, of: str) -> Mapping[str, Any]:
    if not isinstance(made, Mapping) or not all(isinstance(name, str) for name in made):
        raise TaskFailed(f"{method}() returned a {type(made).__name__}; return a table of name -> {of}")
    return made
