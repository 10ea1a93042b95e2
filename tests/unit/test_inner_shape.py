"""What is measured of a model before a plan: its sizes, what an example leaves in memory, and whether a step fits."""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.mesh import Mesh
from atoll.inner.probe import STEPS, measure
from atoll.inner.shape import describe
from atoll.spec.compute import Compute
from atoll.spec.footprint import activations
from atoll.spec.job import Optimiser
from atoll.spec.order import Probe
from atoll.spec.plan import Layout
from atoll.tasks.gpt import GPT, Shape

SHAPE = Shape(vocabulary=11, width=8, layers=3, heads=2, length=6)
ORDER = Probe(seed=0, batch=4, optimiser=Optimiser())


class Words:
    """Learns tokens by a GPT; ``least`` is the fewest examples that its loss takes."""

    def __init__(self, shape=SHAPE, least=1):
        self.shape, self.least, self.steps = shape, least, 0

    def model(self):
        return GPT(self.shape)

    def loss(self, model, batch):
        if len(batch["tokens"]) < self.least:
            raise ValueError("too few to compare")
        self.steps += 1
        made = model(batch["tokens"])
        return nn.functional.cross_entropy(made.flatten(0, 1), batch["tokens"].flatten())


class Line:
    """Fits a line, in a model without a plan or a list."""

    def model(self):
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))

    def loss(self, model, batch):
        return model(batch["x"]).square().mean()


def tokens(count=4):
    return {"tokens": np.arange(count * 6).reshape(count, 6) % 11}


def described(task, batch):
    given = {name: torch.as_tensor(values) for name, values in batch.items()}
    return describe(task, task.model(), given, seed=0)


def measured(task, batch=None, **more):
    batch = batch or tokens()
    return measure(task, ORDER, Mesh(), Compute(), batch, [batch] * STEPS, **more)


def test_a_gpt_tells_all_that_a_layout_must_divide():
    shape = described(Words(), tokens()).shape
    model = GPT(SHAPE)
    assert shape.axes == ("tensor", "context", "pipeline")
    assert (shape.layers, shape.heads, shape.experts, shape.positions, shape.width) == (3, 2, 0, 6, 8)
    assert shape.block_parameters == sum(p.numel() for p in model.blocks.parameters())
    norms_and_embedding = sum(p.numel() for name, p in model.named_parameters() if "embed" in name or p.ndim == 1)
    assert shape.tensor_parameters == sum(p.numel() for p in model.parameters()) - norms_and_embedding


def test_a_mixture_tells_its_experts():
    task = Words(Shape(vocabulary=11, width=8, layers=2, heads=2, length=6, experts=4))
    shape = described(task, tokens()).shape
    assert ("expert" in shape.axes, shape.experts, shape.expert_parameters) == (True, 4, 2 * 4 * 2 * 8 * 32)


def test_a_model_without_plans_or_lists_has_none():
    shape = described(Line(), {"x": np.ones((4, 3), np.float32)}).shape
    assert (shape.axes, shape.layers, shape.heads, shape.block_parameters, shape.positions) == ((), 0, 0, 0, 0)
    assert shape.activation_bytes >= 4 * (3 + 5 + 5), "the input of each layer"


def test_activations_are_those_of_an_example_and_grow_with_the_layers():
    few, twice = (described(Words(Shape(11, 8, layers, 2, 6)), tokens()).shape for layers in (3, 6))
    block = (twice.activation_bytes - few.activation_bytes) / 3
    between = 4 * 6 * 8
    assert 10 * between < block < 40 * between, "a block keeps some 34 numbers for each one that passes it"
    assert described(Words(), tokens(8)).shape == described(Words(), tokens(4)).shape
    less = activations(few, Layout(), Compute(checkpointing=True), 1)
    assert less < activations(few, Layout(), Compute(), 1) == few.activation_bytes


def test_a_loss_that_takes_no_two_examples_leaves_activations_untold_and_is_timed_all_the_same():
    profile = measured(Words(least=4))
    assert (profile.shape.activation_bytes, profile.shape.heads, profile.memory_bytes > 0) == (0, 2, True)


def test_what_fits_is_stepped_and_what_does_not_is_only_passed():
    fits, task = measured(Words(), memory=1 << 30), Words()
    held = 4 * fits.parameters
    too_big = measured(task, memory=held + 100)
    assert fits.memory_bytes > 0
    assert (too_big.memory_bytes, task.steps) == (0, 1)
    assert too_big.step_seconds > 0
    assert too_big.shape == fits.shape


def test_a_model_whose_weights_alone_do_not_fit_is_not_built_to_its_end():
    with pytest.raises(TaskFailed, match=r"^model\(\) has more than 2e-06 GB of weights, the memory of a device here"):
        measured(Words(), memory=2000)
    assert measured(Words()).parameters == sum(p.numel() for p in GPT(SHAPE).parameters()), "and the limit is gone"
