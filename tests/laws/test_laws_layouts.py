"""The law of layouts: however a model is spread over ranks, it learns what one process learns."""

import functools
import itertools

import pytest

from atoll.spec.compute import Compute
from atoll.spec.plan import Layout
from tests.laws.layouts import Case, Ranks, learn_alone

AXES = ("data", "shard", "tensor", "pipeline", "context", "expert")
SINGLE = [{axis: ranks} for axis in AXES for ranks in (2, 4)]
PRODUCTS = [{one: 2, other: 2} for one, other in itertools.combinations(AXES, 2)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    made = {count: Ranks(tmp_path_factory.mktemp("layouts"), count) for count in (2, 4)}
    yield made
    for ranks in made.values():
        ranks.close()


alone = functools.cache(learn_alone)


def equal(groups, case, within=1e-5, seconds=60):
    """Hold a case against one process; return whether both learned."""
    losses, norm, operations = groups[case.layout.ranks].learn(case, seconds)
    expected, whole, needed = alone(case.alone())
    assert operations == needed * case.layout.tensor * case.layout.context, "which cut what they all count"
    assert losses == pytest.approx(expected, abs=within)
    assert norm == pytest.approx(whole, rel=max(10 * within, 1e-4))
    return losses[-1] < losses[0] - 0.1


def named(given):
    return "-".join(f"{key}={value}" for key, value in given.items())


@pytest.mark.parametrize("degrees", [*SINGLE, *PRODUCTS], ids=named)
def test_a_layout_has_the_losses_of_one_process_over_four_adamw_steps(groups, degrees):
    assert equal(groups, Case(Layout(**degrees), model="sparse" if "expert" in degrees else "dense"))


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero_bubble"])
def test_every_pipeline_schedule_has_the_losses_of_one_process(groups, schedule):
    assert equal(groups, Case(Layout(pipeline=2), Compute(schedule=schedule, microbatches=4)))


@pytest.mark.parametrize("degrees", [{"data": 2}, {"shard": 2}, {"expert": 2}, {"data": 2, "context": 2}], ids=named)
def test_a_batch_in_unequal_shares_and_pieces_counts_each_example_once(groups, degrees):
    model = "sparse" if "expert" in degrees else "dense"
    assert equal(groups, Case(Layout(**degrees), Compute(microbatches=3), model, batch=7))


@pytest.mark.parametrize(
    ("degrees", "shares"),
    [
        ({"data": 2}, (6, 2)),
        ({"shard": 2}, (1, 7)),
        ({"expert": 2}, (5, 3)),
        ({"data": 2, "tensor": 2}, (3, 5)),
        ({"data": 2, "shard": 2}, (4, 1, 2, 1)),
    ],
    ids=str,
)
def test_shares_in_proportion_to_speed_have_the_losses_of_one_process(groups, degrees, shares):
    model = "sparse" if "expert" in degrees else "dense"
    assert equal(groups, Case(Layout(**degrees), Compute(microbatches=1), model, shares=shares))
    assert equal(groups, Case(Layout(**degrees), Compute(microbatches=2), model, shares=shares))


@pytest.mark.parametrize("axis", AXES)
def test_a_gradient_is_clipped_by_the_norm_of_the_whole_model(groups, axis):
    model = "sparse" if axis == "expert" else "dense"
    assert equal(groups, Case(Layout(**{axis: 2}), Compute(clip=0.05), model))


@pytest.mark.parametrize("degrees", [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}, {"expert": 2}], ids=named)
def test_activations_that_are_computed_anew_change_nothing(groups, degrees):
    model = "sparse" if "expert" in degrees else "dense"
    assert equal(groups, Case(Layout(**degrees), Compute(checkpointing=True), model))


@pytest.mark.parametrize("degrees", [{"shard": 2}, {"shard": 4}, {"data": 2, "shard": 2}], ids=named)
def test_a_module_without_a_plan_is_sharded_as_it_is(groups, degrees):
    assert equal(groups, Case(Layout(**degrees), model="any"))


@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"shard": 2, "tensor": 2}], ids=named)
def test_a_task_spreads_its_model_in_its_own_way(groups, degrees):
    assert equal(groups, Case(Layout(**degrees), model="own way"))


def test_context_gathers_keys_and_values_where_it_does_not_divide_the_heads(groups):
    assert equal(groups, Case(Layout(context=2), model="three heads"))


@pytest.mark.parametrize("axis", ["data", "shard", "tensor", "pipeline", "context"])
def test_bfloat16_learns_as_float32_does_but_for_its_rounding(groups, axis):
    assert equal(groups, Case(Layout(**{axis: 2}), Compute(precision="bfloat16")), within=0.05)


@pytest.mark.parametrize(
    ("odd", "degrees", "words"),
    [
        ("weights", {"data": 2}, "model: rank 1 has other weights before step 1 of the run than rank 0; model"),
        ("weights", {"data": 2, "shard": 2}, "model: rank 3 has other weights before step 1 of the run than rank 1"),
        ("weights", {"data": 2, "tensor": 2}, "model: rank 3 has other weights before step 1 of the run than rank 1"),
        ("examples", {"tensor": 2}, "examples: rank 1 has other examples at step 1 of the run than rank 0, of the"),
        ("examples", {"context": 2}, "examples: rank 1 has other examples at step 1 of the run than rank 0, of the"),
        ("order", {"data": 4}, "examples: rank 1 has other examples, or another order, than rank 0; examples"),
        ("loss", {"tensor": 2}, "loss at step 1 of the run is .* at rank 0 and .* at rank 1, which have the same"),
    ],
)
def test_ranks_that_disagree_are_named_before_they_train_apart(groups, odd, degrees, words):
    with pytest.raises(AssertionError, match=f"TaskFailed: {words}"):
        groups[Layout(**degrees).ranks].learn(Case(Layout(**degrees), odd=odd))
    assert equal(groups, Case(Layout(**degrees))), "the group is fit for the next"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("degrees", [{"data": 2}, {"shard": 2}, {"tensor": 2}], ids=named)
def test_compiled_blocks_have_the_losses_of_one_process(groups, degrees):
    assert equal(groups, Case(Layout(**degrees), Compute(compile=True)), seconds=300)
