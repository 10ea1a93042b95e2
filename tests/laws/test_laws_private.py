"""Private steps are plain ones where nothing is clipped and no noise is added, and each example stands for itself."""

import math

import pytest
import torch
from torch import nn

from atoll.errors import Invalid
from atoll.inner.mesh import Mesh
from atoll.inner.optimiser import make
from atoll.inner.parallelize import parallelize
from atoll.inner.private import by_example, gradients
from atoll.inner.steps import Start, training_steps
from atoll.policy.private import private_steps
from atoll.spec.compute import Compute
from atoll.spec.job import Optimiser, parse_job
from atoll.spec.privacy import PrivateSteps
from tests.private import ROWS, Line, Own, data, made, part, stepped, without_noise


@pytest.mark.parametrize("model", [None, Own])
def test_each_examples_gradient_is_that_of_the_example_alone(model):
    net = made(model)
    with by_example(net):
        loss, found = gradients(Line(), net, part(slice(0, 4)))
    assert loss == pytest.approx(Line().loss(net, part(slice(0, 4))).item())
    for row in range(4):
        net.zero_grad()
        Line().loss(net, part(slice(row, row + 1))).backward()
        for name, parameter in net.named_parameters():
            assert torch.allclose(found[name][row], parameter.grad, rtol=1e-4, atol=1e-6)


def test_without_noise_and_with_a_wide_clip_the_steps_are_those_of_sgd_over_the_same_examples():
    batches = [part(slice(0, 10)), part(slice(7, 17)), part(slice(30, 40))]  # as many as one expects
    private, plain = made(), made()
    stepped(private, batches, without_noise(clip=1e6))
    sgd = make(Optimiser(kind="sgd", rate=0.1), plain)
    list(training_steps(Line(), parallelize(plain, Mesh()), sgd, batches, Start(seed=0)))
    for one, other in zip(private.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_sum_is_divided_by_how_many_examples_one_expects_and_a_large_batch_is_taken_in_pieces():
    whole, halves = made(), made()
    stepped(whole, [data()], without_noise(clip=1e6))  # 50 where 10 are expected
    many = PrivateSteps(clip=1e6, multiplier=1.0, sampling=1.0, rows=ROWS)
    stepped(halves, [data()], many.model_copy(update={"multiplier": 0.0}))
    start = made()
    moved = [one - other for one, other in zip(whole.parameters(), start.parameters(), strict=True)]
    once = [one - other for one, other in zip(halves.parameters(), start.parameters(), strict=True)]
    for one, other in zip(moved, once, strict=True):
        assert torch.allclose(one, 5 * other, rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing_but_memory():
    one, many = made(), made()
    stepped(one, [data()], without_noise())
    stepped(many, [data()], without_noise(), compute=Compute(microbatches=7))
    for first, second in zip(one.parameters(), many.parameters(), strict=True):
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-7)


def test_a_step_over_pieces_has_noise_once():
    net, batch = nn.Linear(200, 1, bias=False), {"x": torch.zeros(100, 200), "y": torch.zeros(100)}
    asked = PrivateSteps(clip=0.5, multiplier=2.0, sampling=0.01, rows=1000)  # 10 expected, so in five pieces
    before = net.weight.detach().clone()
    stepped(net, [batch] * 50, asked)
    found = (net.weight.detach() - before) / 0.1 * 10  # the sum of 50 draws, each of deviation 2.0 * 0.5
    assert abs(found.std() - math.sqrt(50)) < 6 * math.sqrt(50) / math.sqrt(2 * 200)


def job(batch=10, **privacy):
    fields = {"kind": "train", "name": "net", "purpose": "care", "task": {"file": "task.py", "name": "Net"}}
    return parse_job({**fields, "data": {"dataset": "rows"}, "steps": 30, "batch": batch, "privacy": privacy}, "job")


def test_the_noise_that_is_found_for_an_epsilon_costs_that_epsilon():
    steps, guarantee = private_steps(job(epsilon=2.0, delta=1e-3, clip=0.5, accountant="rdp"), ROWS)
    assert 1.99 < guarantee.epsilon <= 2.0
    assert (steps.clip, steps.sampling, steps.rows, steps.expected) == (0.5, 0.2, ROWS, 10)
    given, again = private_steps(job(noise=steps.multiplier, delta=1e-3, clip=0.5, accountant="rdp"), ROWS)
    assert (given, again) == (steps, guarantee)


def test_a_batch_as_large_as_the_rows_has_all_of_them_and_no_amplification():
    steps, guarantee = private_steps(job(batch=99, noise=2.0, delta=1e-3, accountant="rdp"), ROWS)
    assert (steps.sampling, guarantee.mechanism.sampling) == (1.0, 1.0)
    assert private_steps(job(noise=2.0, delta=1e-3, accountant="rdp"), ROWS)[1].epsilon < guarantee.epsilon


def test_a_delta_that_lets_a_row_be_told_whole_is_refused():
    with pytest.raises(Invalid, match=r"^privacy.delta: 0.02: must be below one over the 50 rows here"):
        private_steps(job(noise=2.0, delta=0.02), ROWS)
