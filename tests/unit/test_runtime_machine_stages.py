"""Stages outside training under a quorum or a buffer: they end without a site that is lost, late or unwilling."""

import pytest

from atoll.runtime.machine import Alarm, AssignTo, Publish
from atoll.runtime.state import expects
from atoll.spec.event import Expired, Lost, Refused, Restarted, Result
from tests.unit.runs import (
    ZERO,
    answer,
    assigned,
    fold,
    joined,
    merged,
    merges,
    plan,
    query_job,
    running,
    train_job,
    training,
)

FEWER = [{"kind": "quorum", "count": 2}, {"kind": "buffer", "count": 2}]
fewer = pytest.mark.parametrize("wait", FEWER, ids=["quorum", "buffer"])
ALARMS = [60.0, 5.0]


def deadline(state):
    return Expired(run="run", position=state.position)


def patience(state):
    return Expired(run="run", position=state.position, final=True)


def refused(site):
    return Refused(run="run", site=site, words=f"{site} refuses")


def seconds(commands):
    return [command.seconds for command in commands if isinstance(command, Alarm)]


def measuring(sites="abcd", **wait):
    return running(plan(sites, **wait), job=train_job(statistics=["age"]))


def evaluating(evaluators="abc", **wait):
    """Return a run that has trained its one round and evaluates."""
    state, _ = training(plan("abc", rounds=1, evaluators=evaluators, **wait))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), answer(state, "c"), deadline(state))
    return fold(state, merged(state, weights=ZERO))


# --- measure


@fewer
def test_sums_are_waited_for_from_all_until_the_deadline_and_then_from_as_many_as_the_plan_counts(wait):
    state, commands = measuring(**wait)
    assert (assigned(commands), seconds(commands)) == (["a", "b", "c", "d"], ALARMS)
    state, commands = fold(state, answer(state, "c"), answer(state, "a"), Lost(run="run", site="b"))
    assert merges(commands) == []
    state, commands = fold(state, deadline(state))
    assert merges(commands) == [("a", "c")]
    assert state.missing == ("b", "d")


@fewer
def test_one_site_is_not_enough_to_measure_where_the_plan_counts_two(wait):
    state, _ = measuring(**wait)
    state, commands = fold(state, answer(state, "c"), deadline(state))
    assert merges(commands) == []
    assert merges(fold(state, answer(state, "d"))[1]) == [("c", "d")]
    state, _ = fold(state, patience(state))
    assert state.words == "no answer to 'measure' from a, b, d in 60 s (sync.wait.patience)"


@fewer
def test_a_refusal_while_measuring_leaves_the_others_unless_they_are_too_few(wait):
    state, _ = measuring("abc", **wait)
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), refused("c"))
    assert merges(commands) == [("a", "b")]
    state, commands = fold(state, merged(state))
    assert (state.work, state.members, assigned(commands)) == ("initialise", ("a",), ["a"])
    state, _ = measuring("ab", **wait)
    state, _ = fold(state, answer(state, "a"), refused("b"))
    assert (state.phase, state.error, state.words) == ("failed", "Denied", "b refuses")


@fewer
def test_who_misses_the_measuring_still_trains(wait):
    state, _ = measuring(**wait)
    late = answer(state, "d")
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), answer(state, "c"), deadline(state))
    state, _ = fold(state, merged(state, result=Result(missing=state.missing)))
    assert fold(state, late) == (state, [])
    state, _ = fold(state, answer(state, "a"))
    state, commands = fold(state, merged(state, weights=ZERO))
    assert (state.work, assigned(commands)) == ("train", ["a", "b", "c", "d"])
    assert (state.result.missing, state.seen) == (("d",), {"a", "b", "c"})


def test_under_all_sums_are_waited_for_from_every_site():
    state, commands = measuring("abc")
    assert seconds(commands) == [60.0]
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), deadline(state))
    assert merges(commands) == []
    assert fold(state, refused("c"))[0].phase == "failed"


# --- initialise


@fewer
def test_at_the_deadline_another_site_that_is_there_is_asked_for_the_first_weights(wait):
    state, commands = running(plan("abcd", initialiser="c", **wait))
    assert (assigned(commands), seconds(commands)) == (["c"], ALARMS)
    state, _ = fold(state, Lost(run="run", site="a"))
    state, commands = fold(state, deadline(state))
    assert commands == [AssignTo("b"), Alarm(0, 5.0, final=False)]
    state, commands = fold(state, answer(state, "b"))
    assert merges(commands) == [("b",)]
    state, commands = fold(state, merged(state, weights=ZERO))
    assert (state.work, assigned(commands)) == ("train", ["b", "c", "d"])


