"""The run as a pure state machine: each event in each phase, and random walks that must neither wedge nor repeat."""

import pytest

from atoll.runtime.machine import Alarm, AssignTo, Dismiss, MakePlan, Publish
from atoll.runtime.state import expects, stages
from atoll.spec.event import (
    Broken,
    Cancelled,
    Expired,
    Lost,
    Planned,
    Published,
    Refused,
    Restarted,
    Result,
)
from atoll.spec.model import Moments, TensorSpec
from tests.unit.runs import (
    ONE,
    ZERO,
    answer,
    assigned,
    fold,
    joined,
    merged,
    merges,
    model,
    plan,
    query_job,
    running,
    submitted,
    train_job,
    training,
)

# --- planning and the row of stages


def test_a_submitted_job_asks_for_a_plan():
    state, commands = submitted()
    assert (state.phase, state.work, state.members, commands) == ("planning", None, (), [MakePlan()])


def test_a_train_job_has_a_stage_for_each_thing_it_needs():
    assert stages(train_job(), plan(rounds=2)) == ("initialise", "train", "train", "publish")
    full = stages(train_job(statistics=["age"]), plan(rounds=1, evaluators="a"))
    assert full == ("measure", "initialise", "train", "evaluate", "publish")
    assert stages(query_job(), plan(rounds=0)) == ("query",)


def test_the_first_weights_come_from_one_site_only():
    state, commands = running(plan(initialiser="b"))
    assert (state.work, state.members) == ("initialise", ("b",))
    assert commands == [AssignTo("b"), Alarm(0, 60.0, final=True)]
    assert assigned(running(plan())[1]) == ["a"]


def test_a_plan_that_comes_twice_changes_nothing():
    state, _ = running(plan())
    assert fold(state, Planned(run="run", plan=plan(rounds=9))) == (state, [])


def test_a_site_that_joins_before_the_plan_is_assigned_with_it_and_one_that_joins_later_at_once():
    state, commands = training(plan(), "a", "b")
    assert assigned(commands) == ["a", "b"]
    state, commands = fold(state, *joined("c"))
    assert assigned(commands) == ["c"]


def test_a_site_that_joins_again_is_assigned_again_unless_it_has_answered():
    state, _ = training(plan())
    state, commands = fold(state, answer(state, "a"), Lost(run="run", site="a"), Lost(run="run", site="b"))
    assert (state.live, commands) == ({"c"}, [])
    assert assigned(fold(state, *joined("a", "b"))[1]) == ["b"]


def test_a_stranger_that_joins_gets_nothing():
    state, _ = training(plan())
    assert assigned(fold(state, *joined("mallory"))[1]) == []


# --- a whole run


def test_a_run_goes_through_its_stages_to_a_published_model():
    made = plan("ab", rounds=2, evaluators="b")
    state, _ = running(made, job=train_job(statistics=["age"]))
    assert state.work == "measure"
    state, commands = fold(state, answer(state, "a"), answer(state, "b"))
    assert merges(commands) == [("a", "b")]
    moments = {"age": Moments(count=2, mean=1.0, std=1.0)}
    state, _ = fold(state, merged(state, statistics=moments))
    signature = (TensorSpec(name="w", shape=(3,)),)
    state, _ = fold(state, answer(state, "a"))
    state, commands = fold(state, merged(state, weights=ZERO, signature=signature))
    assert (state.weights, state.signature, state.statistics) == (ZERO, signature, moments)
    for loss in (0.5, 0.25):
        state, _ = fold(state, answer(state, "b"), answer(state, "a"))
        assert [answer.site for answer in state.merging] == ["a", "b"]  # plan order, not order of arrival
        state, commands = fold(state, merged(state, weights=ONE, outer=ONE, loss=loss))
    assert (state.work, state.version, state.losses, state.weights) == ("evaluate", 2, (0.5, 0.25), ONE)
    assert assigned(commands) == ["b"]
    state, _ = fold(state, answer(state, "b"))
    state, commands = fold(state, merged(state, result=Result(metrics={"auc": 0.9})))
    assert commands == [Publish()]
    state, commands = fold(state, Published(run="run", model=model()))
    assert (state.phase, state.result.model, state.result.metrics) == ("finished", "job@1", {"auc": 0.9})
    assert commands == [Dismiss("the run is over")]


def test_a_query_ends_with_its_merge():
    state, commands = running(plan("ab", rounds=0), job=query_job())
    assert (state.work, assigned(commands)) == ("query", ["a", "b"])
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    state, commands = fold(state, merged(state, result=Result(rows=((2,),))))
    assert (state.phase, state.result.rows, commands) == ("finished", ((2,),), [Dismiss("the run is over")])


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled"])
def test_nothing_changes_a_run_that_is_over(end):
    state, _ = training(plan())
    late = [answer(state, "a"), merged(state, "a"), Expired(run="run", position=state.position, final=True)]
    late += [*joined("a"), Lost(run="run", site="a"), Restarted(run="run"), Refused(run="run", site="a", words="no")]
    late += [Broken(run="run", site="a", words="x"), Cancelled(run="run", user="bob")]
    late += [Planned(run="run", plan=plan()), Published(run="run", model=model())]
    ends = {
        "finished": Published(run="run", model=model()),
        "failed": Broken(run="run", site="a", words="out of memory"),
        "cancelled": Cancelled(run="run", user="ada"),
    }
    over, commands = fold(state, ends[end])
    assert (over.phase, len(commands)) == (end, 1)
    assert fold(over, *late) == (over, [])


