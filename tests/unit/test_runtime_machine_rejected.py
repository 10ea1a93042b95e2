"""Answers that were not taken: whom a stage goes on without, whom it asks again, and what a barred site ends."""

import pytest

from atoll.runtime.machine import Alarm, Dismiss
from atoll.runtime.state import expects, unexpected
from atoll.spec.event import Barred, Expired, Lost, Refused, Rejected, Restarted
from tests.unit.runs import (
    BUFFER,
    ONE,
    QUORUM,
    answer,
    assigned,
    fold,
    joined,
    merged,
    merges,
    plan,
    query_job,
    running,
    submitted,
    train_job,
    training,
)


def rejected(state, site, **more):
    place = {"position": state.position, "epoch": state.epoch}
    return Rejected(run="run", site=site, words=f"{site}: nan", **{**place, **more})


def barred(site):
    return Barred(run="run", site=site, words=f"{site}: nan; release {site}")


# --- quorum


def test_a_quorum_merges_without_the_rejected_site_before_its_deadline():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, rejected(state, "b"), answer(state, "a"))
    assert (state.spoiled, commands) == ({"b"}, [])
    state, commands = fold(state, answer(state, "c"))
    assert merges(commands) == [("a", "c")]
    state, commands = fold(state, merged(state))
    assert (state.spoiled, assigned(commands)) == (frozenset(), ["a", "b", "c"])


def test_the_last_answer_that_is_rejected_lets_the_others_be_merged():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), rejected(state, "c"))
    assert merges(commands) == [("a", "b")]


def test_a_quorum_that_is_left_with_too_few_asks_all_whom_it_was_to_go_on_without():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, rejected(state, "a"))
    assert assigned(commands) == []
    state, commands = fold(state, rejected(state, "b"))
    assert (assigned(commands), state.spoiled) == (["a", "b"], frozenset())
    state, commands = fold(state, answer(state, "b"), answer(state, "a"), answer(state, "c"))
    assert merges(commands) == [("a", "b", "c")]


@pytest.mark.parametrize("leaving", [Lost(run="run", site="c"), barred("c")])
def test_one_that_leaves_makes_the_rejected_one_needed_again(leaving):
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, rejected(state, "a"), answer(state, "b"))
    state, commands = fold(state, leaving)
    assert (state.phase, assigned(commands)) == ("running", ["a"])


def test_one_that_is_rejected_and_away_is_asked_when_it_is_back_if_it_is_needed_by_then():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, rejected(state, "a"), Lost(run="run", site="a"))
    assert assigned(fold(state, *joined("a"))[1]) == []  # the others are enough
    state, commands = fold(state, Lost(run="run", site="b"))
    assert assigned(commands) == []
    assert assigned(fold(state, *joined("a"))[1]) == ["a"]


def test_nothing_more_is_taken_for_that_round_from_who_was_rejected_in_it():
    state, _ = training(plan(**QUORUM))
    event = answer(state, "a")
    state, _ = fold(state, rejected(state, "a"))
    assert not expects(state, event.answer)
    assert unexpected(state, event.answer) == "again"
    assert fold(state, event) == (state, [])


def test_patience_that_ends_while_a_rejected_site_is_asked_again_still_ends_the_run():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, rejected(state, "a"), rejected(state, "b"), rejected(state, "c"))
    state, commands = fold(state, Expired(run="run", position=1, final=True))
    assert (state.phase, state.error) == ("failed", "Unavailable")
    assert commands == [Dismiss(state.words)]


def test_a_restarted_hub_asks_everybody_anew():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, rejected(state, "a"), Restarted(run="run"))
    assert state.spoiled == frozenset()
    assert assigned(fold(state, *joined("a", "b", "c"))[1]) == ["a", "b", "c"]


def test_a_refusal_takes_the_rejected_site_out_of_the_count():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, rejected(state, "a"), Refused(run="run", site="a", words="no"))
    assert (state.spoiled, state.members, commands) == (frozenset(), ("b", "c"), [])
    assert merges(fold(state, answer(state, "b"), answer(state, "c"))[1]) == [("b", "c")]


# --- all, and a buffer


def test_all_asks_again_each_time():
    state, _ = training(plan())
    for _ in range(2):
        state, commands = fold(state, rejected(state, "b"))
        assert assigned(commands) == ["b"]
    state, commands = fold(state, *(answer(state, site) for site in "abc"))
    assert merges(commands) == [("a", "b", "c")]


def test_a_query_asks_again():
    state, _ = running(plan("ab", rounds=0), job=query_job())
    assert assigned(fold(state, rejected(state, "a"))[1]) == ["a"]


def test_a_buffer_asks_again_also_while_it_merges_and_for_what_was_asked_of_an_older_version():
    state, _ = training(plan("abc", rounds=3, **BUFFER))
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), rejected(state, "c"))
    assert (len(merges(commands)), assigned(commands)) == (1, ["c"])
    state, _ = fold(state, merged(state))
    state, commands = fold(state, rejected(state, "c", position=1))
    assert (assigned(commands), state.position) == (["c"], 2)


# --- the stages around the rounds


def test_first_weights_that_are_rejected_are_asked_of_another_site_and_under_all_again():
    state, _ = running(plan(**QUORUM))
    state, commands = fold(state, rejected(state, "a"))
    assert (assigned(commands), state.members) == (["b"], ("a", "b"))
    state, _ = running(plan())
    assert assigned(fold(state, rejected(state, "a"))[1]) == ["a"]


def test_first_weights_that_nobody_else_can_give_are_asked_again():
    state, _ = running(plan("ab", **QUORUM), "a")
    assert assigned(fold(state, rejected(state, "a"))[1]) == ["a"]
    state, _ = running(plan("ab", **QUORUM))
    state, commands = fold(state, rejected(state, "a"), rejected(state, "b"))
    assert assigned(commands) == ["b", "a", "b"]


