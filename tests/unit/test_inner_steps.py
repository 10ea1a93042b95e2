"""The loop: each step's random numbers and each wrong loss's sentence are functions of the step of the run."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.alike import digest
from atoll.inner.mesh import Mesh
from atoll.inner.optimiser import make
from atoll.inner.parallelize import parallelize
from atoll.inner.steps import Pull, Start, training_steps
from atoll.spec.job import Optimiser


class Line:
    """Fits a line; ``loss`` makes something else of the loss at step ``at`` (of those it has seen)."""

    def __init__(self, loss=lambda value: value, at=0):
        self.spoil, self.at, self.seen = loss, at, 0
        self.drawn = []

    def loss(self, model, batch):
        self.drawn.append((random.random(), np.random.normal(), torch.randn(()).item()))
        value = (model(batch["x"]) - 1).square().mean()
        self.seen += 1
        return self.spoil(value) if self.seen == self.at + 1 else value


def steps(task, count=3, start=None, x=1.0):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    sgd = make(Optimiser(kind="sgd", rate=0.1), model)
    batches = [{"x": torch.full((4, 1), x), "index": torch.arange(4)} for _ in range(count)]
    return list(training_steps(task, parallelize(model, Mesh()), sgd, batches, start or Start(seed=0)))


def test_steps_are_numbered_within_the_round():
    assert [step.number for step in steps(Line(), start=Start(seed=0, done=20, first=4))] == [4, 5, 6]


def test_what_user_code_draws_is_a_function_of_seed_and_step_of_the_run():
    whole, later, round_two, other = Line(), Line(), Line(), Line()
    steps(whole, 4)
    steps(later, 2, Start(seed=0, first=2))
    steps(round_two, 3, Start(seed=0, done=1))
    steps(other, 4, Start(seed=1))
    assert later.drawn == whole.drawn[2:]
    assert round_two.drawn == whole.drawn[1:]
    assert len({*whole.drawn, *other.drawn}) == 8


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda value: value.item(), "is float; return the mean over the batch, a scalar tensor"),
        (lambda value: None, "is NoneType; return the mean"),
        (lambda value: value.reshape(1), r"is a tensor of shape \[1\]"),
        (lambda value: value.detach(), "does not depend on the model's parameters; compute it from the model"),
        (lambda value: torch.tensor(3), "is torch.int64; return a floating point tensor"),
    ],
)
def test_a_loss_that_cannot_be_used_is_told_with_the_step_of_the_run(loss, words):
    with pytest.raises(TaskFailed, match=rf"^loss at step 23 of the run {words}"):
        steps(Line(loss, at=1), start=Start(seed=0, done=20, first=1))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_is_told_with_its_value(value):
    with pytest.raises(TaskFailed) as caught:
        steps(Line(lambda loss: loss + float(value), at=2), start=Start(seed=0, done=20))
    assert str(caught.value) == (
        f"loss is {value} at step 23 of the run; lower the optimiser's rate or look at the data"
    )


def test_examples_that_are_not_finite_are_named():
    with pytest.raises(
        TaskFailed, match=r"^loss is nan at step 1 of the run; 'x' holds values that are not finite: fill"
    ):
        steps(Line(), x=float("nan"))


def test_a_proximal_term_pulls_what_is_exchanged_to_where_it_was_and_leaves_what_stays_alone():
    model = nn.Linear(2, 1)
    pull = Pull.from_here(model, 0.5, personal={"bias"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2.0)
            parameter.grad = torch.zeros_like(parameter)
    pull.apply()
    assert model.weight.grad.tolist() == [[1.0, 1.0]]
    assert model.bias.grad.tolist() == [0.0]


def test_a_loss_that_is_not_finite_names_the_last_checkpoints_step():
    with pytest.raises(TaskFailed, match=r"step 23 of the run, and the last good checkpoint is of step 20; lower"):
        steps(Line(lambda loss: loss * float("nan"), at=2), start=Start(seed=0, done=20, kept=lambda: 20))


def test_a_digest_of_examples_is_of_their_values_order_and_form():
    made = {"x": np.arange(12.0, dtype=np.float32).reshape(4, 3), "y": np.array([True, False, True, False])}
    others = [
        {**made, "x": made["x"][::-1]},
        {**made, "x": made["x"].reshape(4, 1, 3)},
        {**made, "x": made["x"].astype(np.int64)},
        {**made, "y": ~made["y"]},
        {name: array[:3] for name, array in made.items()},
        {"x": made["x"]},
    ]
    assert digest(dict(reversed(made.items()))) == digest(made)
    assert len({digest(made), *map(digest, others)}) == 7
