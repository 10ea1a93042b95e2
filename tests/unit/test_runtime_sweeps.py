"""A sweep's pure parts with the real Optuna: what it suggests and prunes, which trial is the best, how it ends."""

import math
from dataclasses import replace

import pytest

from atoll.errors import Invalid
from atoll.runtime.machine import Dismiss, MakePlan, Search, begin, step
from atoll.runtime.trials import Began, Ended, Told, check_reported, in_words, outcome, outdone, trial_run, view
from atoll.spec.event import Broken, Cancelled, Joined, Lost, Outdone, Pruned, Restarted, Result, Submitted, Swept
from atoll.spec.job import parse_job
from atoll.spec.sweep import Sweep, Trial
from tests.unit.runs import fold, model, plan, train_job

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'atoll[sweep]'")
RATE = {"optimiser.rate": {"low": 1e-4, "high": 1.0, "log": True}}
MIXED = {
    **RATE,
    "batch": {"low": 8, "high": 64, "step": 8, "integer": True},
    "sync": {"choice": ["fedavg", {"preset": "fedadam"}, "diloco"]},
    "optimiser.momentum": {"low": 0.0, "high": 0.9, "step": 0.1},
}
ROUNDS = 9


def study(sweep):
    from atoll.runtime.study import Study

    return Study(sweep)


def sweep(parameters=RATE, **fields):
    return Sweep.model_validate({"parameters": parameters, **fields})


def searched(wanted, trials):
    """Search one trial after the other, losses falling towards (log10(rate) + 2) ** 2; return the facts and values."""
    made, facts, values = study(wanted), [], []

    def happened(fact):
        facts.append(fact)
        made.learn(fact)

    for number in range(1, trials + 1):
        values.append(made.suggest())
        floor = (math.log10(values[-1]["optimiser.rate"]) + 2) ** 2
        happened(Began(number, values[-1]))
        for at in range(1, ROUNDS + 1):
            happened(Told(number, at, floor + 1 / at, at == ROUNDS))
            if number in made.doomed:
                break
        happened(Ended(number, None if number in made.doomed else floor, number in made.doomed))
    return facts, values


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_facts_make_the_same_suggestion_in_another_study(sampler):
    wanted = sweep(MIXED, sampler=sampler, trials=15)
    facts, values = searched(wanted, 15)
    began = [index for index, fact in enumerate(facts) if isinstance(fact, Began)]
    for number in (0, 3, 11, 14):
        again = study(wanted)
        for fact in facts[: began[number]]:
            again.learn(fact)
        assert again.suggest() == values[number] == again.suggest()


def test_another_seed_suggests_otherwise():
    assert study(sweep(seed=1)).suggest() != study(sweep(seed=2)).suggest()


def test_suggestions_are_values_of_the_parameters():
    _, values = searched(sweep(MIXED, sampler="random", trials=30), 30)
    assert all(1e-4 <= one["optimiser.rate"] <= 1.0 for one in values)
    assert {type(one["batch"]) for one in values} == {int}
    assert {one["batch"] for one in values} == set(range(8, 65, 8))
    assert next(one["sync"] for one in values if isinstance(one["sync"], dict)) == {"preset": "fedadam"}
    assert all(round(one["optimiser.momentum"] * 10) / 10 == pytest.approx(one["optimiser.momentum"]) for one in values)


def test_a_grid_has_each_of_its_points_once():
    grid = {"optimiser.rate": {"low": 0.1, "high": 0.3, "step": 0.1}, "sync": {"choice": ["fedavg", "diloco"]}}
    _, values = searched(sweep(grid, sampler="grid", trials=6), 6)
    assert sorted((one["optimiser.rate"], one["sync"]) for one in values) == [
        (rate, sync) for rate in (0.1, 0.2, 0.3) for sync in ("diloco", "fedavg")
    ]


def test_the_search_comes_nearer_than_the_first_ten_random_trials():
    _, values = searched(sweep(trials=40, pruner={"kind": "none"}), 40)
    off = [abs(math.log10(one["optimiser.rate"]) + 2) for one in values]
    assert sum(off[10:]) / 30 < sum(off[:10]) / 10
    assert min(off) < 0.1


