"""Rounds by time at the hub: the steps that sites tell of are checked, and counted once they are merged."""

import pytest

from atoll.errors import Invalid
from atoll.planner.price import Place, price
from atoll.runtime.brought import checked
from atoll.spec.event import Restarted
from atoll.spec.fleet import Link, Node, Profile
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync
from tests.unit.runs import ZERO, answer, fold, merged, train_job, training

TIMED = Sync.model_validate({"preset": "fedavg", "seconds": 20.0, "wait": {"patience": 60.0}})


def timed(rounds=3):
    layouts = {site: Layout() for site in "ab"}
    return Plan(layouts=layouts, sync=TIMED, sites=("a", "b"), rounds=rounds)


def told(state, steps, examples):
    return answer(state, "a", steps=steps, examples=examples).answers[0]


def test_steps_count_once_they_are_merged_and_stay_counted_when_the_hub_dies():
    state, _ = training(timed())
    assert state.steps == {"a": 0}  # it gave the first weights
    state, _ = fold(state, answer(state, "a", steps=4), answer(state, "b", steps=9))
    assert state.steps == {"a": 0}
    state, _ = fold(state, merged(state, weights=ZERO))
    state, _ = fold(state, answer(state, "a", steps=3), Restarted(run="run"))
    assert state.steps == {"a": 4, "b": 9}
    state, _ = fold(state, answer(state, "b", steps=10))
    state, _ = fold(state, merged(state, weights=ZERO))
    assert state.steps == {"a": 7, "b": 19}


@pytest.mark.parametrize(("steps", "words"), [(0, "steps: 0: a round has 1 to 10"), (11, "steps: 11: a round has")])
def test_steps_that_no_round_has_are_refused(steps, words):
    state, _ = training(timed())
    with pytest.raises(Invalid, match=words):
        checked(state, told(state, steps, 1), None)


def test_examples_are_held_to_the_steps_that_were_told():
    state, _ = training(timed())
    batch = state.job.batch
    checked(state, told(state, 3, 3 * batch), None)
    with pytest.raises(Invalid, match=f"stage 'train' has 1 to {3 * batch} there"):
        checked(state, told(state, 3, 3 * batch + 1), None)


def test_a_round_is_priced_by_the_time_it_may_take_and_one_step_at_least():
    job = train_job().model_copy(update={"steps": 100})
    link = Link(site="a", bandwidth=1e9, latency=0.0)
    place = Place(Profile(parameters=10, step_seconds=4.0), link, Layout(), (Node(),))
    assert price(job, TIMED, [place]).compute_seconds == pytest.approx(10 * 20.0)
    assert price(job, TIMED.model_copy(update={"seconds": 1.0}), [place]).compute_seconds == pytest.approx(10 * 4.0)
    assert price(job, TIMED.model_copy(update={"seconds": 50.0}), [place]).compute_seconds == pytest.approx(400.0)
