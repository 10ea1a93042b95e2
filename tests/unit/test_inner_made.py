"""What a task makes: every model or examples that cannot be used ends in one sentence with the mend."""

import random
from collections import OrderedDict

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.made import make_examples, make_model
from atoll.spec.task import Rows

ROWS = Rows(pa.table({"x": [1.0, 2.0]}))


class Makes:
    """A task whose model and examples are what it was given, or what calling that gives."""

    def __init__(self, made):
        self.made = made

    def model(self):
        return self.made() if callable(self.made) and not isinstance(self.made, nn.Module) else self.made

    def examples(self, rows):
        return self.made() if callable(self.made) else self.made


def frozen():
    return nn.Linear(2, 1).requires_grad_(False)


def with_buffer(buffer):
    model = nn.Linear(2, 1)
    model.register_buffer("extra", buffer)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (None, "model() returned a NoneType; return a torch.nn.Module"),
        (nn.ReLU(), "model() has no parameter to train; give it one with requires_grad=True"),
        (frozen, "model() has no parameter to train"),
        (lambda: nn.Linear(0, 0, bias=False), "model() has no parameter to train"),
        (lambda: nn.Linear(2, 1).double(), "tensor 'weight' is torch.float64; weights travel as float32"),
        (lambda: with_buffer(torch.zeros(2, dtype=torch.complex64)), "tensor 'extra' is torch.complex64"),
        (lambda: with_buffer(torch.zeros(2, dtype=torch.float64)), "tensor 'extra' is torch.float64"),
        (lambda: with_buffer(torch.zeros([1] * 17)), "tensor 'extra' has 17 dimensions; reshape it to 16"),
        (lambda: nn.LazyLinear(2), "tensor 'weight' has no values yet; give its module all its sizes"),
        (lambda: nn.Linear(2, 1, device="meta"), "tensor 'weight' has no values yet"),
        (lambda: nn.Sequential(OrderedDict({"Größe": nn.Linear(1, 1)})), "tensor 'Größe.weight' cannot travel"),
        (lambda: nn.Sequential(OrderedDict({"a" * 122: nn.Linear(1, 1)})), "cannot travel under that name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules")
def test_a_model_that_cannot_be_trained_or_travel_is_told(model, words):
    with pytest.raises(TaskFailed) as caught:
        make_model(Makes(model), 0)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_half_precision_tied_and_frozen_parameters_are_taken():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).requires_grad_(False))
    model[2].weight = model[0].weight
    assert make_model(Makes(model), 0) is model


def test_a_models_first_weights_are_a_function_of_the_seed_whatever_they_are_drawn_from():
    def drawn():
        model = nn.Linear(1, 3)
        with torch.no_grad():
            model.bias.copy_(torch.tensor([np.random.normal(), random.random(), torch.randn(()).item()]))
        return model

    first, again, other = (make_model(Makes(drawn), seed).bias.tolist() for seed in (5, 5, 2**80))
    assert first == again
    assert all(mine != theirs for mine, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([np.zeros(2)], "examples() returned a list; return a table of name -> numpy array"),
        ({}, "examples() returned arrays of lengths {}; give at least one"),
        ({"x": np.zeros(2), "y": np.zeros(3)}, "arrays of lengths {'x': 2, 'y': 3}"),
        ({"x": np.zeros((0, 4))}, "examples() returned no examples"),
        ({"x": np.float32(3)}, "examples: 'x' is one value"),
        ({3: np.zeros(2)}, "examples() has a int for an array's name"),
        ({"x": [[1], [1, 2]]}, "examples: 'x' is no array of one shape; pad its rows"),
        ({"x": np.array([1, None])}, "examples: 'x' is an array of Python objects; turn it into numbers"),
        ({"x": np.array(["yes", "no"])}, "examples: 'x' is an array of text"),
        ({"x": np.array(["2026-01-01"], "datetime64[s]")}, "examples: 'x' is an array of dates"),
        ({"x": np.zeros(2, [("a", int)])}, "examples: 'x' is an array of records"),
    ],
)
def test_examples_that_are_no_numbers_are_told(examples, words):
    with pytest.raises(TaskFailed) as caught:
        make_examples(Makes(examples), ROWS, 0)
    assert words in str(caught.value)


def test_arrays_become_what_torch_takes():
    locked = np.arange(4, dtype=np.float32)
    locked.flags.writeable = False
    made = {
        "wide": np.array([0.1, np.nan, 3, 4]),
        "locked": locked,
        "turned": np.arange(8).reshape(2, 4).T,
        "foreign": np.arange(4, dtype=">i4"),
        "flags": np.array([True, False, True, True]),
        "tensor": torch.ones(4, 2),
    }
    tensors = {name: torch.from_numpy(array) for name, array in make_examples(Makes(made), ROWS, 0).items()}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "wide": torch.float32,
        "locked": torch.float32,
        "turned": torch.int64,
        "foreign": torch.int32,
        "flags": torch.bool,
        "tensor": torch.float32,
    }
    assert tensors["turned"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert tensors["foreign"].tolist() == [0, 1, 2, 3]
    tensors["locked"] += 1
    assert locked.tolist() == [0, 1, 2, 3]


def test_examples_are_a_function_of_the_seed():
    task = Makes(lambda: {"x": np.random.normal(size=3)})
    first, again, other = (make_examples(task, ROWS, seed)["x"].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other
