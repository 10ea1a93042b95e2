"""Scripted faults against the real state machine in simulated time: who is lost, slow, away or restarted, and when."""

import random

import pytest

from atoll.runtime.machine import begin, step
from atoll.runtime.simulator import Pace, fail, lose, refuse, release, restart_hub, simulate, slow, spoil
from atoll.spec.event import Answered, Barred, Expired, Joined, Merged, Published, Rejected, Restarted
from atoll.spec.job import parse_job
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync

JOB = parse_job(
    {
        "kind": "train",
        "name": "job",
        "purpose": "care",
        "task": {"file": "task.py", "name": "Task"},
        "data": {"dataset": "rows"},
    },
    "job",
)
MEASURED = JOB.model_copy(update={"data": JOB.data.model_copy(update={"statistics": ("age",)})})
CITIES = ("lyon", "oslo", "rome", "turku")
# Every answer takes the same time, so that a script decides who is late and not the seed.
STEADY = Pace(spread=0.0)


def plan(sites=CITIES, rounds=4, evaluators=(), **wait):
    sync = Sync.model_validate({"wait": {"patience": 60, "deadline": 5, **wait}})
    layouts = {site: Layout() for site in sites}
    return Plan(sites=sites, evaluators=evaluators, layouts=layouts, sync=sync, rounds=rounds)


def rounds(outcome):
    """Return the sites of each train round's merge; the first merge is of the first weights."""
    return merges(outcome)[1 : outcome.state.version + 1]


def merges(outcome):
    """Return the sites of each stage's merge."""
    return [event.sites for _, event in outcome.journal if isinstance(event, Merged)]


def refolded(outcome):
    events = [event for _, event in outcome.journal]
    state, _ = begin(events[0])
    for event in events[1:]:
        state, _ = step(state, event)
    return state


def test_an_undisturbed_run_takes_everybody_every_round():
    outcome = simulate(JOB, plan())
    assert outcome.state.phase == "finished"
    assert rounds(outcome) == [CITIES] * 4
    assert outcome.assignments == 1 + 4 * len(CITIES)


def test_all_waits_for_a_site_that_was_lost_until_it_is_back():
    outcome = simulate(JOB, plan(), [lose("lyon", at_round=3, back_after=20.0)], pace=STEADY)
    assert rounds(outcome) == [CITIES] * 4
    assert outcome.seconds > 20.0


def test_all_ends_in_words_when_a_lost_site_never_comes_back():
    outcome = simulate(JOB, plan(), [lose("lyon", at_round=3)], pace=STEADY)
    assert (outcome.state.phase, outcome.state.version) == ("failed", 2)
    assert outcome.state.words == "no answer to 'train' from lyon in 60 s (sync.wait.patience)"


def test_a_quorum_goes_on_without_a_lost_site_and_takes_it_again_when_it_is_back():
    script = [lose("lyon", at_round=2, back_after=7.0)]
    outcome = simulate(JOB, plan(rounds=5, kind="quorum", count=3), script, pace=STEADY)
    assert outcome.state.phase == "finished"
    assert rounds(outcome) == [CITIES, CITIES[1:], CITIES, CITIES, CITIES]


def test_a_quorum_leaves_a_slow_site_out_and_its_late_answers_change_nothing():
    outcome = simulate(JOB, plan(kind="quorum", count=2), [slow("oslo", factor=8.0, at_round=2)], pace=STEADY)
    others = ("lyon", "rome", "turku")
    assert rounds(outcome) == [CITIES, others, others, others]
    assert outcome.state.phase == "finished"
    late = [event.answer for _, event in outcome.journal if isinstance(event, Answered) and event.answer.site == "oslo"]
    assert [answer.version for answer in late] == [0, 1, 2]  # the last two came after their rounds were merged


def test_a_quorum_goes_on_at_once_without_a_site_that_fails_also_when_the_hub_dies_in_that_round():
    script = [fail("oslo", at_round=2, times=2)]
    undisturbed = simulate(JOB, plan(kind="quorum", count=2), script, pace=STEADY)
    others = ("lyon", "rome", "turku")
    assert rounds(undisturbed) == [CITIES, others, others, CITIES]
    assert undisturbed.state.result.failed == {"oslo": "oslo: loss is nan"}
    assert undisturbed.seconds < 10.0  # it waits for no deadline
    script += [slow("oslo", 0.3), restart_hub(at_round=2), restart_hub(at_round=3)]  # it has failed by then
    disturbed = simulate(JOB, plan(kind="quorum", count=2), script, pace=STEADY)
    assert (disturbed.state.epoch, disturbed.state.weights) == (2, undisturbed.state.weights)
    assert refolded(disturbed) == disturbed.state