def test_a_broken_run_says_where_and_what_and_a_cancelled_one_by_whom():
    state, _ = training(plan())
    assert fold(state, Broken(run="run", site="b", words="loss is nan"))[0].words == "b: loss is nan"
    assert fold(state, Cancelled(run="run", user="ada"))[0].words == "cancelled by ada"
    planning, _ = submitted()
    assert fold(planning, Broken(run="run", site="hub", words="no site"))[0].phase == "failed"
    assert fold(planning, Cancelled(run="run", user="ada"))[0].phase == "cancelled"


# --- answers that do not count


def wrong_answers(state):
    yield answer(state, "mallory")
    yield answer(state, "a", epoch=state.epoch + 1)
    yield answer(state, "a", position=state.position + 1)
    yield answer(state, "a", position=state.position - 1)
    yield answer(state, "a", version=state.version + 1)


@pytest.mark.parametrize("kind", [{}, {"kind": "quorum", "count": 1}, {"kind": "buffer", "count": 3}])
def test_answers_of_a_stranger_another_epoch_stage_or_version_are_ignored(kind):
    state, _ = training(plan(**kind))
    for event in wrong_answers(state):
        assert fold(state, event) == (state, [])
        assert not expects(state, event.answer)


def test_a_site_counts_once_for_a_stage_while_waiting_and_while_merging():
    state, _ = training(plan("ab"))
    once, _ = fold(state, answer(state, "a"))
    assert fold(once, answer(state, "a")) == (once, [])
    merging, commands = fold(once, answer(state, "b"))
    assert merges(commands) == [("a", "b")]
    assert fold(merging, answer(state, "a"), answer(state, "b")) == (merging, [])


def test_answers_before_the_plan_are_ignored():
    state, _ = submitted()
    assert fold(state, answer(state, "a")) == (state, [])


def test_a_merge_counts_once_and_only_while_one_is_under_way():
    state, _ = training(plan("ab"))
    assert fold(state, merged(state, "a")) == (state, [])
    merging, _ = fold(state, answer(state, "a"), answer(state, "b"))
    other = merged(merging).model_copy(update={"position": state.position + 1})
    assert fold(merging, other) == (merging, [])
    done, _ = fold(merging, merged(merging))
    assert fold(done, merged(merging)) == (done, [])


# --- all


def test_all_waits_for_every_site_and_never_goes_on_at_a_deadline():
    state, commands = training(plan())
    assert [command for command in commands if isinstance(command, Alarm)] == [Alarm(1, 60.0, final=True)]
    state, commands = fold(state, answer(state, "a"), answer(state, "c"), Expired(run="run", position=1))
    assert merges(commands) == []
    assert merges(fold(state, answer(state, "b"))[1]) == [("a", "b", "c")]


def test_patience_that_ends_names_the_silent_sites():
    state, _ = training(plan())
    state, commands = fold(state, answer(state, "b"), Expired(run="run", position=1, final=True))
    assert (state.phase, state.error) == ("failed", "Unavailable")
    assert state.words == "no answer to 'train' from a, c in 60 s (sync.wait.patience)"
    assert commands == [Dismiss(state.words)]


def test_patience_of_another_stage_or_of_a_stage_being_merged_ends_nothing():
    state, _ = training(plan("ab"))
    assert fold(state, Expired(run="run", position=0, final=True)) == (state, [])
    merging, _ = fold(state, answer(state, "a"), answer(state, "b"))
    assert fold(merging, Expired(run="run", position=1, final=True)) == (merging, [])
    planning, _ = submitted()
    assert fold(planning, Expired(run="run", position=0, final=True)) == (planning, [])


def test_under_all_a_refusal_ends_the_run_in_the_words_of_the_refusing_site():
    state, _ = training(plan())
    state, commands = fold(state, Refused(run="run", site="b", words="b refuses: not for this"))
    assert (state.phase, state.error, state.words) == ("failed", "Denied", "b refuses: not for this")
    assert commands == [Dismiss("b refuses: not for this")]


def test_a_refusal_while_planning_ends_the_run_and_one_of_a_stranger_does_nothing():
    planning, _ = submitted()
    assert fold(planning, Refused(run="run", site="a", words="no"))[0].phase == "failed"
    state, _ = training(plan())
    assert fold(state, Refused(run="run", site="mallory", words="no")) == (state, [])