def test_a_trial_goes_on_while_it_is_among_the_best_third_at_its_rung():
    made = study(sweep(pruner={"min_rounds": 2, "factor": 3}))
    for number, loss in enumerate((0.6, 0.5, 0.55, 0.9), 1):
        made.learn(Began(number, {"optimiser.rate": 0.1 * number}))
        made.learn(Told(number, 1, 9.0 - loss, False))
        assert number not in made.doomed, "no rung is at round 1"
        made.learn(Told(number, 2, loss, False))
    assert made.doomed == {
        3: "pruned at round 2: loss 0.55, above the best third of those that came so far",
        4: "pruned at round 2: loss 0.9, above the best third of those that came so far",
    }
    made.learn(Ended(3, None, pruned=True))
    assert set(made.doomed) == {4}


def test_nothing_is_pruned_in_its_last_round_nor_where_nobody_is_to_be():
    last, none = study(sweep()), study(sweep(pruner={"kind": "none"}))
    for number, loss in enumerate((0.1, 0.9), 1):
        for made in (last, none):
            made.learn(Began(number, {"optimiser.rate": 0.1}))
        last.learn(Told(number, 1, loss, True))
        none.learn(Told(number, 1, loss, False))
    assert (last.doomed, none.doomed) == ({}, {})


# --- the machine, and what trials come to

SWEPT = {"parameters": RATE, "trials": 3, "objective": "accuracy", "direction": "maximise"}


def job(**swept):
    fields = train_job().model_dump(mode="json", exclude={"sweep"})
    return parse_job({**fields, "sweep": {**SWEPT, **swept}}, "job")


def searching(**swept):
    return begin(Submitted(run="sweep", user="ada", job=job(**swept), holders=("ada",)))


def trial(number, accuracy=None, **fields):
    """Return the state of a trial: finished with an accuracy, or as the fields say."""
    made = job()
    of = Trial(sweep="sweep", number=number, parameters={"optimiser.rate": 0.1 * number})
    run = trial_run(made, number)
    state, commands = begin(Submitted(run=run, user="ada", job=made.trial(of.parameters), trial=of))
    assert commands == [MakePlan()]
    known = {"phase": "finished"} if accuracy is not None else {}
    result = Result(metrics={"accuracy": accuracy} if accuracy is not None else {})
    return replace(state, **{"result": result, "losses": (0.5,), "plan": plan(), **known, **fields})


def test_a_sweep_is_searched_until_it_is_swept():
    state, commands = searching()
    assert (commands, state.phase, state.work, state.plan) == ([Search()], "running", None, None)
    state, commands = fold(state, Joined(run="sweep", site="ada"), Lost(run="sweep", site="ada"))
    assert (commands, state.over) == ([], False)
    state, commands = step(state, Restarted(run="sweep"))
    assert (commands, state.epoch) == ([Search()], 1)
    state, commands = step(state, Swept(run="sweep", result=Result(metrics={"accuracy": 0.9}), words="the best"))
    assert (state.phase, state.words, state.result.metrics) == ("finished", "the best", {"accuracy": 0.9})
    assert commands == [Dismiss("the best")]


def test_a_sweep_is_cancelled_and_fails_like_a_run():
    cancelled, _ = step(searching()[0], Cancelled(run="sweep", user="ada"))
    assert (cancelled.phase, cancelled.words) == ("cancelled", "cancelled by ada")
    failed, _ = step(searching()[0], Broken(run="sweep", site="hub", words="none finished", error="TaskFailed"))
    assert (failed.phase, failed.words, failed.error) == ("failed", "none finished", "TaskFailed")


def test_a_trial_is_pruned_or_outdone_and_publishes_nothing():
    state = begin(Submitted(run="run", user="ada", job=train_job()))[0]
    pruned, commands = step(state, Pruned(run="run", words="pruned at round 1"))
    assert (pruned.phase, pruned.pruned, pruned.words) == ("cancelled", True, "pruned at round 1")
    assert commands == [Dismiss("pruned at round 1")]
    ended, _ = step(state, Outdone(run="run", words="not registered"))
    assert (ended.phase, ended.result.model) == ("finished", None)
    cancelled, _ = step(state, Cancelled(run="run", user="hub", words="its sweep is over"))
    assert cancelled.words == "its sweep is over"