def test_a_task_that_fails_everywhere_ends_a_quorum_and_a_buffer_in_the_first_words():
    for kind in ("quorum", "buffer"):
        script = [slow(site, 1.0 + number) for number, site in enumerate(CITIES)]
        script += [fail(site, times=10) for site in CITIES]
        outcome = simulate(JOB, plan(kind=kind, count=2), script, pace=STEADY)
        assert (outcome.state.phase, outcome.state.words) == ("failed", "lyon: loss is nan")


def test_a_quorum_that_too_few_are_left_for_ends_in_words():
    script = [lose(site, at_round=2) for site in CITIES[1:]]
    outcome = simulate(JOB, plan(kind="quorum", count=2), script, pace=STEADY)
    assert outcome.state.phase == "failed"
    assert outcome.state.words.startswith("no answer to 'train' from oslo, rome, turku")


def test_a_buffer_is_never_held_up_by_a_slow_site():
    script = [slow("rome", factor=50.0)]
    outcome = simulate(JOB, plan(rounds=12, kind="buffer", count=2), script, pace=STEADY)
    assert outcome.state.phase == "finished"
    assert outcome.seconds < 50.0  # simulated: one answer of rome's takes longer
    assert all("rome" not in sites for sites in rounds(outcome))


def test_a_buffer_takes_a_late_answer_in_a_later_round_with_its_version():
    script = [slow("rome", factor=3.0)]
    outcome = simulate(JOB, plan(rounds=12, kind="buffer", count=2), script, pace=STEADY)
    taken = [number for number, sites in enumerate(rounds(outcome)) if "rome" in sites]
    assert taken
    assert taken[0] > 0
    [first, *_] = [e.answer for _, e in outcome.journal if isinstance(e, Answered) and e.answer.site == "rome"]
    assert first.version < taken[0]


@pytest.mark.parametrize("wait", [{}, {"kind": "quorum", "count": 2}, {"kind": "buffer", "count": 2}])
def test_a_restarted_hub_finishes_under_a_higher_epoch(wait):
    outcome = simulate(JOB, plan(**wait), [restart_hub(at_round=1), restart_hub(at_round=3)], pace=STEADY)
    assert (outcome.state.phase, outcome.state.version, outcome.state.epoch) == ("finished", 4, 2)


def test_a_restart_with_updates_gone_has_them_again():
    script = [slow("turku", 20.0, at_round=2), restart_hub(at_round=2, missing=("lyon",))]
    outcome = simulate(JOB, plan(), script, pace=STEADY)
    assert rounds(outcome) == [CITIES] * 4
    assert sum(isinstance(event, Restarted) for _, event in outcome.journal) == 1


def test_with_everybody_there_a_restart_changes_no_weights():
    undisturbed = simulate(JOB, plan())
    restarted = simulate(JOB, plan(), [restart_hub(at_round=r) for r in (1, 2, 3, 4)])
    assert restarted.state.weights == undisturbed.state.weights
    assert restarted.seconds > undisturbed.seconds


def test_a_refusal_ends_all_and_shrinks_a_quorum():
    assert simulate(JOB, plan(), [refuse("oslo", at_round=2)]).state.words == "oslo refuses"
    outcome = simulate(JOB, plan(kind="quorum", count=2), [refuse("oslo", at_round=2)], pace=STEADY)
    assert outcome.state.phase == "finished"
    assert rounds(outcome)[1:] == [("lyon", "rome", "turku")] * 3


def test_a_site_that_is_away_stays_away_when_the_hub_restarts():
    script = [lose("lyon", at_round=2), restart_hub(at_round=3)]
    outcome = simulate(JOB, plan(kind="quorum", count=2), script, pace=STEADY)
    assert outcome.state.phase == "finished"
    joins = [event.site for _, event in outcome.journal if isinstance(event, Joined)]
    assert (joins.count("lyon"), joins.count("oslo")) == (1, 2)


# --- the stages around the training


STAGES = ("measure", "initialise", "train", "evaluate")
WAITS = [{"kind": "quorum", "count": 2}, {"kind": "buffer", "count": 2}]
waiting = pytest.mark.parametrize("wait", WAITS, ids=["quorum", "buffer"])


def whole(*script, seed=0, **wait):
    """Simulate a run with every stage there is."""
    return simulate(MEASURED, plan(rounds=2, evaluators=CITIES, **wait), script, seed=seed, pace=STEADY)