def test_metrics_of_the_others_are_enough_and_the_result_names_who_is_missing():
    state, _ = training(plan(rounds=1, evaluators="ab", **QUORUM))
    state, _ = fold(state, *(answer(state, site) for site in "abc"))
    state, _ = fold(state, merged(state, weights=ONE))
    state, commands = fold(state, answer(state, "a"), rejected(state, "b"))
    assert (merges(commands), state.missing) == ([("a",)], ("b",))


# --- what changes nothing


def test_late_stale_and_strange_rejections_change_nothing():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, Restarted(run="run"), *joined("a", "b", "c"), answer(state, "a", epoch=1))
    for event in (
        rejected(state, "b", late=True),
        rejected(state, "b", epoch=0),
        rejected(state, "b", position=0),
        rejected(state, "mallory"),
        rejected(state, "a"),  # which has answered
    ):
        assert fold(state, event) == (state, [])
    merging, _ = fold(state, answer(state, "b"), Expired(run="run", position=1))
    assert fold(merging, rejected(state, "c")) == (merging, [])
    planning, _ = submitted()
    assert fold(planning, rejected(planning, "a"), barred("a")) == (planning, [])


def test_an_answer_to_what_was_never_asked_for_counts_as_that_of_the_open_stage():
    state, _ = training(plan())
    for place in ({"epoch": 5}, {"position": 3}):
        assert assigned(fold(state, rejected(state, "b", **place))[1]) == ["b"]


# --- what is the matter with an answer


@pytest.mark.parametrize("kind", [QUORUM, {**BUFFER, "count": 3}, {}])
def test_what_no_assignment_can_have_asked_for_is_wrong_and_what_was_counted_comes_again(kind):
    state, _ = training(plan(rounds=3, **kind))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    for place in ({"epoch": 1}, {"position": 2}, {"version": 7}):
        assert unexpected(state, answer(state, "c", **place).answer) == "wrong"
    for place in ({}, {"position": 0}):
        assert unexpected(state, answer(state, "a", **place).answer) == "again"
    assert unexpected(state, answer(state, "mallory").answer) == "nobody's"
    restarted, _ = fold(state, Restarted(run="run"))
    assert unexpected(restarted, answer(state, "c").answer) == "late"
    gone, _ = fold(state, Refused(run="run", site="c", words="no"))
    assert unexpected(gone, answer(state, "c").answer) == "nobody's"


def test_an_answer_to_a_round_that_went_on_is_late_and_to_a_buffer_only_when_it_lies():
    for kind, said in ((QUORUM, "late"), (BUFFER, "wrong")):
        state, _ = training(plan(rounds=3, **kind))
        old = answer(state, "c", version=7 if kind == BUFFER else 0).answer
        state, _ = fold(state, answer(state, "a"), answer(state, "b"), Expired(run="run", position=1))
        state, _ = fold(state, merged(state, weights=ONE))
        assert (state.version, unexpected(state, old)) == (1, said)


def test_what_comes_while_the_model_is_published_is_late():
    state, _ = training(plan("ab", rounds=1, kind="quorum", count=1))
    old = answer(state, "b").answer
    state, _ = fold(state, answer(state, "a"), Expired(run="run", position=1))
    assert unexpected(state, old) == "late"  # its round is being merged
    state, _ = fold(state, merged(state, weights=ONE))
    assert (state.work, unexpected(state, old)) == ("publish", "late")


# --- barred


def test_under_all_a_barred_site_ends_the_run_in_its_words_if_the_run_still_needs_it():
    state, _ = training(plan())
    for event in ((), (answer(state, "b"),)):  # also one that has answered: there is another round
        over, commands = fold(state, *event, barred("b"))
        assert (over.phase, over.words, over.error) == ("failed", "b: nan; release b", "Invalid")
        assert commands == [Dismiss(over.words)]


def test_under_all_a_run_that_has_all_it_needs_of_the_site_goes_on():
    state, _ = training(plan("ab", rounds=1, evaluators="a"))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    merging, commands = fold(state, barred("b"))
    assert (merging.phase, commands) == ("running", [])
    evaluating, commands = fold(merging, merged(merging, weights=ONE), barred("b"))
    assert (evaluating.work, assigned(commands)) == ("evaluate", ["a"])
    assert fold(evaluating, barred("a"))[0].phase == "failed"
    publishing, _ = fold(evaluating, answer(evaluating, "a"))
    publishing, _ = fold(publishing, merged(publishing), barred("a"))
    assert (publishing.phase, publishing.work) == ("running", "publish")


def test_a_measuring_run_of_all_knows_that_it_will_need_the_site():
    state, _ = running(plan("ab"), job=train_job(statistics=["age"]))
    state, _ = fold(state, answer(state, "b"))
    assert fold(state, barred("b"))[0].phase == "failed"


@pytest.mark.parametrize("kind", [QUORUM, BUFFER])
def test_a_barred_site_counts_as_lost_until_it_joins_again(kind):
    state, _ = training(plan(rounds=3, **kind))
    state, commands = fold(state, barred("c"))
    assert (state.phase, state.live, commands) == ("running", {"a", "b"}, [])
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), Expired(run="run", position=1))
    state, commands = fold(state, merged(state, weights=ONE))
    assert assigned(commands) == ["a", "b"]
    assert assigned(fold(state, *joined("c"))[1]) == ["c"]


def test_asking_again_sets_no_alarm_of_its_own():
    state, _ = training(plan(**QUORUM))
    _, commands = fold(state, rejected(state, "a"), rejected(state, "b"))
    assert not any(isinstance(command, Alarm) for command in commands)
