"""The law of prices: in cases whose order is known, the model of memory and time puts them in that order."""

import itertools

import pytest

from atoll.planner.layouts import choose_layout, unfit
from atoll.planner.price import rank_memory
from atoll.planner.step import step_seconds
from atoll.spec.fleet import Device, ModelShape, Node, Profile
from atoll.spec.job import TrainJob
from atoll.spec.plan import Layout

GB = 10**9
JOB = TrainJob.model_validate(
    {
        "name": "words",
        "purpose": "research",
        "task": {"file": "task.py", "name": "Words"},
        "data": {"dataset": "words"},
        "batch": 32,
        "optimiser": {"kind": "adamw", "rate": 1e-3},
        "compute": {"checkpointing": True},
    }
)
EIGHT = (Node(devices=(Device(memory_bytes=8 * GB),) * 8),)


def model(parameters, layers=24, axes=(), seconds=100.0):
    width = round((parameters / 12 / layers) ** 0.5)
    shape = ModelShape(
        axes=axes,
        layers=layers,
        heads=16,
        positions=256,
        width=width,
        activation_bytes=34 * 4 * 256 * width * layers,
        block_parameters=int(0.95 * parameters),
        tensor_parameters=int(0.97 * parameters),
    )
    return Profile(parameters=parameters, step_seconds=seconds, shape=shape)


def test_a_billion_parameters_are_sharded_over_eight_devices_of_8_gb_and_ten_million_copied():
    assert choose_layout(JOB, EIGHT, model(10**9)).layout == Layout(shard=8)
    spread = choose_layout(JOB, EIGHT, model(10**9, axes=("tensor", "pipeline"))).layout
    assert spread.shard > 1
    assert choose_layout(JOB, EIGHT, model(10**7)).layout == Layout(data=8)
    assert unfit(JOB, EIGHT, model(10**9)) is None


@pytest.mark.parametrize("axis", ["shard", "tensor", "pipeline"])
def test_cutting_a_model_further_takes_no_more_memory(axis):
    held = [rank_memory(model(10**9), JOB, Layout(**{axis: degree})) for degree in (1, 2, 4, 8)]
    assert all(more >= less for more, less in itertools.pairwise(held))
    assert held[0] > 1.5 * held[1]


def test_a_copy_takes_as_much_as_one_rank_but_for_its_examples():
    alone, copies, shards = (rank_memory(model(10**9), JOB, one) for one in (Layout(), Layout(data=8), Layout(shard=8)))
    assert shards < min(copies, alone)
    assert copies - alone < 4 * 10**9, "what is on its way, less the activations of the others' examples"
    assert copies >= 24 * 10**9, "weights, gradient, two moments, start and delta"


def test_copies_are_faster_than_shards_and_shards_of_a_node_than_over_nodes():
    two = (Node(devices=(Device(memory_bytes=8 * GB),) * 4),) * 2
    profile = model(10**8)
    copies, hybrid, shards = (
        step_seconds(profile, one, EIGHT, JOB) for one in (Layout(data=8), Layout(data=2, shard=4), Layout(shard=8))
    )
    assert copies < shards
    assert hybrid < shards, "whose groups are smaller"
    within, across = (step_seconds(profile, Layout(data=2, tensor=4), nodes, JOB) for nodes in (EIGHT, two))
    assert within < across


def test_between_nodes_a_pipeline_says_less_than_tensor_does():
    pair = (Node(devices=(Device(memory_bytes=8 * GB),)),) * 2
    profile = model(10**9, axes=("tensor", "pipeline"))
    job = JOB.model_copy(update={"compute": JOB.compute.model_copy(update={"microbatches": 8})})
    stages, cut = (step_seconds(profile, one, pair, job) for one in (Layout(pipeline=2), Layout(tensor=2)))
    assert stages < cut


def test_more_ranks_than_devices_are_no_faster():
    profile = model(10**8)
    assert step_seconds(profile, Layout(data=16), EIGHT, JOB) >= step_seconds(profile, Layout(data=8), EIGHT, JOB)