@fewer
def test_each_deadline_asks_one_more_until_none_is_left_and_then_patience_ends_the_run(wait):
    state, _ = running(plan("abc", **wait))
    asked = []
    for _ in range(4):
        state, commands = fold(state, deadline(state))
        asked.append(assigned(commands))
    assert asked == [["b"], ["c"], [], []]
    state, _ = fold(state, patience(state))
    assert state.words == "no answer to 'initialise' from a, b, c in 60 s (sync.wait.patience)"


@fewer
def test_the_first_answer_gives_the_weights_also_when_it_is_of_the_one_that_was_slow(wait):
    state, _ = running(plan("abc", **wait))
    state, _ = fold(state, deadline(state))
    second = answer(state, "b")
    state, commands = fold(state, answer(state, "a"))
    assert merges(commands) == [("a",)]
    assert fold(state, second) == (state, [])
    state, _ = fold(state, merged(state, weights=ZERO))
    assert not expects(state, second.answer)


@fewer
def test_when_nobody_is_there_to_be_asked_the_first_to_join_is(wait):
    state, _ = running(plan("abc", **wait), "a")
    state, commands = fold(state, Lost(run="run", site="a"), deadline(state))
    assert commands == []
    state, commands = fold(state, *joined("c"))
    assert commands == [AssignTo("c"), Alarm(0, 5.0, final=False)]
    assert fold(state, *joined("b"))[1] == []  # c has a deadline of its own
    assert assigned(fold(state, *joined("a"))[1]) == ["a"]  # asked before, and not answered yet
    assert merges(fold(state, answer(state, "c"))[1]) == [("c",)]


@fewer
def test_who_gives_no_first_weights_is_passed_over_and_may_train(wait):
    state, _ = running(plan("abc", **wait))
    state, commands = fold(state, refused("a"))
    assert commands == [AssignTo("b")]  # the stage's deadline still stands
    state, commands = fold(state, deadline(state), refused("b"))
    assert assigned(commands) == ["c"]
    state, _ = fold(state, answer(state, "c"))
    state, commands = fold(state, merged(state, weights=ZERO))
    assert (state.work, assigned(commands)) == ("train", ["a", "b", "c"])


@fewer
def test_when_nobody_gives_first_weights_the_run_ends_in_the_last_ones_words(wait):
    state, _ = running(plan("abc", **wait))
    state, _ = fold(state, refused("a"), refused("c"), refused("b"))
    assert state.phase == "running"  # c was not asked yet, so what it refuses is something else
    state, _ = fold(state, refused("c"))
    assert (state.phase, state.error, state.words) == ("failed", "Denied", "c refuses")


@fewer
def test_when_only_sites_that_are_away_could_give_first_weights_they_are_waited_for(wait):
    state, _ = running(plan("abc", **wait), "a")
    state, commands = fold(state, refused("a"))
    assert (state.members, commands) == ((), [])
    assert assigned(fold(state, *joined("b"))[1]) == ["b"]
    assert fold(state, patience(state))[0].words.startswith("no answer to 'initialise' from b, c in")


@fewer
def test_a_restart_asks_the_same_sites_again_for_first_weights(wait):
    state, _ = running(plan("abc", **wait))
    state, _ = fold(state, deadline(state))
    state, commands = fold(state, Restarted(run="run"))
    assert (state.members, seconds(commands)) == (("a", "b"), ALARMS)
    state, commands = fold(state, *joined("b", "c"))
    assert assigned(commands) == ["b"]
    assert assigned(fold(state, deadline(state))[1]) == ["c"]
    assert merges(fold(state, answer(state, "b"))[1]) == [("b",)]


@fewer
def test_a_restart_while_the_first_weights_of_a_site_that_then_refused_are_merged_asks_another(wait):
    state, _ = running(plan("abc", **wait))
    state, commands = fold(state, answer(state, "a"), refused("a"))
    assert (state.members, assigned(commands)) == ((), [])
    state, commands = fold(state, Restarted(run="run"))
    assert (merges(commands), seconds(commands)) == ([], ALARMS)
    assert assigned(fold(state, *joined("a", "b"))[1]) == ["b"]


@fewer
def test_an_initialiser_that_refused_to_measure_is_not_asked_for_first_weights(wait):
    state, _ = measuring("abc", initialiser="b", **wait)
    state, _ = fold(state, refused("b"), answer(state, "a"), answer(state, "c"))
    state, commands = fold(state, merged(state))
    assert (state.work, assigned(commands)) == ("initialise", ["a"])


