"""The law of layouts for models of transformers, whole and with adapters: they learn what one process learns."""

import functools

import pytest

from atoll.spec.compute import Compute
from atoll.spec.plan import Layout
from tests.laws.layouts import Case, Ranks, learn_alone
from tests.unit.folders import NEEDED

pytestmark = [NEEDED, pytest.mark.timeout(300)]
WHOLE = ["llama", "tied llama", "qwen", "gemma", "phi", "olmo", "latent", "mixtral"]
ADAPTED = ["lora llama", "lora dropped", "lora gemma", "lora phi", "lora mixtral"]
MIXED = ["mixtral", "qwen moe", "deepseek", "gpt-oss", "lora mixtral"]
PRODUCTS = [
    {"data": 2, "tensor": 2},
    {"shard": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2},
    {"data": 2, "pipeline": 2},
    {"context": 4},
    {"pipeline": 2, "context": 2},
    {"context": 2, "tensor": 2},
    {"shard": 2, "context": 2},
]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    made = {count: Ranks(tmp_path_factory.mktemp("causal"), count) for count in (2, 4)}
    yield made
    for ranks in made.values():
        ranks.close()


alone = functools.cache(learn_alone)


def equal(groups, case, within=1e-5):
    """Hold a case against one process: losses of four AdamW steps, the last gradient's norm, what is computed."""
    losses, norm, operations = groups[case.layout.ranks].learn(case, 120)  # it imports transformers first
    expected, whole, needed = alone(case.alone())
    assert operations == needed * case.layout.tensor * case.layout.context
    assert losses == pytest.approx(expected, abs=within)
    assert norm == pytest.approx(whole, rel=max(10 * within, 1e-4))
    return losses[-1] < losses[0] - 0.01


def named(given):
    return "-".join(f"{key}={value}" for key, value in given.items())


@pytest.mark.parametrize("model", [*WHOLE, *ADAPTED])
def test_a_model_is_cut_by_its_own_plan(groups, model):
    assert equal(groups, Case(Layout(tensor=2), model=model))


@pytest.mark.parametrize(
    "model", ["llama", "qwen", "phi", "olmo", "mixtral", "lora llama", "lora gemma", "lora mixtral"]
)
def test_a_model_is_staged_by_its_own_plan(groups, model):
    assert equal(groups, Case(Layout(pipeline=2), model=model))


@pytest.mark.parametrize("model", ["llama", "gemma", "phi", "olmo", "latent", "mixtral", "lora llama", "lora mixtral"])
def test_a_models_attention_goes_over_stretches_of_a_sequence(groups, model):
    assert equal(groups, Case(Layout(context=2), model=model))


@pytest.mark.parametrize("model", MIXED)
def test_a_mixtures_experts_live_apart(groups, model):
    assert equal(groups, Case(Layout(expert=2), model=model))


@pytest.mark.parametrize("axis", ["data", "shard", "tensor", "pipeline", "context"])
@pytest.mark.parametrize("model", ["mixtral", "qwen moe", "lora mixtral"])
def test_products_with_the_expert_degree_have_the_losses_of_one_process(groups, model, axis):
    assert equal(groups, Case(Layout(**{"expert": 2, axis: 2}), model=model))


@pytest.mark.parametrize("compute", [Compute(checkpointing=True, clip=0.05), Compute(microbatches=3)], ids=str)
@pytest.mark.parametrize("model", ["qwen moe", "lora mixtral"])
def test_experts_take_pieces_of_unequal_shares_and_compute_them_anew(groups, model, compute):
    assert equal(groups, Case(Layout(expert=2), compute, model, batch=7))


def test_an_expert_that_nobody_chose_has_a_gradient_of_zero(groups):
    assert equal(groups, Case(Layout(expert=4), model="one-sided"))


@pytest.mark.parametrize("degrees", [{"shard": 2}, *PRODUCTS], ids=named)
@pytest.mark.parametrize("model", ["llama", "lora gemma"])
def test_products_of_degrees_have_the_losses_of_one_process(groups, model, degrees):
    assert equal(groups, Case(Layout(**degrees), model=model))


@pytest.mark.parametrize("axis", ["tensor", "pipeline", "context"])
def test_an_adapters_activations_are_computed_anew_and_its_gradient_is_clipped(groups, axis):
    assert equal(groups, Case(Layout(**{axis: 2}), Compute(checkpointing=True, clip=0.05), model="lora llama"))


@pytest.mark.parametrize(
    ("degrees", "model"),
    [
        ({"tensor": 2}, "llama"),
        ({"pipeline": 2}, "llama"),
        ({"context": 2}, "llama"),
        ({"expert": 2}, "lora mixtral"),
        ({"shard": 2, "expert": 2}, "lora mixtral"),
    ],
    ids=str,
)
def test_bfloat16_learns_as_float32_does_but_for_its_rounding(groups, degrees, model):
    assert equal(groups, Case(Layout(**degrees), Compute(precision="bfloat16"), model=model), within=0.05)


@pytest.mark.parametrize(
    ("degrees", "model", "words"),
    [
        ({"tensor": 4}, "llama", "tensor: 4 does not divide the model's 4 heads and 2 of keys and values; set it to 2"),
        ({"pipeline": 4}, "llama", "pipeline: 4 ranks for the model's 2 layers, where each stage has one; set it to 2"),
        (
            {"pipeline": 2},
            "tied llama",
            "pipeline: LlamaForCausalLM's embedding and head are one tensor, which .*LoRA",
        ),
        ({"expert": 2}, "llama", "expert: LlamaForCausalLM carries no expert_plan, .*; set expert to 1, use shard"),
        (
            {"expert": 2},
            "dense qwen moe",
            "expert: Qwen3MoeForCausalLM has no module in its expert_plan; set expert to",
        ),
        ({"expert": 4}, "qwen six", "expert: 4 does not divide the model's 6 experts; set it to 3"),
        (
            {"expert": 2},
            "squared",
            "expert: MixtralForCausalLM's experts compute something else apart; set expert to 1",
        ),
    ],
    ids=str,
)
def test_a_layout_that_a_model_cannot_have_is_refused(groups, degrees, model, words):
    with pytest.raises(AssertionError, match=rf"TaskFailed: layout\.{words}"):
        groups[Layout(**degrees).ranks].learn(Case(Layout(**degrees), model=model))
