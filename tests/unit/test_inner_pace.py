"""What a rank measures of its steps: its own seconds, rates, and operations by stated formulae."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from atoll.inner.clock import Stopwatch
from atoll.inner.flops import Demand, Load, demand, known_peak, load_of, peak_flops
from atoll.inner.mesh import Mesh
from atoll.inner.optimiser import make
from atoll.inner.pace import Meter
from atoll.inner.parallelize import parallelize
from atoll.inner.steps import Start, Step, training_steps
from atoll.spec.job import Optimiser
from atoll.tasks.gpt import GPT, Shape

SHAPE = Shape(vocabulary=11, width=8, layers=3, heads=2, length=6)
CPU = torch.device("cpu")


@pytest.fixture
def told(tmp_path):
    """What the kernel tells of a thread: it ran for a millisecond, and was ready for none."""
    path = tmp_path / "schedstat"
    path.write_text("1000000 0 1\n")
    return path


def test_what_a_thread_sleeps_is_not_its_own_and_what_it_computes_is(told):
    with Stopwatch(str(told)) as own:
        ran, began = time.thread_time(), own.seconds()
        time.sleep(0.05)
        while time.thread_time() < ran + 0.01:
            pass
        assert 0 < own.seconds() - began <= time.thread_time() - ran


def test_what_a_thread_stands_ready_for_a_busy_core_is_its_own(told):
    with Stopwatch(str(told)) as own:
        ran, before = time.thread_time(), own.seconds()
        told.write_text("1000000 2500000000 7\n")
        found = own.seconds() - before
        assert 2.5 <= found <= 2.5 + time.thread_time() - ran


def test_a_kernel_that_does_not_tell_leaves_what_the_thread_ran(tmp_path):
    with Stopwatch(str(tmp_path / "none")) as own:
        before = time.thread_time()
        assert before <= own.seconds() <= time.thread_time()


def test_this_machines_kernel_is_understood():
    with Stopwatch() as own:
        assert own.seconds() >= time.thread_time() - 1


def batch(**arrays):
    return {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in arrays.items()}


@pytest.mark.parametrize(
    ("arrays", "load"),
    [
        ({"x": ((4, 7), torch.float32), "y": ((4,), torch.int64)}, Load(4, None, 1, True)),
        ({"x": ((4, 3, 9, 9), torch.float32), "y": ((4,), torch.int64)}, Load(4, None, 1, False)),
        ({"tokens": ((4, 7), torch.int32), "mask": ((4, 7), torch.bool)}, Load(4, 28, 7, True)),
        ({"tokens": ((2, 7), torch.int64), "kinds": ((2, 2), torch.int64)}, Load(2, 14, 7, True)),
    ],
)
def test_a_batchs_tokens_are_its_largest_array_of_integers_with_two_dimensions(arrays, load):
    assert load_of(batch(**arrays)) == load


def test_a_dense_gpt_takes_six_operations_a_parameter_and_twelve_for_each_layer_width_and_position():
    model = GPT(SHAPE)
    looked_up = sum(p.numel() for p in model.embed.parameters())
    found = demand(model)
    assert found.token == 6 * (sum(p.numel() for p in model.parameters()) - looked_up)
    assert found.position == 12 * 3 * 8
    assert found.of(Load(2, 10, 5, True)) == 10 * (found.token + 5 * found.position)


def test_a_table_that_is_the_head_too_is_multiplied_with():
    model = GPT(SHAPE)
    apart = demand(model).token
    model.head.weight = model.embed.token.weight
    assert demand(model).token == apart


def test_what_is_not_trained_takes_four():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[0].weight.requires_grad_(False)
    assert demand(model).of(Load(5, None, 1, True)) == 5 * (4 * 12 + 6 * 8)
    assert demand(model).of(Load(5, None, 1, False)) is None


def test_of_a_mixture_the_experts_count_that_a_token_goes_to():
    dense, sparse = GPT(SHAPE), GPT(replace(SHAPE, experts=4, chosen=2))
    expert = 2 * 8 * 32
    router = 8 * 4
    assert demand(sparse).token == demand(dense).token + 6 * 3 * (expert + router)


def test_peaks_are_known_by_name_and_a_part_of_a_device_has_none():
    assert known_peak("NVIDIA H200", "bfloat16") == 989.4e12
    assert known_peak("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert known_peak("NVIDIA A10", "bfloat16") == 125e12
    assert known_peak("Tesla V100-SXM2-16GB", "bfloat16") is None
    assert known_peak("NVIDIA A10G", "bfloat16") is None
    assert known_peak("NVIDIA H200 MIG 1g.18gb", "bfloat16") is None


def test_a_processors_peak_is_measured_once_and_draws_nothing():
    before = torch.get_rng_state()
    first = peak_flops(CPU, "float32")
    assert first is not None
    assert first > 1e8
    assert peak_flops(CPU, "float32") == first
    assert torch.equal(torch.get_rng_state(), before)


class Line:
    def loss(self, model, batch):
        return model(batch["x"]).square().mean()


def test_each_step_tells_its_own_seconds_and_share():
    model = nn.Linear(2, 1)
    sgd = make(Optimiser(kind="sgd", rate=0.1), model)
    batches = [{"x": torch.ones(4, 2)}, {"x": torch.ones(3, 2)}]
    steps = list(training_steps(Line(), parallelize(model, Mesh()), sgd, batches, Start(seed=0)))
    assert [step.load for step in steps] == [Load(4, None, 1, True), Load(3, None, 1, True)]
    assert all(0 < step.seconds < 10 for step in steps)


def metered(mesh, seconds, load, count):
    """Return the pace after `count` steps that end one second apart."""
    now = [100.0]
    meter = Meter(mesh, Demand(10.0, 1.0, torch.device("meta")), clock=lambda: now[0])
    assert meter.pace().steps == 0
    for number in range(count):
        now[0] += 5.0 if number == 0 else 1.0
        meter.step(Step(number, 0.5 + number, 2 * load.examples, seconds=seconds[number], load=load))
    return meter.pace()


def test_a_pace_is_of_the_newest_steps_but_the_first():
    pace = metered(Mesh(), [9.0, 0.2, 0.4, 0.3], Load(4, 12, 3, True), 4)
    assert (pace.steps, pace.examples_per_second, pace.tokens_per_second) == (3, 4.0, 12.0)
    assert pace.step_seconds == (0.3,)
    assert pace.flops_per_second == 12 * (10 + 3)
    assert pace.mfu is None
    assert pace.loss == pytest.approx(2.0)
    assert pace.memory_peak_bytes >= pace.memory_bytes > 1 << 20
    assert len(pace.nodes) == 1


def test_a_single_step_is_better_than_none():
    pace = metered(Mesh(), [0.5], Load(4, None, 1, True), 1)
    assert (pace.steps, pace.examples_per_second, pace.tokens_per_second) == (1, 0.8, None)
    assert pace.step_seconds == (0.5,)


def test_one_rank_of_a_share_tells_its_examples_and_each_its_own_operations():
    silent = type("Silent", (), {"speaks": False, "device": None, "layout": None})()
    pace = metered(silent, [0.1] * 3, Load(4, 12, 3, True), 3)
    assert (pace.examples_per_second, pace.tokens_per_second) == (0.0, 0.0)
    assert pace.flops_per_second == 12 * (10 + 3)


def test_a_task_that_steps_by_itself_is_timed_as_a_whole():
    now = [100.0]
    meter = Meter(Mesh(), None, clock=lambda: now[0])
    now[0] += 4.0
    meter.step(Step(9, 0.5, 40))
    pace = meter.pace()
    assert (pace.steps, pace.examples_per_second, pace.step_seconds) == (10, 10.0, (0.4,))
    assert pace.flops_per_second is None
