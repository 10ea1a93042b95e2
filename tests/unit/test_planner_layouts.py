"""How a site's ranks come to share a model: what is offered, what fits, what is taken, and the mend where none fits."""

import re
from typing import Any

import pytest

from atoll.planner.layouts import candidates, choose_layout, degrees, unfit
from atoll.planner.step import NODE_BANDWIDTH, START_SECONDS, step_seconds
from atoll.spec.compute import Compute
from atoll.spec.fleet import Device, ModelShape, Node, Profile
from atoll.spec.footprint import activations, kept, micro_batches, step_bytes
from atoll.spec.job import Optimiser, TrainJob
from atoll.spec.plan import Layout

GB = 10**9


def train(**fields: Any) -> TrainJob:
    known = {"name": "words", "purpose": "research", "task": {"file": "task.py", "name": "Words"}, "batch": 32}
    known |= {"data": {"dataset": "words"}, "optimiser": {"kind": "adamw", "rate": 1e-3}}
    return TrainJob.model_validate({**known, **fields})


def machines(devices: int, memory: int = 8 * GB, nodes: int = 1) -> tuple[Node, ...]:
    return (Node(devices=(Device(memory_bytes=memory),) * devices),) * nodes


def gpt(parameters: int, layers: int = 24, heads: int = 16, seconds: float = 10.0, **more: Any) -> Profile:
    """A transformer of about this size, with 512 positions and all plans."""
    width = round((parameters / 12 / layers) ** 0.5)
    shape = ModelShape(
        axes=("tensor", "context", "pipeline"),
        layers=layers,
        heads=heads,
        positions=512,
        width=width,
        activation_bytes=34 * 4 * 512 * width * layers,
        block_parameters=int(0.9 * parameters),
        tensor_parameters=int(0.95 * parameters),
    )
    return Profile(parameters=parameters, step_seconds=seconds, shape=shape.model_copy(update=more))


def taken(job: TrainJob, nodes: tuple[Node, ...], profile: Profile) -> Layout:
    return choose_layout(job, nodes, profile).layout


def test_degrees_that_are_tried_are_few_and_reach_the_most():
    assert degrees(1) == [1]
    assert degrees(6) == [1, 2, 3, 4, 6]
    assert degrees(24) == [1, 2, 3, 4, 8, 16, 24]


def test_copies_come_first_and_a_plan_brings_its_degrees():
    found = candidates(train(), machines(4), gpt(1000))
    assert [layout for layout in found if layout.plain] == [Layout(data=n) for n in (1, 2, 3, 4)] == list(found[:4])
    assert {Layout(shard=4), Layout(data=2, shard=2), Layout(tensor=2, shard=2), Layout(tensor=4)} <= set(found)
    assert Layout(tensor=3) not in found, "which does not divide 16 heads"
    assert all(layout.pipeline == 1 for layout in found), "stages are for several nodes"
    assert len(set(found)) == len(found)
    assert max(layout.ranks for layout in found) == 4


def test_pipelines_are_for_several_nodes_and_need_layers_and_equal_micro_batches():
    found = candidates(train(), machines(2, nodes=2), gpt(1000))
    assert {Layout(pipeline=2), Layout(pipeline=2, shard=2), Layout(pipeline=2, tensor=2)} <= set(found)
    assert not any(layout.pipeline > 1 for layout in candidates(train(batch=7), machines(2, nodes=2), gpt(1000)))
    assert not any(one.pipeline > 1 for one in candidates(train(), machines(2, nodes=2), gpt(1000, layers=1)))
    local = train(sync={"preset": "fedavg", "keep_local": ["head*"]})
    assert not any(one.pipeline > 1 for one in candidates(local, machines(2, nodes=2), gpt(1000)))


def test_a_model_without_plans_is_copied_or_sharded_and_arrays_have_one_rank():
    plain = Profile(parameters=1000, step_seconds=1)
    assert {(one.tensor, one.pipeline) for one in candidates(train(), machines(4, nodes=2), plain)} == {(1, 1)}
    arrays = Profile(parameters=1000, step_seconds=1, gradients=False)
    assert candidates(train(), machines(4), arrays) == (Layout(),)