@waiting
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("city", CITIES[:2])
def test_a_site_lost_for_good_in_any_stage_ends_no_run_that_may_go_on_without_it(stage, city, wait):
    outcome = whole(lose(city, at_stage=stage), **wait)
    assert (outcome.state.phase, outcome.state.version) == ("finished", 2)
    assert outcome.state.result.missing == (city,)
    assert city not in merges(outcome)[-1]
    assert outcome.seconds < 60  # nobody's patience was needed
    assert refolded(outcome) == outcome.state


@pytest.mark.parametrize("stage", STAGES)
def test_under_all_a_site_lost_for_good_ends_the_run_in_words(stage):
    outcome = whole(lose("lyon", at_stage=stage))
    assert outcome.state.words == f"no answer to '{stage}' from lyon in 60 s (sync.wait.patience)"


@waiting
@pytest.mark.parametrize("stage", STAGES)
def test_a_hub_that_dies_in_any_stage_finishes_it_and_names_nobody_missing(stage, wait):
    outcome = whole(restart_hub(at_stage=stage), **wait)
    assert (outcome.state.phase, outcome.state.epoch, outcome.state.result.missing) == ("finished", 1, ())
    assert refolded(outcome) == outcome.state


def test_a_hub_that_dies_while_publishing_publishes_once():
    outcome = whole(restart_hub(at_stage="publish"))
    assert (outcome.state.phase, outcome.state.epoch) == ("finished", 1)
    assert sum(isinstance(event, Published) for _, event in outcome.journal) == 1


@waiting
@pytest.mark.parametrize("stage", STAGES)
def test_a_refusal_in_any_stage_ends_no_run_that_may_go_on_without_the_site(stage, wait):
    outcome = whole(refuse("lyon", at_stage=stage), **wait)
    assert (outcome.state.phase, outcome.state.result.missing) == ("finished", ())
    assert refolded(outcome) == outcome.state


@waiting
def test_a_site_lost_while_measuring_is_back_for_the_rounds(wait):
    outcome = whole(lose("oslo", at_stage="measure", back_after=6.0), **wait)
    assert merges(outcome)[0] == ("lyon", "rome", "turku")
    assert any("oslo" in sites for sites in trained(outcome))
    assert outcome.state.result.missing == ("oslo",)


def trained(outcome):
    """Return the sites of each train round's merge in a run that measured first."""
    return merges(outcome)[2 : outcome.state.version + 2]


@waiting
def test_a_slow_evaluator_is_named_and_its_late_answer_changes_nothing(wait):
    outcome = whole(slow("rome", factor=20.0, at_stage="evaluate"), **wait)
    assert outcome.state.result.missing == ("rome",)
    assert merges(outcome)[-1] == ("lyon", "oslo", "turku")


def test_first_weights_that_are_slow_are_asked_of_another_site_and_taken_once():
    outcome = whole(slow("lyon", factor=9.0, at_stage="initialise"), kind="quorum", count=4)
    assert merges(outcome)[1] == ("oslo",)
    assert trained(outcome)[0] == CITIES


@waiting
@pytest.mark.parametrize("seed", range(5))
def test_any_three_faults_in_any_stages_leave_a_run_that_ends(seed, wait):
    rng = random.Random(seed)
    for _ in range(20):
        kinds = [lose, refuse, restart_hub]
        stages = [rng.choice((*STAGES, "publish")) for _ in range(3)]
        script = [
            make(at_stage=stage) if make is restart_hub else make(rng.choice(CITIES), at_stage=stage)
            for make, stage in zip(rng.choices(kinds, k=3), stages, strict=True)
        ]
        outcome = whole(*script, seed=seed, **wait)
        assert outcome.state.over, script
        assert refolded(outcome) == outcome.state


# --- answers that cannot be taken


@waiting
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("city", CITIES[:2])
def test_an_answer_that_cannot_be_taken_in_any_stage_costs_its_site_that_stage_at_most(stage, city, wait):
    outcome = whole(spoil(city, at_stage=stage), **wait)
    assert (outcome.state.phase, outcome.state.version) == ("finished", 2)
    # For the first weights only lyon is asked, so that oslo's next answer is one of the first round's.
    assert [event.site for _, event in outcome.journal if isinstance(event, Rejected)] == [city]
    assert outcome.seconds < whole(**wait).seconds + 2 * STEADY.train  # no deadline was waited for
    assert refolded(outcome) == outcome.state


def test_a_quorum_goes_on_at_once_without_the_site_and_takes_its_next_round():
    outcome = simulate(JOB, plan(kind="quorum", count=2), [spoil("oslo", at_round=2)], pace=STEADY)
    others = ("lyon", "rome", "turku")
    assert rounds(outcome) == [CITIES, others, CITIES, CITIES]
    assert outcome.seconds == simulate(JOB, plan(kind="quorum", count=2), pace=STEADY).seconds