def test_under_all_nobody_else_is_asked_for_first_weights():
    state, commands = running(plan("abc"))
    assert seconds(commands) == [60.0]
    for event in (deadline(state), *joined("b")):
        state, commands = fold(state, event)
        assert (state.members, commands) == (("a",), [])
    assert fold(state, refused("a"))[0].words == "a refuses"


# --- evaluate


@fewer
def test_evaluation_goes_on_after_its_deadline_with_those_who_answered_and_names_the_others(wait):
    state, commands = evaluating(**wait)
    assert (assigned(commands), seconds(commands)) == (["a", "b", "c"], ALARMS)
    state, commands = fold(state, answer(state, "b"), Lost(run="run", site="c"))
    assert merges(commands) == []
    state, commands = fold(state, deadline(state))
    assert (merges(commands), state.missing) == ([("b",)], ("a", "c"))
    state, commands = fold(state, merged(state, result=Result(metrics={"auc": 0.9}, missing=state.missing)))
    assert (commands, state.result.missing) == ([Publish()], ("a", "c"))


@fewer
def test_when_nobody_has_evaluated_by_the_deadline_the_first_answer_is_enough(wait):
    state, _ = evaluating(**wait)
    state, commands = fold(state, deadline(state))
    assert merges(commands) == []
    assert merges(fold(state, answer(state, "c"))[1]) == [("c",)]


@fewer
def test_a_model_that_nobody_evaluates_in_time_is_not_published(wait):
    state, _ = evaluating(**wait)
    state, _ = fold(state, deadline(state), patience(state))
    assert state.words == "no answer to 'evaluate' from a, b, c in 60 s (sync.wait.patience)"


@fewer
def test_who_evaluates_too_late_or_comes_back_too_late_changes_nothing(wait):
    state, _ = evaluating(**wait)
    late = answer(state, "c")
    state, _ = fold(state, Lost(run="run", site="c"), answer(state, "a"), answer(state, "b"), deadline(state))
    state, commands = fold(state, *joined("c"), late)
    assert (commands, len(state.merging)) == ([], 2)
    state, _ = fold(state, merged(state))
    assert state.work == "publish"
    assert fold(state, *joined("c"), late, refused("c"), deadline(state)) == (state, [])


@fewer
def test_an_evaluator_that_refuses_is_left_out_and_not_called_late(wait):
    state, _ = evaluating(**wait)
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), refused("c"))
    assert (merges(commands), state.missing) == ([("a", "b")], ())


@fewer
def test_when_every_evaluator_refuses_in_its_turn_the_model_goes_out_without_metrics(wait):
    state, _ = evaluating("ab", **wait)
    state, commands = fold(state, deadline(state), refused("a"), refused("b"))
    assert (state.work, state.lapsed, commands) == ("publish", False, [Publish()])


@fewer
def test_a_restart_after_every_evaluator_refused_while_merging_publishes_without_metrics(wait):
    state, _ = evaluating("a", **wait)
    state, _ = fold(state, answer(state, "a"), refused("a"))
    assert (state.work, len(state.merging)) == ("evaluate", 1)
    state, commands = fold(state, Restarted(run="run"))
    assert (state.work, commands) == ("publish", [Publish()])


@fewer
def test_a_refusal_that_leaves_too_few_in_the_last_round_ends_the_run_and_publishes_nothing(wait):
    state, _ = training(plan("ab", rounds=1, **wait))
    state, _ = fold(state, refused("b"))
    assert (state.phase, state.words) == ("failed", "b refuses")


@fewer
def test_a_restart_while_evaluating_keeps_what_was_answered_and_waits_for_the_others_anew(wait):
    state, _ = evaluating(**wait)
    state, _ = fold(state, answer(state, "a"), Restarted(run="run"))
    state, commands = fold(state, *joined("a", "b"))
    assert (state.lapsed, assigned(commands)) == (False, ["b"])
    assert merges(fold(state, deadline(state))[1]) == [("a",)]


def test_under_all_evaluation_waits_for_every_evaluator():
    state, commands = evaluating()
    assert seconds(commands) == [60.0]
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), deadline(state))
    assert merges(commands) == []
    assert fold(state, refused("c"))[0].words == "c refuses"


def test_a_query_under_a_quorum_still_waits_for_every_site():
    state, commands = running(plan("ab", rounds=0, kind="quorum", count=1), job=query_job())
    assert seconds(commands) == [60.0]
    state, commands = fold(state, answer(state, "a"), deadline(state))
    assert merges(commands) == []
    assert fold(state, refused("b"))[0].words == "b refuses"
