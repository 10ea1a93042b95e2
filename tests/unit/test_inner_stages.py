"""Models with transformers' plans, without transformers: what is refused before it is cut, and what stages compute."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.flops import demand
from atoll.inner.plans import WAYS, experts, plan_of, uncut
from atoll.inner.shape import describe
from atoll.inner.stages import answer_of, begins, layers_of, split, unsplit
from atoll.inner.tensor import HANDLED


class Inner(nn.Module):
    def __init__(self, skips):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.skips = skips

    def forward(self, input_ids=None, inputs_embeds=None):
        first = x = 2 * (self.embed(input_ids) if inputs_embeds is None else inputs_embeds)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x + first if self.skips else x)


class Scored(nn.Module):
    """A model as transformers has them: a plan in its configuration, an inner model, a head, an answer with scores."""

    base_model_prefix, _pp_plan = "model", {"head": ()}

    def __init__(self, skips=False, tied=False, **plan):
        super().__init__()
        self.config = SimpleNamespace(base_model_pp_plan={"embed": (), "layers": (), "norm": ()})
        self.tp_plan = plan or {"model.layers.*": "colwise"}
        self.model, self.head = Inner(skips), nn.Linear(6, 11)
        if tied:
            self.head.weight = self.model.embed.weight

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=True):
        assert not use_cache
        return SimpleNamespace(logits=3 * self.head(self.model(input_ids, inputs_embeds)))


class Task:
    def loss(self, model, batch):
        return model(batch["x"], use_cache=False).logits.square().mean()


def out_of_state(model, part):
    """Leave tensors of these names out of the model's state, as those below an adapter are."""

    def leave(module, state, prefix, local):
        for name in [name for name in state if part in name]:
            del state[name]

    model.register_state_dict_post_hook(leave)
    return model


TOKENS = torch.arange(8).view(2, 4)