def test_a_quorum_that_needs_the_site_asks_it_again():
    outcome = simulate(JOB, plan(kind="quorum", count=4), [spoil("oslo", at_round=2, times=2)], pace=STEADY)
    assert (outcome.state.phase, rounds(outcome)) == ("finished", [CITIES] * 4)
    assert outcome.assignments == 1 + 4 * len(CITIES) + 2


def test_a_site_that_was_to_be_gone_on_without_is_asked_again_once_another_is_lost():
    script = [spoil("lyon"), slow("oslo", factor=3.0), slow("rome", factor=3.0), slow("turku", factor=3.0)]
    state = simulate(JOB, plan(rounds=1, kind="quorum", count=3), script, pace=STEADY)
    assert merges(state)[1:] == [CITIES[1:]]
    state = simulate(JOB, plan(rounds=1, kind="quorum", count=4), script, pace=STEADY)
    assert merges(state)[1:] == [CITIES]


@pytest.mark.parametrize("times", [1, 2])
def test_under_all_the_site_is_asked_again_and_two_bad_answers_change_nothing_but_the_time(times):
    outcome = simulate(JOB, plan(), [spoil("oslo", at_round=2, times=times)], pace=STEADY)
    assert (outcome.state.phase, rounds(outcome)) == ("finished", [CITIES] * 4)
    assert outcome.state.weights == simulate(JOB, plan(), pace=STEADY).state.weights


@pytest.mark.parametrize("stage", STAGES)
def test_under_all_three_bad_answers_in_a_row_end_the_run_in_words_that_say_what_to_do(stage):
    outcome = whole(spoil("lyon", at_stage=stage, times=3))
    words = "lyon: not finite: in quarantine until `atoll site release lyon`"
    assert (outcome.state.phase, outcome.state.words, outcome.state.error) == ("failed", words, "Invalid")
    assert refolded(outcome) == outcome.state


@waiting
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("city", CITIES[:2])
def test_a_site_that_brings_nothing_good_ends_no_run_that_may_go_on_without_it(stage, city, wait):
    outcome = whole(spoil(city, at_stage=stage, times=10**6), **wait)
    assert (outcome.state.phase, outcome.state.version) == ("finished", 2)
    assert city not in merges(outcome)[-1]
    assert 1 <= sum(isinstance(event, Rejected) for _, event in outcome.journal) <= 3
    assert refolded(outcome) == outcome.state


def test_a_site_that_is_released_is_given_the_round_that_is_open():
    script = [spoil("rome", at_round=1, times=3), release("rome", at_round=5)]
    outcome = simulate(JOB, plan(rounds=6, kind="quorum", count=2), script, pace=STEADY)
    assert (outcome.state.phase, sum(isinstance(event, Barred) for _, event in outcome.journal)) == ("finished", 1)
    assert ["rome" in sites for sites in rounds(outcome)] == [False] * 4 + [True] * 2


# --- many sites


MANY = tuple(f"site-{number:04}" for number in range(1000))


def five_percent_lost(seed, back_after):
    rng = random.Random(seed)
    return [lose(site, at_round, back_after) for at_round in range(1, 11) for site in rng.sample(MANY, 50)]


def many(seed=3):
    wait = {"kind": "quorum", "count": 800, "deadline": 4}
    return simulate(JOB, plan(MANY, rounds=10, **wait), five_percent_lost(seed, back_after=6.0), seed=seed)


def test_a_thousand_sites_of_which_a_twentieth_is_lost_each_round_finish_ten_rounds():
    outcome = many()
    assert (outcome.state.phase, outcome.state.version) == ("finished", 10)
    assert all(800 <= len(sites) <= 1000 for sites in rounds(outcome))
    assert any(len(sites) < 1000 for sites in rounds(outcome))
    assert any(isinstance(event, Expired) for _, event in outcome.journal)
    assert refolded(outcome) == outcome.state


@pytest.mark.parametrize("wait", [{}, {"kind": "quorum", "count": 20}, {"kind": "buffer", "count": 10}])
def test_a_seed_reproduces_a_run_exactly_and_another_seed_another_run(wait):
    def some(seed):
        script = [lose(site, at_round=2, back_after=3.0) for site in MANY[:5]] + [restart_hub(at_round=3)]
        return simulate(JOB, plan(MANY[:30], rounds=5, **wait), script, seed=seed)

    assert some(1).journal == some(1).journal
    assert some(1).journal != some(2).journal
    assert some(1).state.phase == "finished"