def test_a_batch_bounds_the_shares_it_is_cut_into():
    assert max(layout.shares for layout in candidates(train(batch=3), machines(8), gpt(1000))) == 3


def test_a_small_model_is_copied_and_one_that_fits_no_device_is_sharded():
    small, job = taken(train(), machines(8), gpt(10_000_000)), train(compute={"checkpointing": True})
    assert small.plain
    large = choose_layout(job, machines(8), gpt(10**9, seconds=100))
    assert not large.layout.plain
    assert large.layout.shard > 1
    copies = [words for layout, words in large.too_big if layout.plain]
    assert copies[1].startswith("data 2: needs 3")
    assert copies[1].endswith("GB a rank where a device has 8 GB")


def test_more_copies_may_fit_where_fewer_do_not_for_each_has_fewer_examples():
    profile = gpt(100_000_000, layers=12)
    choice = choose_layout(train(batch=32), machines(8, memory=16 * GB), profile)
    assert choice.layout == Layout(data=8)
    assert "1 rank" in choice.too_big[0][1]


def test_a_pinned_layout_is_taken_whatever_it_costs():
    assert taken(train(layout={"shard": 2}), machines(8), gpt(1000)) == Layout(shard=2)


def test_ranks_keep_their_part_of_a_model():
    profile = gpt(1000, layers=10, block_parameters=900, tensor_parameters=800)
    assert [kept(profile, Layout(shard=n)) for n in (1, 2, 4)] == [1000, 500, 250]
    assert kept(profile, Layout(tensor=4)) == 200 + 200
    assert kept(profile, Layout(pipeline=2)) == 450 + 100, "the fullest stage is told to have all that is in no block"
    assert kept(profile, Layout(pipeline=3)) == 360 + 100, "and 4 of 10 layers"
    mixture = gpt(1000, tensor_parameters=300, expert_parameters=600, experts=4)
    assert kept(mixture, Layout(expert=2)) == 100 + 300 + 300


@pytest.mark.parametrize(
    ("layout", "compute", "share"),
    [
        ({}, {}, 32),
        ({"data": 4}, {}, 8),
        ({"shard": 2, "context": 2}, {}, 8),
        ({}, {"microbatches": 4}, 8),
        ({}, {"precision": "bfloat16"}, 16),
        ({"pipeline": 4}, {"microbatches": 8}, 4),  # a quarter of the model, of 4 of 8 pieces
        ({"pipeline": 4}, {"microbatches": 8, "schedule": "gpipe"}, 8),
    ],
)
def test_activations_are_of_the_examples_that_are_under_way(
    layout: dict[str, int], compute: dict[str, Any], share: int
):
    shape = gpt(1000).shape
    assert activations(shape, Layout(**layout), Compute(**compute), 32) == share * shape.activation_bytes


def test_under_tensor_a_part_of_activations_stays_whole():
    shape = gpt(1000).shape
    assert activations(shape, Layout(tensor=4), Compute(), 1) == pytest.approx(shape.activation_bytes * 16 / 34, abs=1)


def test_an_optimisers_moments_count():
    profile = Profile(parameters=100, step_seconds=1)
    sizes = [step_bytes(profile, Layout(), Optimiser(kind=kind), Compute(), 1) for kind in ("sgd", "adamw")]
    assert sizes == [800, 1600]


@pytest.mark.parametrize(
    ("share", "wanted", "found"), [(8, 1, 2), (8, 3, 2), (9, 4, 3), (7, 2, 0), (1, 1, 0), (8, 8, 8)]
)
def test_a_pipelines_micro_batches_are_equal(share: int, wanted: int, found: int):
    assert micro_batches(Layout(pipeline=2), Compute(microbatches=wanted), share) == found


