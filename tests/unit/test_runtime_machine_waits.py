"""Whom a round waits for, and what a restarted hub goes on with: quorums, buffers, epochs."""

from atoll.runtime.machine import Alarm, MakePlan, Publish
from atoll.spec.event import (
    Answered,
    Expired,
    Lost,
    Refused,
    Restarted,
)
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
    submitted,
    training,
)

# --- quorum


def test_a_quorum_waits_for_all_until_its_deadline():
    state, commands = training(plan(**QUORUM))
    assert Alarm(1, 5.0, final=False) in commands
    state, commands = fold(state, answer(state, "a"), answer(state, "b"))
    assert merges(commands) == []
    state, commands = fold(state, Expired(run="run", position=1))
    assert merges(commands) == [("a", "b")]


def test_after_the_deadline_the_next_answer_that_makes_the_quorum_is_enough():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, answer(state, "c"), Expired(run="run", position=1))
    assert merges(commands) == []
    assert merges(fold(state, answer(state, "b"))[1]) == [("b", "c")]


def test_the_deadline_holds_for_one_round_only():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), Expired(run="run", position=1))
    state, commands = fold(state, merged(state))
    assert (state.lapsed, assigned(commands)) == (False, ["a", "b", "c"])
    assert merges(fold(state, answer(state, "a"), answer(state, "b"))[1]) == []


def test_a_late_answer_to_a_merged_round_is_ignored_and_the_site_may_answer_the_next():
    state, _ = training(plan(**QUORUM))
    late = answer(state, "c")
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), Expired(run="run", position=1))
    assert fold(state, late) == (state, [])  # while merging
    state, _ = fold(state, merged(state))
    assert fold(state, late) == (state, [])
    assert fold(state, answer(state, "c"))[0].arrived[0].site == "c"


def test_a_lost_site_does_not_hold_up_a_quorum():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, Lost(run="run", site="a"), answer(state, "b"), answer(state, "c"))
    assert merges(fold(state, Expired(run="run", position=1))[1]) == [("b", "c")]


def test_a_site_that_missed_a_round_is_given_the_next_one_if_it_is_back_by_then():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, Lost(run="run", site="c"), answer(state, "a"), answer(state, "b"))
    merging, _ = fold(state, Expired(run="run", position=1))
    before, commands = fold(merging, *joined("c"))
    assert assigned(commands) == []  # what is being merged takes no more answers
    _, commands = fold(before, merged(before))
    assert assigned(commands) == ["a", "b", "c"]
    after, commands = fold(merging, merged(merging))
    assert assigned(commands) == ["a", "b"]
    assert assigned(fold(after, *joined("c"))[1]) == ["c"]


def test_a_site_that_is_back_before_its_round_is_closed_is_given_that_round():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, Lost(run="run", site="c"), answer(state, "a"), Expired(run="run", position=1))
    state, commands = fold(state, *joined("c"))
    assert assigned(commands) == ["c"]
    assert merges(fold(state, answer(state, "c"))[1]) == [("a", "c")]


def test_a_connected_site_that_was_too_slow_for_a_round_is_given_the_next_one():
    state, _ = training(plan(**QUORUM))
    late = answer(state, "c")
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), Expired(run="run", position=1))
    state, commands = fold(state, merged(state))
    assert assigned(commands) == ["a", "b", "c"]
    state, _ = fold(state, late)
    assert fold(state, answer(state, "c"))[0].arrived[0].version == 1


def test_a_quorum_that_is_there_when_patience_ends_before_the_deadline_is_enough():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    assert merges(fold(state, Expired(run="run", position=1, final=True))[1]) == [("a", "b")]


def test_a_quorum_goes_on_without_a_site_that_refused_and_asks_it_nothing_more():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), Refused(run="run", site="c", words="no"))
    assert merges(commands) == [("a", "b")]
    state, commands = fold(state, merged(state))
    assert (state.members, assigned(commands)) == (("a", "b"), ["a", "b"])
    assert fold(state, answer(state, "c")) == (state, [])


def test_a_refusal_that_leaves_too_few_for_the_quorum_ends_the_run():
    state, _ = training(plan("ab", **QUORUM))
    state, _ = fold(state, Refused(run="run", site="a", words="a says no"))
    assert (state.phase, state.words) == ("failed", "a says no")