@pytest.mark.parametrize("stages", [2, 3])
def test_stages_compute_what_the_model_does_with_its_own_tensors_under_their_names(stages):
    model = Scored()
    whole = dict(model.named_parameters())
    parts = plan_of(model, "pipeline_split")(stages)
    x = TOKENS
    for part in parts:
        x = part(x)
    expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(answer_of(parts[0], x).logits, expected)
    found = {name: value for part in parts for name, value in part.named_parameters()}
    assert {name: id(value) for name, value in found.items()} == {name: id(value) for name, value in whole.items()}
    assert sum(len(list(part.parameters())) for part in parts) == len(whole), "each has its own"
    assert [begins(part) for part in parts] == [number * 3 // stages for number in range(stages)]
    assert parts[0].pipeline_widths == (6, 11)
    x.square().mean().backward()
    ours = {name: value.grad.clone() for name, value in whole.items()}
    model.zero_grad()
    expected.square().mean().backward()
    for name, value in whole.items():
        torch.testing.assert_close(ours[name], value.grad)


def test_a_model_that_does_something_between_its_layers_is_told():
    with pytest.raises(TaskFailed, match=r"^layout.pipeline: Scored computes something else in stages .* use shard$"):
        split(Scored(skips=True), 2)


def test_a_tensor_that_the_first_and_the_last_stage_would_train_is_told_and_a_frozen_one_is_in_both():
    tied = Scored(tied=True)
    with pytest.raises(TaskFailed, match=r"^layout.pipeline: Scored's embedding and head are one tensor, .*\(LoRA\)$"):
        split(tied, 2)
    out_of_state(tied, "")
    assert unsplit(tied) == ""
    assert len(split(tied, 2)) == 2


def test_only_a_model_that_has_what_its_plan_names_has_layers():
    assert (layers_of(Scored()), layers_of(nn.Linear(2, 2))) == (3, 0)
    lacking = Scored()
    lacking.config.base_model_pp_plan["rotary"] = ()
    assert layers_of(lacking) == 0
    assert plan_of(lacking, "pipeline_split") is None


class Beside(nn.Module):
    """An adapter beside a layer, as peft puts one there."""

    def __init__(self, of, **more):
        super().__init__()
        self.base_layer = of
        for name, value in more.items():
            setattr(self, name, value)


def test_each_way_of_a_plan_is_known_to_what_cuts():
    assert sorted(WAYS) == sorted(HANDLED)


@pytest.mark.parametrize(
    ("plan", "change", "words"),
    [
        ({"model.layers.*": "diagonal"}, None, "cuts model.layers.0 by 'diagonal', and known are colwise, rowwise, "),
        ({"model.norm": "colwise"}, None, "cuts model.norm by 'colwise', and it is a LayerNorm, no linear layer"),
        ({"model.layers.*": "rowwise"}, None, "model.layers.0 by 'rowwise', and 4 does not divide its 6 numbers; set "),
        (
            {"model.norm.weight": "colwise"},
            None,
            "cuts model.norm.weight by 'colwise', and it is no module; set tensor",
        ),
        (
            {"head": "colwise"},
            Beside,
            "cuts head by 'colwise', and beside it is an adapter other than plain LoRA; take",
        ),
    ],
    ids=str,
)
def test_what_of_a_plan_cannot_be_followed_is_told_with_the_module_the_way_and_the_mend(plan, change, words):
    model = Scored(**plan)
    if change is not None:
        model.head = change(nn.Linear(6, 12))
    said = uncut(model, 4)
    assert said.startswith("layout.tensor: Scored's tp_plan ")
    assert words in said
    assert said.endswith(("set tensor to 3", "or give the task a method parallelize(model, mesh)"))


@pytest.mark.parametrize(
    "plan",
    [
        {"model.layers.*": "colwise"},
        {"head": "colwise_gather_output"},
        {"model": "moe_tp_experts", "model.norm.*": "x"},
    ],
    ids=str,
)
def test_what_of_a_plan_can_be_followed_is_let_be(plan):
    assert uncut(Scored(**plan), 2) == ""


class Mixture(nn.Module):
    """Experts as transformers stacks them, ``many`` of 6 x 5 numbers."""

    def __init__(self, many):
        super().__init__()
        self.up = nn.Parameter(torch.ones(many, 6, 5))


def mixed(*layers, chosen=2):
    model = Scored()
    model.model.layers = nn.ModuleList(map(Mixture, layers))
    model.ep_plan = {"model.layers.*.up": "grouped_gemm", "model.layers.*": "ep_dispatch_experts"}
    model.config.num_experts_per_tok = chosen
    return model


def test_of_transformers_experts_the_modules_are_taken_that_are_called_with_tokens():
    assert plan_of(mixed(4), "expert_plan") == {"model.layers.*": "ep_dispatch_experts"}
    assert plan_of(Scored(), "expert_plan") is None
    assert [experts(mixed(4, 4)), experts(mixed(4, 6)), experts(Scored())] == [4, 2, 0]


def test_of_transformers_experts_those_count_that_a_token_goes_to():
    none, some = mixed(), mixed(4)
    assert demand(some).token == demand(none).token + 6 * 2 * 6 * 5
    assert demand(mixed(4, chosen=None)).token == demand(none).token + 6 * 4 * 6 * 5


def test_a_degree_whose_plan_cannot_be_followed_is_not_offered_to_the_planner():
    def axes(model):
        return describe(Task(), model, {"x": TOKENS}, 0).shape.axes

    assert axes(Scored()) == ("tensor", "pipeline")
    assert axes(Scored(**{"model.layers.*": "diagonal"})) == ("pipeline",)
    assert axes(Scored(tied=True)) == ("tensor",)


def test_frozen_tensors_below_an_adapter_are_not_counted_as_what_a_rank_trains():
    model = Scored()
    whole = describe(Task(), model, {"x": TOKENS}, 0).shape
    assert whole.tensor_parameters == whole.block_parameters == 3 * 42
    out_of_state(model, "layers.0")
    shape = describe(Task(), model, {"x": TOKENS}, 0).shape
    assert shape.tensor_parameters == shape.block_parameters == 2 * 42
