"""A model over examples without training it: metrics and answers, in pieces that fit in memory."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from atoll.errors import TaskFailed
from atoll.spec.task import Arrays, Mean, Scores, Task

_PIECE = 4096  # examples in one forward pass


def pieces(examples: Arrays) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the examples in order, as tensors, at most 4,096 at a time."""
    count = len(next(iter(examples.values())))
    for start in range(0, count, _PIECE):
        yield {name: torch.from_numpy(array[start : start + _PIECE]) for name, array in examples.items()}


def evaluate(task: Task, model: torch.nn.Module, examples: Arrays) -> dict[str, Mean | Scores]:
    """Return the task's metrics over all the examples."""
    model.eval()
    found: dict[str, list[Mean | Scores]] = {}
    with torch.inference_mode():
        for piece in pieces(examples):
            for name, metric in task.metrics(model, piece).items():
                found.setdefault(name, []).append(metric)
    return {name: _joined(name, parts) for name, parts in found.items()}


def _joined(name: str, parts: list[Mean | Scores]) -> Mean | Scores:
    means = [part for part in parts if isinstance(part, Mean)]
    scores = [part for part in parts if isinstance(part, Scores)]
    if means and len(means) == len(parts):
        return Mean(sum(float(part.total) for part in means), sum(int(part.count) for part in means))
    if scores and len(scores) == len(parts):
        joined = (np.concatenate([np.asarray(getattr(p, field)) for p in scores]) for field in ("scores", "labels"))
        return Scores(*joined)
    raise TaskFailed(f"metrics: {name!r} is neither a Mean nor Scores; return atoll.Mean(sum, count)")


def predict(task: Task, model: torch.nn.Module, examples: Arrays) -> dict[str, np.ndarray]:
    """Return the task's answers: name -> array with one entry per example."""
    model.eval()
    found: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode():
        for piece in pieces(examples):
            count = len(next(iter(piece.values())))
            for name, answer in _answers(task.predict(model, piece), count).items():
                found.setdefault(name, []).append(answer)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _answers(answers: Mapping[str, object], count: int) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(value) for name, value in answers.items()}
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != count:
            raise TaskFailed(f"predict: {name!r} has shape {list(array.shape)} for {count} examples; give one each")
    return arrays