def test_what_a_site_answered_before_it_refused_is_not_merged():
    state, _ = training(plan(**QUORUM))
    state, commands = fold(state, answer(state, "c"), Refused(run="run", site="c", words="no"))
    assert (state.arrived, commands) == ((), [])
    assert merges(fold(state, answer(state, "a"), answer(state, "b"))[1]) == [("a", "b")]


def test_a_model_whose_evaluators_all_refused_goes_out_without_metrics():
    state, _ = training(plan("abc", rounds=1, evaluators="c", **QUORUM))
    state, _ = fold(state, Refused(run="run", site="c", words="no"), answer(state, "a"), answer(state, "b"))
    state, commands = fold(state, merged(state, weights=ONE))
    assert (state.work, commands) == ("publish", [Publish()])


# --- buffer


def test_a_buffer_merges_as_soon_as_it_is_full_and_gives_new_work_to_those_it_merged():
    state, _ = training(plan(rounds=3, **BUFFER))
    state, commands = fold(state, answer(state, "c"), answer(state, "a"))
    assert merges(commands) == [("a", "c")]
    state, commands = fold(state, merged(state))
    assert (state.version, assigned(commands)) == (1, ["a", "c"])  # b is at work on the version before


def test_the_first_round_of_a_buffer_begins_at_every_site():
    state, commands = training(plan(**BUFFER))
    assert (state.work, assigned(commands)) == ("train", ["a", "b", "c"])


def test_an_answer_from_an_older_version_is_taken_with_its_version():
    state, _ = training(plan(rounds=3, **BUFFER))
    old = answer(state, "b")
    state, _ = fold(state, answer(state, "a"), answer(state, "c"))
    state, _ = fold(state, merged(state))
    state, _ = fold(state, old)
    assert [(kept.site, kept.version, kept.position) for kept in state.arrived] == [("b", 0, 1)]
    state, commands = fold(state, answer(state, "a"))
    assert merges(commands) == [("a", "b")]


def test_an_answer_that_lies_about_the_version_of_its_stage_is_ignored():
    state, _ = training(plan(rounds=3, **BUFFER))
    old = answer(state, "b")
    state, _ = fold(state, answer(state, "a"), answer(state, "c"))
    state, _ = fold(state, merged(state))
    lie = Answered(run="run", answer=old.answer.model_copy(update={"version": state.version}))
    assert fold(state, lie) == (state, [])


def test_an_answer_that_was_merged_does_not_count_again_when_it_is_sent_again():
    state, _ = training(plan(rounds=3, **BUFFER))
    first = answer(state, "a")
    state, _ = fold(state, first, answer(state, "c"))
    assert fold(state, first) == (state, [])  # while merging
    state, _ = fold(state, merged(state))
    assert fold(state, first) == (state, [])


def test_answers_that_come_while_a_buffer_is_merged_open_the_next_one():
    state, _ = training(plan("abcd", rounds=3, **BUFFER))
    events = [answer(state, site) for site in "abcd"]
    state, commands = fold(state, *events)
    assert merges(commands) == [("a", "b")]
    state, commands = fold(state, merged(state))
    assert merges(commands) == [("c", "d")]
    assert assigned(commands) == ["a", "b"]


def test_a_merged_site_that_is_away_gets_its_work_when_it_is_back():
    state, _ = training(plan(rounds=3, **BUFFER))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), Lost(run="run", site="a"))
    state, commands = fold(state, merged(state))
    assert assigned(commands) == ["b"]
    assert assigned(fold(state, *joined("a"))[1]) == ["a"]


def test_a_site_that_is_back_while_a_buffer_is_merged_gets_its_work_at_once():
    state, _ = training(plan(rounds=3, **BUFFER))
    state, _ = fold(state, Lost(run="run", site="c"), answer(state, "a"), answer(state, "b"))
    state, commands = fold(state, *joined("c"))
    assert assigned(commands) == ["c"]
    state, commands = fold(state, answer(state, "c"), merged(state))
    assert assigned(commands) == ["a", "b"]
    assert merges(fold(state, answer(state, "a"))[1]) == [("a", "c")]


