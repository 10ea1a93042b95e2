"""The run as a pure state machine: each event in each phase, and random walks that must neither wedge nor repeat."""

import pytest

from atoll.runtime.machine import Alarm, AssignTo, Dismiss, MakePlan, Merge, Publish, begin, expects, stages, step
from atoll.spec.event import (
    Answer,
    Answered,
    Broken,
    Cancelled,
    Expired,
    Joined,
    Lost,
    Merged,
    Planned,
    Published,
    Refused,
    Restarted,
    Result,
    Submitted,
)
from atoll.spec.job import parse_job
from atoll.spec.model import Lineage, Model, Moments, TensorSpec
from atoll.spec.plan import Layout, Plan, Sync

ZERO = "sha256:" + 64 * "0"
ONE = "sha256:" + 64 * "1"


def train_job(**data):
    task = {"file": "task.py", "name": "Task"}
    return parse_job(
        {"kind": "train", "name": "job", "purpose": "care", "task": task, "data": {"dataset": "rows", **data}}, "job"
    )


def query_job():
    job = {"kind": "query", "name": "ask", "purpose": "care", "sql": "select count(*) from rows", "dataset": "rows"}
    return parse_job(job, "job")


def plan(sites="abc", rounds=2, evaluators="", initialiser=None, **wait):
    sync = Sync.model_validate({"preset": "fedavg", "wait": {"patience": 60, "deadline": 5, **wait}})
    layouts = {site: Layout() for site in sites}
    names = {"sites": tuple(sites), "evaluators": tuple(evaluators), "initialiser": initialiser}
    return Plan(layouts=layouts, sync=sync, rounds=rounds, **names)


def fold(state, *events):
    """Fold events and return the last state with the commands of all of them."""
    commands = []
    for event in events:
        state, more = step(state, event)
        commands += more
    return state, commands


def submitted(job=None):
    return begin(Submitted(run="run", user="ada", job=job or train_job()))


def joined(*sites):
    return [Joined(run="run", site=site) for site in sites]


def running(made, *sites, job=None):
    """Return a run under this plan with these sites there, in its first stage."""
    state, _ = submitted(job)
    return fold(state, *joined(*(sites or made.sites)), Planned(run="run", plan=made))


def answer(state, site, **more):
    place = {"position": state.position, "epoch": state.epoch, "version": state.version}
    return Answered(run="run", answer=Answer(site=site, **{**place, **more}))


def merged(state, *sites, **more):
    return Merged(run="run", position=state.position, sites=sites or tuple(a.site for a in state.merging), **more)


def training(made, *sites):
    """Return a run in its first train round: its first weights are merged."""
    state, _ = running(made, *sites)
    state, _ = fold(state, answer(state, made.initialiser or made.sites[0]))
    return fold(state, merged(state, weights=ZERO))


def assigned(commands):
    return [command.site for command in commands if isinstance(command, AssignTo)]


def merges(commands):
    return [tuple(answer.site for answer in command.answers) for command in commands if isinstance(command, Merge)]


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


def model():
    lineage = Lineage(run="run", job=ZERO, plan=ZERO, code=ZERO)
    return Model(name="job", version=1, weights=ONE, code=ZERO, task="T", file="t.py", signature=(), lineage=lineage)


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


# --- quorum


QUORUM = {"kind": "quorum", "count": 2}


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


def test_only_training_rounds_may_go_on_with_a_quorum():
    state, commands = running(plan(**QUORUM), job=train_job(statistics=["age"]))
    assert [command.final for command in commands if isinstance(command, Alarm)] == [True]
    state, commands = fold(state, answer(state, "a"), answer(state, "b"), Expired(run="run", position=0))
    assert merges(commands) == []


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


BUFFER = {"kind": "buffer", "count": 2}


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
