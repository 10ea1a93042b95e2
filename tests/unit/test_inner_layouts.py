"""What of a layout needs no ranks: which modules a plan names, what is repeated in a model, how batches are cut."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from atoll.errors import TaskFailed
from atoll.inner.exchange import own_stretch
from atoll.inner.mesh import Mesh, laid_out
from atoll.inner.parallelize import parallelize, pieces
from atoll.inner.plans import AXES, blocks, check, check_stages, holders, planned
from atoll.inner.whole import part, put, whole
from atoll.spec.plan import Layout
from atoll.tasks.gpt import GPT, Shape

SHAPE = Shape(vocabulary=11, width=8, layers=3, heads=2, length=6)


def test_a_star_in_a_plan_is_a_number():
    names = [name for _, name, _ in planned(GPT(SHAPE), ["blocks.*.attention.out", "blocks.attention.out"])]
    assert names == [f"blocks.{number}.attention.out" for number in range(3)]


def test_blocks_are_the_outermost_members_of_lists():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))]), GPT(SHAPE))
    assert blocks(model) == [model[1][0], *model[2].blocks.values()]


def test_a_block_that_shares_a_parameter_with_the_rest_is_none():
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "tied": nn.Linear(2, 2)})
    model["tied"].weight = model["list"][0].weight
    assert blocks(model) == [model["list"][1]]
    assert sorted(holders(model).values()) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_pipelines_stages_have_each_tensor_of_the_model_once_and_compute_what_it_does(stages):
    model = GPT(SHAPE)
    parts = model.pipeline_split(stages)
    found = {name: value for stage in parts for name, value in stage.state_dict(keep_vars=True).items()}
    assert sum(len(stage.state_dict()) for stage in parts) == len(found)
    assert {name: id(value) for name, value in found.items()} == {
        name: id(value) for name, value in model.state_dict(keep_vars=True).items()
    }
    tokens = torch.randint(0, 11, (2, 6))
    x = tokens
    for stage in parts:
        x = stage(x)
    assert torch.equal(x, model(tokens))


def test_more_stages_than_layers_are_told():
    with pytest.raises(TaskFailed, match=r"^layout.pipeline: 4 stages of 3 layers; set it so that each has one$"):
        GPT(SHAPE).pipeline_split(4)


class Cut(nn.Module):
    """A model that says it can be spread in every way, of 6 heads, 6 experts and 3 layers."""

    tp_plan, expert_plan, context_plan = {"one": "colwise"}, {"one": "grouped"}, {"one": "attend"}
    heads, layers = 6, 3

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6)

    def pipeline_split(self, stages):
        return [self] * stages


def spread(degrees):
    layout = Layout(**degrees)
    return Mesh(0, layout.ranks, layout, device=DeviceMesh("cpu", [0], _init_backend=False, _rank=0))


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tensor": 4}, "layout.tensor: 4 does not divide the model's 6 heads; set it to 3"),
        ({"tensor": 12}, "layout.tensor: 12 does not divide the model's 6 heads; set it to 6"),
        ({"expert": 4}, "layout.expert: 4 does not divide the model's 6 experts; set it to 3"),
    ],
)
def test_a_degree_that_does_not_divide_is_told_with_the_nearest_that_does(degrees, words):
    with pytest.raises(TaskFailed) as caught:
        check(Cut(), spread(degrees), AXES)
    assert str(caught.value) == words
    assert check(Cut(), spread({"tensor": 3, "expert": 2}), AXES) is None


def test_an_adapter_around_experts_that_is_not_known_by_expert_is_told():
    model, around = Cut(), nn.Module()
    around.base_layer, model.one = model.one, around
    with pytest.raises(TaskFailed, match=r"^layout\.expert: around Cut's experts is an adapter other .* set expert to"):
        check(model, spread({"expert": 2}), AXES)
    assert check(model, spread({"context": 2}), AXES) is None


@pytest.mark.parametrize(("axis", "plan"), list(AXES.items()))
def test_a_degree_that_a_model_brings_no_plan_for_is_told(axis, plan):
    with pytest.raises(TaskFailed, match=rf"^layout\.{axis}: Linear carries no {plan}, .* set {axis} to 1, use shard"):
        check(nn.Linear(2, 2), spread({axis: 2}), AXES)


@pytest.mark.parametrize(
    ("ranks", "each", "words"),
    [
        (4, 1, "layout.pipeline: 4 ranks for the model's 3 layers, where each stage has one; set it to 3"),
        (
            2,
            2,
            "layout.pipeline: 2 ranks of 2 stages (compute.schedule) for the model's 3 layers, where each stage has "
            "one; set it to 1",
        ),
    ],
)
def test_more_stages_than_layers_are_told_with_the_most_ranks_there_can_be(ranks, each, words):
    with pytest.raises(TaskFailed) as caught:
        check_stages(Cut(), ranks, each)
    assert str(caught.value) == words
    assert check_stages(Cut(), 3, 1) is None


def test_ranks_that_cannot_share_a_sequence_are_told_with_both_mends():
    with pytest.raises(TaskFailed) as caught:
        own_stretch(torch.zeros(2, 16, 4), 3, 0)
    assert str(caught.value) == (
        "layout.context: 3 does not divide the 16 positions of a sequence; set it to 2, or make sequences 15 long"
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"heads": 3}, "width: 8: is no multiple of 3 heads"), ({"experts": 1}, "chosen: 2: there are 1 experts")],
)
def test_a_gpt_of_sizes_that_do_not_fit_is_told(changed, words):
    with pytest.raises(TaskFailed, match=words):
        GPT(Shape(**{"vocabulary": 11, "width": 8, "layers": 1, "heads": 2, "length": 6, **changed}))


def test_a_mixture_sends_each_token_to_its_best_experts_and_weighs_them():
    torch.manual_seed(0)
    inner = GPT(Shape(vocabulary=11, width=8, layers=1, heads=2, length=6, experts=4)).blocks["0"].inner
    x = torch.randn(1, 5, 8)
    shares, chosen = inner.router(x[0]).softmax(-1).topk(2, dim=-1)
    for token in range(5):
        made = [
            torch.nn.functional.gelu(x[0, token] @ inner.experts.up[n].T) @ inner.experts.down[n].T
            for n in chosen[token]
        ]
        mixed = sum(share * one for share, one in zip(shares[token] / shares[token].sum(), made, strict=True))
        torch.testing.assert_close(inner(x)[0, token], mixed)


def test_a_share_is_cut_into_pieces_that_are_never_empty():
    batch = {"x": torch.arange(5), "y": torch.arange(10).reshape(5, 2)}
    assert [piece["x"].tolist() for piece in pieces(batch, 2)] == [[0, 1, 2], [3, 4]]
    assert [len(piece["y"]) for piece in pieces(batch, 9)] == [1] * 5


def test_a_layout_of_other_ranks_than_there_are_is_told():
    with pytest.raises(TaskFailed, match=r"is 6, and there are 4 ranks; set the degrees so that their product is 4$"):
        laid_out(Mesh(0, 4), Layout(data=3, tensor=2))


def test_a_plain_layout_makes_no_axes_and_leaves_one_process_model_alone():
    mesh, model = laid_out(Mesh(), Layout()), nn.Linear(2, 2)
    assert (mesh.device, mesh.share, mesh.shares, mesh.averaged, mesh.speaks) == (None, 0, 1, 1, True)
    assert parallelize(model, mesh).model is model
    assert (laid_out(Mesh(1, 3), Layout(data=3)).share, Layout(data=2, shard=3, expert=2, tensor=5).shares) == (1, 12)


def test_what_lies_here_anyway_is_whole():
    place = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    put(place, torch.tensor([1.0, 2.0, 1 / 3]))
    assert whole(place).tolist() == torch.tensor([1.0, 2.0, 1 / 3]).bfloat16().tolist()
    value = torch.ones(2)
    assert part(value, torch.zeros(2)) is value
