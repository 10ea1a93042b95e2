"""Metrics and answers over examples: joined over pieces, and told when they are none."""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner import evaluate
from atoll.spec.task import Mean, Scores

EXAMPLES = {"x": np.arange(5000, dtype=np.float32)}  # two pieces


class Gives:
    def __init__(self, made):
        self.made = made

    def metrics(self, model, batch):
        return self.made(batch["x"])

    predict = metrics


def test_metrics_of_all_pieces_are_joined():
    def both(x):
        return {"mean": Mean(x.sum(), torch.tensor(len(x))), "auc": Scores(x / 5000, x > 3)}

    found = evaluate.evaluate(Gives(both), nn.Linear(1, 1), EXAMPLES)
    assert found["mean"] == Mean(12497500.0, 5000)
    assert found["auc"].scores.shape == (5000,)
    assert found["auc"].labels.sum() == 4996


def test_answers_of_all_pieces_are_joined():
    found = evaluate.predict(Gives(lambda x: {"x": x, "word": ["a"] * len(x)}), nn.Linear(1, 1), EXAMPLES)
    np.testing.assert_array_equal(found["x"], EXAMPLES["x"])
    assert found["word"].tolist() == ["a"] * 5000


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda x: x.mean(), r"^metrics\(\) returned a Tensor; return a table of name -> atoll.Mean or Scores"),
        (lambda x: {3: Mean(1, 1)}, r"^metrics\(\) returned a dict"),
        (lambda x: {"error": 0.5}, "^metrics: 'error' is neither a Mean nor Scores"),
        (lambda x: {"error": Mean(x, 1)}, "^metrics: 'error' is not made of numbers"),
        (lambda x: {"error": Mean(1.0, 2.5)}, "^metrics: 'error' is not made of numbers"),
        (lambda x: {"error": Mean("many", 2)}, "^metrics: 'error' is not made of numbers"),
        (lambda x: {"error": Mean(1, 1) if len(x) == 4096 else Scores(x, x)}, "^metrics: 'error' is neither"),
    ],
)
def test_metrics_that_are_none_are_told_without_their_values(made, words):
    with pytest.raises(TaskFailed, match=words) as caught:
        evaluate.evaluate(Gives(made), nn.Linear(1, 1), EXAMPLES)
    assert "4095" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda x: x, r"^predict\(\) returned a Tensor"),
        (lambda x: {}, r"^predict\(\) gave no names, or not the same for all examples"),
        (lambda x: {f"x{len(x)}": x}, r"^predict\(\) gave no names, or not the same"),
        (lambda x: {"x": x[:7]}, r"^predict: 'x' has shape \[7\] for 4096 examples; give one each"),
        (lambda x: {"x": x.mean()}, r"^predict: 'x' has shape \[\]"),
        (lambda x: {"x": x.bfloat16()}, "^predict: 'x' is no array; return it .float"),
    ],
)
def test_answers_that_are_none_are_told(made, words):
    with pytest.raises(TaskFailed, match=words):
        evaluate.predict(Gives(made), nn.Linear(1, 1), EXAMPLES)
