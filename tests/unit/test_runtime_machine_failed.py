"""Sites whose task fails: whom a stage goes on without, who is asked again, and what ends a run in which words."""

import pytest

from atoll.runtime.state import expects, unexpected
from atoll.spec.event import Broken, Expired, Lost, Published, Refused, Rejected, Restarted
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
    model,
    plan,
    query_job,
    running,
    submitted,
    train_job,
    training,
)


def broken(state, site, words="", **more):
    said = {"position": state.position, "words": words or f"{site}: loss is nan", "error": "TaskFailed"}
    return Broken(run="run", site=site, **{**said, **more})


def after_round(state, *sites):
    """Fold a round of these sites to its end."""
    state, _ = fold(state, *(answer(state, site) for site in sites))
    return fold(state, merged(state, weights=ONE))


# --- all


@pytest.mark.parametrize("site", ["a", "c"])
def test_where_all_are_waited_for_a_failure_ends_the_run_in_its_words(site):
    state, _ = training(plan())
    state, _ = fold(state, broken(state, site))
    assert (state.phase, state.words, state.error) == ("failed", f"{site}: loss is nan", "TaskFailed")


def test_a_query_ends_with_the_first_site_that_fails():
    state, _ = running(plan(rounds=0, **QUORUM), job=query_job())
    assert fold(state, broken(state, "b"))[0].phase == "failed"


# --- quorum


def test_a_quorum_goes_on_at_once_without_the_site_that_failed_and_asks_it_again_in_the_next_round():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, broken(state, "b"), answer(state, "a"))
    assert (state.failed, commands) == ({"b"}, [])
    state, commands = fold(state, answer(state, "c"))
    assert merges(commands) == [("a", "c")]
    state, commands = fold(state, merged(state, weights=ONE))
    assert (state.failed, assigned(commands)) == (frozenset(), ["a", "b", "c"])
    state, commands = fold(state, *(answer(state, site) for site in "abc"))
    assert merges(commands) == [("a", "b", "c")]


def test_the_last_one_that_fails_lets_the_others_be_merged():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, answer(state, "c"), answer(state, "a"), broken(state, "b"))
    assert merges(commands) == [("a", "c")]


def test_too_many_failures_end_a_quorum_in_the_words_of_the_first():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "c", "c: first"), broken(state, "a", "a: second", error="Unavailable"))
    assert (state.phase, state.words, state.error) == ("failed", "c: first", "TaskFailed")


def test_failures_of_earlier_rounds_do_not_add_up():
    state, _ = training(plan(rounds=3, **QUORUM))
    for bad, good in (("a", "bc"), ("b", "ac"), ("c", "ab")):
        state, _ = fold(state, broken(state, bad, f"{bad}: once"))
        state, commands = after_round(state, *good)
    assert (state.work, len(commands)) == ("publish", 1)
    state, _ = fold(state, Published(run="run", model=model()))
    assert state.result.failed == {site: f"{site}: once" for site in "abc"}
    assert (state.phase, state.result.missing) == ("finished", ())


def test_the_result_keeps_a_sites_first_words():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "b", "b: the cause"))
    state, _ = after_round(state, "a", "c")
    state, _ = fold(state, broken(state, "b", "b: again"))
    assert state.result.failed == {"b": "b: the cause"}


def test_what_a_site_says_twice_or_after_its_answer_or_of_a_stage_before_counts_no_more():
    state, _ = training(plan(**QUORUM))
    again, commands = fold(state, broken(state, "b"), broken(state, "b"))
    assert (again.failed, len(again.failures), commands) == ({"b"}, 1, [])
    answered, _ = fold(state, answer(state, "b"))
    assert fold(answered, broken(answered, "b")) == (answered, [])
    merging, _ = fold(again, answer(state, "a"), answer(state, "c"))
    later, _ = fold(merging, merged(merging, weights=ONE))
    assert fold(later, broken(state, "b")) == (later, [])


def test_a_failure_of_an_earlier_stage_ends_no_run_of_all_either():
    before, _ = training(plan())
    state, _ = after_round(before, "a", "b", "c")
    assert fold(state, broken(before, "b")) == (state, [])


def test_no_answer_and_no_rejection_of_a_site_that_failed_counts_in_that_stage():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "b"))
    late = answer(state, "b")
    assert (expects(state, late.answer), unexpected(state, late.answer)) == (False, "again")
    assert fold(state, late) == (state, [])
    assert fold(state, Rejected(run="run", site="b", position=1, epoch=0, words="nan")) == (state, [])


def test_neither_a_session_nor_a_hub_that_begins_anew_has_it_try_the_same_stage_again():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "b"), Lost(run="run", site="b"))
    assert assigned(fold(state, *joined("b"))[1]) == []
    state, _ = fold(state, answer(state, "a"), Restarted(run="run"))
    state, commands = fold(state, *joined("a", "b", "c"))
    assert assigned(commands) == ["c"]
    assert merges(fold(state, answer(state, "c"))[1]) == [("a", "c")]  # as it would have been