def states(*trials):
    return {state.run: state for state in (searching()[0], *trials)}


def test_only_a_trial_that_beats_all_before_it_is_registered():
    first, second = trial(1, 0.8), trial(2, 0.7)
    better, equal, worse = (
        trial(3, phase="running", result=Result(metrics={"accuracy": accuracy})) for accuracy in (0.81, 0.8, 0.5)
    )
    assert outdone(better, states(better)) == outdone(better, states(first, second, better)) == ""
    assert outdone(equal, states(first, second, equal)) == "not registered: accuracy 0.8, and trial 1 has 0.8"
    assert outdone(worse, states(first, second, worse)) == "not registered: accuracy 0.5, and trial 1 has 0.8"
    assert outdone(searching()[0], states()) == ""


def test_a_trial_without_the_objective_ends_the_search_with_what_there_is():
    other = trial(1, phase="running", result=Result(metrics={"accuracies": 0.5, "auc": 0.6}))
    words = "sweep.objective: 'accuracy' is not among what the task reports; did you mean 'accuracies'?"
    assert outdone(other, states(other)) == f"not registered: {words}"
    swept = searching()[0].sweep
    check_reported(swept, [trial(1, 0.5), trial(2, phase="failed"), trial(3)])
    with pytest.raises(Invalid, match="it reports no metric, so use loss"):
        check_reported(swept, [trial(1, 0.5), trial(2, phase="finished")])


def test_the_train_loss_stands_in_for_a_loss_that_the_task_does_not_report():
    swept = Sweep.model_validate({"parameters": RATE})
    train, held_out = trial(1, phase="finished", losses=(0.9, 0.3)), trial(2, phase="finished")
    held_out = trial(2, phase="finished", result=Result(metrics={"loss": 0.2}), losses=(0.9, 0.8))
    assert [one.objective for one in view(swept, [train, held_out], ()).trials] == [0.3, 0.2]


def test_a_sweep_ends_with_its_best_trial_in_words():
    published = Result(metrics={"accuracy": 0.9}, model=model().reference)
    trials = [trial(1, 0.8), trial(2, 0.9, result=published), trial(3, pruned=True, phase="cancelled")]
    end = outcome("sweep", searching()[0].sweep, trials)
    assert end.result == published
    assert end.words == f"trial 2 of 3 is the best ({trials[1].run}): accuracy 0.9 with optimiser.rate=0.2; 1 pruned"


def test_a_sweep_none_of_whose_trials_finished_fails_in_the_words_of_the_first():
    failed = trial(1, phase="failed", words="ada: loss is nan", error="TaskFailed")
    end = outcome("sweep", searching()[0].sweep, [failed, trial(2, phase="cancelled")])
    assert isinstance(end, Broken)
    assert (end.error, end.site) == ("TaskFailed", "hub")
    assert end.words == (
        f"none of 2 trials finished (1 failed, 1 cancelled); the first that failed is {failed.run}: ada: loss is nan"
    )


def test_a_view_tells_each_trial_and_the_best_so_far():
    trials = [trial(1, 0.7), trial(2, 0.9), trial(3, 0.8), trial(4, phase="running", result=Result())]
    shown = view(searching()[0].sweep, trials, {trials[3].run})
    assert (shown.best, shown.bests, shown.asked) == (2, (0.7, 0.9, 0.9), 3)
    assert [one.state for one in shown.trials] == ["finished"] * 3 + ["running"]
    assert view(searching()[0].sweep, trials[3:], ()).trials[0].state == "interrupted"


def test_names_of_trials_are_names_and_differ():
    long = job().model_copy(update={"name": "j" * 63})
    names = {trial_run(long, number) for number in (1, 1, 2, 1000)}
    assert len(names) == 4, "a name is drawn: who knows the sweep does not know what its next trial is called"
    assert all(len(name) <= 63 for name in names)
    assert trial_run(job(), 3).startswith("job-t003-")


def test_values_are_told_in_one_line():
    assert in_words({"rate": 0.123456, "batch": 8, "sync": "diloco", "wire": [1, True]}) == (
        "rate=0.1235, batch=8, sync=diloco, wire=[1, true]"
    )
