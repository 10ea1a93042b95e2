"""Private steps by their parts: what is clipped, what noise is added, and who is in a batch."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.made import check_alone
from atoll.inner.private import clipped_sum, put_noised
from atoll.inner.sample import sampled
from atoll.noise import Noise
from atoll.spec.privacy import PrivateSteps


def test_a_gradient_is_clipped_by_example_over_all_tensors_together():
    first = torch.tensor([[3.0, 0.0], [0.3, 0.0], [0.0, 0.0]])
    second = torch.tensor([4.0, 0.4, 0.0])  # with it norms of 5, 0.5 and 0
    sums = clipped_sum([first, second], 2.0)
    assert sums[0].tolist() == pytest.approx([3 * 2 / 5 + 0.3, 0.0], rel=1e-4)
    assert sums[1].item() == pytest.approx(4 * 2 / 5 + 0.4, rel=1e-4)
    alone = clipped_sum([first[:1], second[:1]], 2.0)
    assert math.hypot(*alone[0].tolist(), alone[1].item()) <= 2.0


@pytest.mark.parametrize("size", [1, 1023, 1024, 5000])
def test_a_clipped_gradient_is_within_its_bound_and_close_to_it(size):
    drawn = torch.from_numpy(np.random.default_rng(size).normal(size=(1, size)).astype(np.float32))
    (found,) = clipped_sum([1e6 * drawn], 0.7)
    assert 0.7 * (1 - 1e-4) < found.double().norm() <= 0.7


def test_an_example_whose_gradient_is_not_finite_counts_for_nothing(capsys):
    found = torch.tensor([[1.0, float("nan")], [0.5, 0.25], [float("inf"), 0.0]])
    assert clipped_sum([found], 10.0)[0].tolist() == [0.5, 0.25]
    assert "2 examples have gradients that are not finite" in capsys.readouterr().err


def test_noise_of_its_deviation_is_added_once_to_every_tensor_that_is_trained():
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(2, 2))  # of the second no example has a gradient
    parameters = {name: one for name, one in net.named_parameters() if name != "0.bias"}
    sums = {"0.weight": torch.full((300, 300), 7.0)}
    put_noised(parameters, sums, Noise(0.7 * 3.0), 10.0)
    count = 300 * 300
    found = parameters["0.weight"].grad.double() * 10 - 7.0
    assert abs(found.mean()) < 6 * 2.1 / math.sqrt(count)
    assert abs(found.std() - 2.1) < 6 * 2.1 / math.sqrt(2 * count)
    assert parameters["1.weight"].grad.abs().min() > 0
    assert net[0].bias.grad is None


def test_each_row_is_in_a_batch_with_its_chance_and_no_seed_tells_in_which():
    examples, asked = {"x": np.arange(400)}, PrivateSteps(clip=1.0, multiplier=1.0, sampling=0.3, rows=400)
    batches = [batch["x"] for batch in sampled(examples, 400, asked, 500)]
    share = np.bincount(np.concatenate(batches), minlength=400) / 500
    assert np.abs(share - 0.3).max() < 6 * math.sqrt(0.3 * 0.7 / 500)
    assert np.std([len(batch) for batch in batches]) == pytest.approx(math.sqrt(400 * 0.3 * 0.7), rel=0.25)
    assert not np.array_equal(batches[0], next(sampled(examples, 400, asked, 1))["x"])
    every = asked.model_copy(update={"sampling": 1.0})
    assert len(next(sampled(examples, 400, every, 1))["x"]) == 400


@pytest.mark.parametrize(("count", "rows"), [(399, 400), (800, 400), (400, 399)])
def test_examples_that_are_not_one_of_each_row_are_refused(count, rows):
    asked = PrivateSteps(clip=1.0, multiplier=1.0, sampling=0.3, rows=400)
    with pytest.raises(TaskFailed, match=rf"examples\(\) made {count} examples of 400 rows, and privacy is of a row"):
        next(sampled({"x": np.zeros(count)}, rows, asked, 1))


def test_examples_that_are_made_of_other_rows_too_are_refused():
    whole = np.arange(20.0)
    check_alone({"x": whole, "y": np.full(20, np.nan)}, {"x": whole[:4], "y": np.full(4, np.nan)})
    with pytest.raises(TaskFailed, match="examples: 'x' is another for a row when the others are not there"):
        check_alone({"x": whole - whole.mean()}, {"x": whole[:4] - whole[:4].mean()})