def test_the_last_round_of_a_buffer_drops_what_came_too_late_and_evaluates_everywhere():
    state, _ = training(plan(rounds=1, evaluators="abc", **BUFFER))
    late = answer(state, "c")
    state, _ = fold(state, answer(state, "a"), answer(state, "b"), late)
    state, commands = fold(state, merged(state))
    assert (state.work, state.arrived, assigned(commands)) == ("evaluate", (), ["a", "b", "c"])
    assert fold(state, late) == (state, [])


def test_a_buffer_smaller_than_its_count_is_full_when_everybody_left_has_answered():
    state, _ = training(plan("abc", kind="buffer", count=2))
    state, commands = fold(state, Refused(run="run", site="c", words="no"), answer(state, "a"), answer(state, "b"))
    assert merges(commands) == [("a", "b")]
    state, _ = training(plan("abc", kind="buffer", count=2))
    state, _ = fold(state, answer(state, "a"), Refused(run="run", site="a", words="no"))
    assert state.arrived == ()


# --- restart


def test_a_restart_while_planning_plans_again():
    state, _ = submitted()
    state, commands = fold(state, Restarted(run="run"))
    assert (state.phase, state.epoch, commands) == ("planning", 1, [MakePlan()])


def test_a_restart_keeps_the_answers_at_hand_and_has_the_missing_ones_again():
    state, _ = training(plan())
    before = answer(state, "c")
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    state, commands = fold(state, Restarted(run="run", missing=("b",)))
    assert (state.epoch, state.live) == (1, frozenset())
    assert [(kept.site, kept.epoch) for kept in state.arrived] == [("a", 1)]
    assert commands == [Alarm(1, 60.0, final=True)]
    assert fold(state, before) == (state, [])  # an answer to the hub that died
    state, commands = fold(state, *joined("a", "b", "c"))
    assert assigned(commands) == ["b", "c"]
    assert merges(fold(state, answer(state, "b"), answer(state, "c"))[1]) == [("a", "b", "c")]


def test_a_restart_while_merging_merges_again_and_the_merge_counts_once():
    state, _ = training(plan("ab"))
    state, first = fold(state, answer(state, "b"), answer(state, "a"))
    state, second = fold(state, Restarted(run="run"))
    assert merges(first) == merges(second) == [("a", "b")]
    state, _ = fold(state, merged(state))
    assert state.version == 1


def test_a_restart_while_merging_with_an_answer_gone_waits_for_it():
    state, _ = training(plan("ab"))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    state, commands = fold(state, Restarted(run="run", missing=("a",)), *joined("a", "b"))
    assert (merges(commands), assigned(commands), state.merging) == ([], ["a"], ())


def test_a_restart_forgets_that_the_deadline_passed_and_sets_it_anew():
    state, _ = training(plan(**QUORUM))
    state, _ = fold(state, answer(state, "a"), Expired(run="run", position=1))
    state, commands = fold(state, Restarted(run="run"))
    assert not state.lapsed
    assert commands == [Alarm(1, 60.0, final=True), Alarm(1, 5.0, final=False)]


def test_a_restart_before_the_model_is_published_publishes_again():
    state, _ = training(plan("ab", rounds=1))
    state, _ = fold(state, answer(state, "a"), answer(state, "b"))
    state, _ = fold(state, merged(state))
    state, commands = fold(state, Restarted(run="run"))
    assert (state.work, commands) == ("publish", [Publish()])


def test_a_restart_does_not_bring_back_what_a_site_gave_before_it_refused():
    state, _ = training(plan("abcd", rounds=3, kind="quorum", count=2))
    state, _ = fold(state, *(answer(state, site) for site in "abcd"))
    state, _ = fold(state, Refused(run="run", site="d", words="no"))  # its answer is being merged
    assert len(state.merging) == 4
    _, commands = fold(state, Restarted(run="run"))
    assert merges(commands) == [("a", "b", "c")]


def test_after_a_restart_a_buffer_still_knows_what_it_has_merged():
    state, _ = training(plan(rounds=3, **BUFFER))
    state, _ = fold(state, answer(state, "a"), answer(state, "c"))
    state, _ = fold(state, merged(state))
    state, _ = fold(state, Restarted(run="run"), *joined("a", "b", "c"))
    again = answer(state, "a", position=1, version=0)
    assert fold(state, again) == (state, [])
    assert fold(state, answer(state, "b", position=1, version=0))[0].arrived != ()
