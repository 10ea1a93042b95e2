"""Plans of private jobs: what cannot keep a promise about rows is rejected, and what leaves beside it is told."""

import pytest

from atoll.errors import Invalid
from atoll.planner.choose import choose
from atoll.planner.layouts import candidates, unfit
from atoll.planner.points import points
from atoll.planner.price import rank_memory
from atoll.spec.fleet import Profile
from atoll.spec.plan import Layout
from tests.unit.test_planner_choose import answers, fleet, profiles, train

PRIVACY = {"epsilon": 4.0, "delta": 1e-3}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sync": "data_parallel"}, "privacy: does not go with sync.exchange: gradient: sums what is not clipped"),
        ({"sync": {"control": True, "merge": "mean"}}, "sync.control: variates are of gradients without noise"),
        ({"layout": {"data": 2}}, r"layout: 2 ranks, and the noise of a step is drawn by one; set layout: \{data: 1\}"),
        ({"compute": {"precision": "bfloat16"}}, "compute.precision: bfloat16: gradients are clipped one by one in"),
        ({"compute": {"compile": True}}, "compute.compile: hides the layers"),
        ({"compute": {"checkpointing": True}}, "compute.checkpointing: computes a layer twice"),
        ({"privacy": {"epsilon": 4.0, "noise": 1.0, "delta": 1e-3}}, "an epsilon or the noise that is to be added"),
        ({"privacy": {"delta": 1e-3}}, "an epsilon or the noise that is to be added; set epsilon: 4.0, or noise: 1.1"),
    ],
)
def test_what_private_steps_do_not_go_with_is_refused_with_its_mend(fields, words):
    with pytest.raises(ValueError, match=words):
        train(**{"privacy": PRIVACY, **fields})


def test_a_private_job_goes_with_what_only_follows_its_noise():
    sync = {"preset": "fedprox", "proximal": 0.1, "keep_optimiser": True, "keep_local": ["head.*"]}
    assert train(privacy=PRIVACY, sync=sync, compute={"microbatches": 4, "clip": 1.0}).privacy is not None


def test_exchanging_gradients_is_rejected_and_sites_have_one_rank_each():
    found = points(train(privacy=PRIVACY, steps=200), 4)
    assert [point.name for point in found if point.rejected] == ["exchange every step"]
    assert "gradient: sums what is not clipped" in found[0].rejected[0].words
    nodes = fleet(devices=4).sites[0].nodes
    profile = Profile(parameters=1000, step_seconds=1.0)
    assert candidates(train(privacy=PRIVACY), nodes, profile) == (Layout(),)
    assert len(candidates(train(), nodes, profile)) > 1


def test_each_examples_gradient_takes_memory_and_micro_batches_save_it():
    profile = Profile(parameters=1_000_000, step_seconds=1.0)
    plain, private = rank_memory(profile, train(batch=32)), rank_memory(profile, train(batch=32, privacy=PRIVACY))
    assert private - plain == 4 * 1_000_000 * 64
    pieces = train(batch=32, privacy=PRIVACY, compute={"microbatches": 8})
    assert rank_memory(profile, pieces) - plain == 4 * 1_000_000 * 8
    large = Profile(parameters=10_000_000, step_seconds=1.0)
    words = unfit(train(batch=32, privacy=PRIVACY), fleet().sites[0].nodes, large)
    assert words is not None
    assert "set compute: {microbatches: 32}" in words


def test_a_task_of_arrays_is_refused_and_statistics_are_told_as_beside_the_promise():
    job, of = train(privacy=PRIVACY, steps=200, data={"statistics": ["age"]}), fleet()
    plan = choose(job, of, answers(job, of), profiles(of))
    assert plan.sync.exchange == "delta"
    assert any("data.statistics leave the sites without noise" in reason.words for reason in plan.reasons)
    plain = train(privacy=PRIVACY, steps=200)
    assert not any("without noise" in one.words for one in choose(plain, of, answers(plain, of), profiles(of)).reasons)
    arrays = {name: one.model_copy(update={"gradients": False}) for name, one in profiles(of).items()}
    with pytest.raises(Invalid, match="privacy: is of a step's gradients, and a task of arrays has none"):
        choose(job, of, answers(job, of), arrays)