def seconds(layout: Layout, nodes: tuple[Node, ...], profile: Profile, **fields: Any) -> float:
    return step_seconds(profile, layout, nodes, train(**fields))


def test_a_step_is_as_measured_under_the_layout_that_was_measured():
    for layout in (Layout(), Layout(data=4), Layout(shard=2, tensor=2)):
        profile = gpt(1_000_000).model_copy(update={"layout": layout})
        assert seconds(layout, machines(4), profile) == pytest.approx(10.0)


def test_sharding_says_half_as_much_again_as_copies_do():
    profile = gpt(250_000_000, seconds=100)
    copies = seconds(Layout(data=4), machines(4), profile) - 25 - START_SECONDS
    shards = seconds(Layout(shard=4), machines(4), profile) - 25 - 3 * 25 * START_SECONDS
    assert copies == pytest.approx(2 * 3 / 4 * 1.0)
    assert shards == pytest.approx(1.5 * copies)


def test_a_pipeline_waits_for_its_first_and_last_micro_batches():
    free = gpt(1000, width=0)
    few, many = (seconds(Layout(pipeline=2), machines(2), free, compute={"microbatches": m}) for m in (2, 16))
    assert few == pytest.approx(5 * 1.5, rel=0.01)
    assert many == pytest.approx(5 * 17 / 16, rel=0.01)
    both = {"microbatches": 2, "schedule": "interleaved"}
    assert seconds(Layout(pipeline=2), machines(2), free, compute=both) == pytest.approx(5 * 1.25, rel=0.01)


def test_tensor_ranks_say_what_goes_between_blocks_four_times_a_layer():
    profile = gpt(12_000_000, layers=10, seconds=100)
    told = seconds(Layout(tensor=2), machines(2), profile) - 50 - 40 * START_SECONDS
    between = 4 * 32 * 512 * profile.shape.width
    assert told == pytest.approx(40 * 2 * between / 2 / 1e9)


def test_ranks_of_a_node_share_its_link():
    profile = gpt(250_000_000, seconds=100)
    near, far = (seconds(Layout(data=2, tensor=4), nodes, profile) for nodes in (machines(8), machines(4, nodes=2)))
    held = 4 * kept(profile, Layout(tensor=4))
    assert far - near == pytest.approx(held / (NODE_BANDWIDTH / 4) - held / 1e9)


def test_what_fits_has_no_words():
    assert unfit(train(), machines(1), gpt(1_000_000)) is None


_CHEAPER: dict[str, Any] = {"compute": {"checkpointing": True, "microbatches": 32}}


@pytest.mark.parametrize(
    ("fields", "devices", "memory", "parameters", "words"),
    [
        ({"batch": 8, "layout": {"data": 8}}, 8, 8, 10**9, r"under data 8 and .* 8 GB; set layout: {.*}, or leave it"),
        ({"batch": 8, "layout": {"data": 8}}, 8, 6, 10**9, r"or leave it out, and compute: {checkpointing: true}$"),
        ({}, 1, 8, 10**8, r"a rank needs \d+(\.\d)? GB and its device has 8 GB; set compute: {checkpointing: true}"),
        ({"compute": {"checkpointing": True}}, 1, 4, 10**8, r"its device has 4 GB; set compute: {microbatches: 32}"),
        (_CHEAPER, 1, 8, 10**9, r"it would fit on \d+ devices by layout: {shard: \d+}; use a smaller model or batch"),
        ({}, 8, 3, 10**9, r"each rank builds the whole model, 4 GB, before it cuts it; use devices with more memory"),
        ({"batch": 1}, 1, 5, 10**9, r"; use a smaller model or batch$"),
    ],
)
def test_a_model_that_does_not_fit_is_told_with_its_mend(
    fields: dict[str, Any], devices: int, memory: int, parameters: int, words: str
):
    said = unfit(train(**fields), machines(devices, memory * GB), gpt(parameters))
    assert said is not None
    assert re.search(words, said), said