def test_a_round_that_waits_for_a_lost_site_says_in_the_end_also_who_failed():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "b"), answer(state, "a"), Lost(run="run", site="c"))
    state, _ = fold(state, Expired(run="run", position=1), Expired(run="run", position=1, final=True))
    assert state.words == "no answer to 'train' from c in 60 s (sync.wait.patience); b: loss is nan"
    assert state.error == "Unavailable"


def test_a_rejected_site_is_asked_again_when_a_failure_makes_it_needed():
    state, _ = training(plan(sites="abcd", **{**QUORUM, "count": 3}))
    state, _ = fold(state, Rejected(run="run", site="a", position=1, epoch=0, words="nan"))
    state, commands = fold(state, answer(state, "b"), broken(state, "d"))
    assert assigned(commands) == ["a"]
    state, commands = fold(state, answer(state, "a"), answer(state, "c"))
    assert merges(commands) == [("a", "b", "c")]


def test_a_refusal_leaves_too_few_where_others_have_failed():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "b"), Refused(run="run", site="c", words="c refuses"))
    assert (state.phase, state.words) == ("failed", "c refuses")


def test_one_that_failed_and_then_refuses_takes_no_further_part():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, broken(state, "b"), Refused(run="run", site="b", words="b refuses"))
    state, commands = after_round(state, "a", "c")
    assert assigned(commands) == ["a", "c"]


# --- the stages around the rounds


def test_statistics_are_of_those_that_have_the_columns():
    state, _ = running(plan(**QUORUM), job=train_job(statistics=["age"]))
    state, commands = fold(state, broken(state, "a"), answer(state, "b"), answer(state, "c"))
    assert merges(commands) == [("b", "c")]
    assert "a" in state.missing


def test_another_site_makes_the_first_weights_and_the_one_that_could_not_may_still_train():
    state, _ = running(plan(**QUORUM))
    state, commands = fold(state, broken(state, "a"))
    assert assigned(commands) == ["b"]
    state, _ = fold(state, answer(state, "b"))
    state, commands = fold(state, merged(state, weights=ONE))
    assert assigned(commands) == ["a", "b", "c"]


def test_a_model_that_no_site_can_make_ends_the_run_in_the_first_words():
    state, _ = running(plan(**QUORUM))
    for site in "abc":
        state, _ = fold(state, broken(state, site, f"{site}: model() raised"))
    assert (state.phase, state.words) == ("failed", "a: model() raised")


@pytest.mark.parametrize("wait", [QUORUM, BUFFER])
def test_metrics_are_of_those_that_could_and_none_at_all_is_a_failure(wait):
    state, _ = training(plan(rounds=1, evaluators="abc", **wait))
    state, _ = after_round(state, "a", "b", *("c" if wait is QUORUM else ()))
    assert state.work == "evaluate"
    some, commands = fold(state, broken(state, "a"), broken(state, "b"), answer(state, "c"))
    assert (merges(commands), some.missing) == ([("c",)], ("a", "b"))
    none, _ = fold(state, *(broken(state, site, f"{site}: metrics() raised") for site in "bac"))
    assert (none.phase, none.words) == ("failed", "b: metrics() raised")


# --- buffer


def test_a_buffer_goes_on_and_gives_the_site_its_next_version():
    state, _ = training(plan(sites="abcd", rounds=3, **BUFFER))
    state, commands = fold(state, broken(state, "a"), answer(state, "b"), answer(state, "c"))
    assert merges(commands) == [("b", "c")]
    state, commands = fold(state, merged(state, weights=ONE))
    assert assigned(commands) == ["a", "b", "c"]  # d is at work on the version before


def test_a_buffer_ends_when_fewer_are_left_than_it_merges():
    state, _ = training(plan(**BUFFER))
    state, _ = fold(state, broken(state, "b", "b: first"), answer(state, "a"), broken(state, "c"))
    assert (state.phase, state.words) == ("failed", "b: first")


def test_a_failure_in_an_older_round_of_a_buffer_that_is_merging_waits_for_the_version_after():
    before, _ = training(plan(sites="abcd", rounds=3, **BUFFER))
    state, _ = fold(before, answer(before, "a"), answer(before, "b"))
    state, commands = fold(state, broken(before, "c"))
    assert (state.failed, commands) == ({"c"}, [])
    state, commands = fold(state, merged(state, weights=ONE))
    assert assigned(commands) == ["a", "b", "c"]
    state, _ = fold(state, broken(before, "d"))  # of a version before, but of nothing that was taken
    assert state.failed == {"d"}


# --- who is no member


def test_the_hub_and_a_relay_end_any_run():
    state, _ = training(plan(**QUORUM))
    for site in ("hub", "the-relay"):
        over, _ = fold(state, broken(state, site, "hub: no memory" if site == "hub" else "cannot be summed"))
        assert over.phase == "failed"
    assert over.words == "the-relay: cannot be summed"


def test_before_there_is_a_plan_a_failure_ends_the_run():
    state, _ = submitted()
    assert fold(state, broken(state, "a"))[0].phase == "failed"
