"""Scripted faults against the real state machine in simulated time: who is lost, slow, away or restarted, and when."""

import random

import pytest

from atoll.runtime.machine import begin, step
from atoll.runtime.simulator import Pace, lose, refuse, restart_hub, simulate, slow
from atoll.spec.event import Answered, Expired, Joined, Merged, Restarted
from atoll.spec.job import parse_job
from atoll.spec.plan import Layout, Plan, Sync

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
CITIES = ("lyon", "oslo", "rome", "turku")
# Every answer takes the same time, so that a script decides who is late and not the seed.
STEADY = Pace(spread=0.0)


def plan(sites=CITIES, rounds=4, evaluators=(), **wait):
    sync = Sync.model_validate({"wait": {"patience": 60, "deadline": 5, **wait}})
    layouts = {site: Layout() for site in sites}
    return Plan(sites=sites, evaluators=evaluators, layouts=layouts, sync=sync, rounds=rounds)


def rounds(outcome):
    """Return the sites of each train round's merge; the first merge is of the first weights."""
    return [event.sites for _, event in outcome.journal if isinstance(event, Merged)][1 : outcome.state.version + 1]


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
