"""Sweeps over the memory channel: trials are runs, some end early, the best is registered, and a new hub goes on."""

import math
import threading

import numpy as np
import pyarrow as pa
import pytest

from atoll.errors import Denied, Invalid, TaskFailed
from atoll.policy.defaults import HUB_POLICY
from atoll.runtime.hub import Hub
from atoll.spec.job import parse_job
from atoll.spec.model import Bundle
from atoll.spec.order import Reply
from atoll.spec.user import LOCAL
from tests import memory
from tests.scenarios.worlds import BUNDLE, ROUNDS, World
from tests.undeployed import NothingDeployed
from tests.unit.places import BATCH, SIZE, STEPS, WAIT, WEIGHTS, eventually

pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'atoll[sweep]'")
RATE = {"optimiser.rate": {"low": 1e-4, "high": 1.0, "log": True}}
NAMES = ("ada", "bob")


class Searched(World):
    """Sites at which a job does the better, the nearer its rate is to 0.01: by its loss and by its accuracy."""

    def __init__(self, home, names):
        super().__init__(home, names)
        for name in names:
            self.workers[name].answers["evaluate"] = self._evaluate

    def _train(self, name, order, goal):
        assert self.may_train[name].wait(WAIT)
        off = abs(math.log10(order.optimiser.rate) + 2)
        np.full(SIZE, (1 - off / 3) / ROUNDS, np.float32).tofile(order.output)
        return Reply(examples=STEPS * BATCH, loss=off + 1 / (order.version + 1))

    def _evaluate(self, order, group):
        right = float(np.mean(np.fromfile(order.weights, np.float32) - WEIGHTS)) * 10
        return Reply(examples=10, totals={"accuracy": {"total": right, "count": 10}})

    def search(self, **sweep):
        """Submit a sweep once all sites are here, and return its run."""
        assert eventually(lambda: len(self.hub.fleet().sites) == len(self.names))
        return self.hub.submit(self.job(**sweep), BUNDLE, LOCAL)

    def job(self, **sweep):
        fields = {"kind": "train", "name": "job", "purpose": "care", "steps": ROUNDS * STEPS, "batch": BATCH}
        fields |= {"task": {"file": "task.py", "name": "Task"}, "data": {"dataset": "rows"}, "layout": {"data": 1}}
        fields |= {"sync": {"preset": "fedavg", "period": STEPS}, "sweep": {"parameters": RATE, **sweep}}
        return parse_job(fields, "job")

    def trials(self, run):
        return self.hub.run(run).sweep.trials


@pytest.fixture
def world(tmp_path):
    made = Searched(tmp_path, NAMES)
    for name in NAMES:
        made.start(name)
    yield made
    made.close()


def off(trial):
    return abs(math.log10(trial.parameters["optimiser.rate"]) + 2)


def test_a_sweep_finds_the_best_of_its_trials_and_prunes_others(world):
    run = world.search(trials=12, concurrent=3)
    view = world.end(run)
    assert view.state == "finished", view.words
    found = view.sweep.trials
    assert [one.number for one in found] == list(range(1, 13))
    assert {one.state for one in found} == {"finished", "pruned"}
    finished = [one for one in found if one.state == "finished"]
    best = min(finished, key=lambda one: one.objective)
    assert (view.sweep.best, best.objective) == (best.number, pytest.approx(off(best) + 1 / ROUNDS))
    assert off(best) < 0.5 < max(off(one) for one in found)
    pruned = next(one for one in found if one.state == "pruned")
    assert pruned.words.startswith(f"pruned at round {pruned.round}: loss ")
    assert (view.round, view.rounds, view.plan) == (12, 12, None)
    assert view.words.startswith(f"trial {best.number} of 12 is the best ({best.run}): loss ")


def test_a_trial_is_an_ordinary_run_with_a_plan_and_policy_questions_of_its_own(world):
    run = world.search(trials=2, pruner={"kind": "none"})
    world.end(run)
    for trial in world.trials(run):
        view = world.hub.run(trial.run)
        assert (view.state, view.trial.sweep, view.trial.number) == ("finished", run, trial.number)
        assert view.plan.sites == NAMES
        planned = {one.subject for one in world.journalled("decision", trial.run) if one.action == "plan"}
        assert planned == {f"{name}/job" for name in NAMES}
        assert len([line for line in world.hub.record.explain(trial.run) if line.kind == "run.merged"]) == ROUNDS + 2
    assert {view.run for view in world.hub.runs()} == {run, *(trial.run for trial in world.trials(run))}
    assert len([one for one in world.journalled("decision") if one.action == "submit"]) == 3


def test_only_trials_that_beat_all_before_them_are_registered_and_the_newest_is_the_best(world):
    run = world.search(
        trials=8, concurrent=1, sampler="random", objective="accuracy", direction="maximise", pruner={"kind": "none"}
    )
    view = world.end(run)
    marks = [one.objective for one in view.sweep.trials]
    assert marks == [pytest.approx(1 - off(one) / 3, abs=1e-5) for one in view.sweep.trials]
    records = [one for number, one in enumerate(view.sweep.trials) if one.objective > max([-1.0, *marks[:number]])]
    assert 0 < len(records) < 8
    models = [model for model in world.hub.models() if model.name == "job"]
    assert [(model.version, model.lineage.run) for model in models] == list(enumerate((one.run for one in records), 1))
    newest = world.hub.model("job")
    assert (view.result.model, view.result.metrics) == (newest.reference, newest.metrics)
    assert newest.metrics == {"accuracy": max(marks)}
    lineage = world.hub.lineage("job")
    assert (lineage.doubts, lineage.origin.job.optimiser.rate) == ((), records[-1].parameters["optimiser.rate"])
    assert f"trial {records[-1].number} of {run}" in lineage.branch().below[0].text
    others = [one for one in view.sweep.trials if one not in records]
    assert all(one.model is None and one.words.startswith("not registered: accuracy ") for one in others)


def test_cancelling_a_sweep_ends_its_trials_with_it(world):
    world.may_train["ada"].clear()
    run = world.search(trials=4, concurrent=2)
    assert eventually(lambda: [one.state for one in world.trials(run)] == ["running"] * 2)
    world.hub.cancel(run, LOCAL)
    assert {view.state for view in world.hub.runs()} == {"cancelled"}
    assert [one.words for one in world.trials(run)] == ["its sweep was cancelled by local"] * 2
    assert world.hub.run(run).words == "cancelled by local"
    world.may_train["ada"].set()
    assert eventually(lambda: not [one for one in threading.enumerate() if one.name.startswith("sweep-")])
    assert len(world.trials(run)) == 2


def test_a_trial_that_is_cancelled_counts_as_failed_and_the_sweep_goes_on(world):
    world.may_train["ada"].clear()
    run = world.search(trials=3, concurrent=1, pruner={"kind": "none"})
    assert eventually(lambda: [one.state for one in world.trials(run)] == ["running"])
    world.hub.cancel(world.trials(run)[0].run, LOCAL)
    world.may_train["ada"].set()
    view = world.end(run)
    assert [one.state for one in view.sweep.trials] == ["cancelled", "finished", "finished"]
    assert view.words.endswith("; 1 cancelled")


def test_a_trial_that_fails_is_one_less_and_a_sweep_of_failures_fails(world):
    done = world.workers["ada"].answers["train"]

    def diverge(order, group):
        if order.optimiser.rate > limit:
            raise TaskFailed("loss is nan at step 4 of the run; lower the optimiser's rate or look at the data")
        return done(order, group)

    limit, world.workers["ada"].answers["train"] = 0.05, diverge
    view = world.end(world.search(trials=6, sampler="random", pruner={"kind": "none"}))
    states = {one.state: one for one in view.sweep.trials}
    assert (view.state, set(states)) == ("finished", {"finished", "failed"})
    assert "loss is nan" in states["failed"].words

    limit = 0.0
    view = world.end(world.search(trials=2))
    assert (view.state, view.error) == ("failed", "TaskFailed")
    assert view.words.startswith("none of 2 trials finished (2 failed); the first that failed is job-t001-")


def test_an_objective_that_the_task_does_not_report_is_told_after_the_first_trial(world):
    run = world.search(trials=9, concurrent=1, objective="acuracy", direction="maximise")
    view = world.end(run)
    assert (view.state, view.error) == ("failed", "Invalid")
    words = "sweep.objective: 'acuracy' is not among what the task reports; did you mean 'accuracy'?"
    assert view.words == words
    assert [(one.state, one.model, one.words) for one in view.sweep.trials][:1] == [
        ("finished", None, f"not registered: {words}")
    ]
    assert eventually(lambda: all(one.over for one in world.hub.runs()))
    assert len(view.sweep.trials) <= 2
    assert world.hub.models() == []


def test_the_hubs_rules_are_asked_about_each_trial(world):
    world.may_train["ada"].clear()
    run = world.search(trials=3, concurrent=1)
    assert eventually(lambda: world.trials(run) and world.trials(run)[0].state == "running")
    file = world.home / "hub" / "policy.cedar"
    file.write_text(HUB_POLICY + '@id("no") forbid (principal, action == Action::"submit", resource);', "utf-8")
    world.may_train["ada"].set()
    view = world.end(run)
    assert (view.state, view.error) == ("failed", Denied.__name__)
    assert "rule no" in view.words


def test_a_hub_that_begins_anew_goes_on_as_the_other_would_have(tmp_path):
    """One trial at a time, so that what each suggestion rests on does not hang on the machine."""
    asked = {"trials": 6, "concurrent": 1, "pruner": {"kind": "none"}}
    undisturbed = Searched(tmp_path / "undisturbed", ("ada",))
    undisturbed.start("ada")
    expected = undisturbed.end(undisturbed.search(**asked)).sweep
    undisturbed.close()

    world = Searched(tmp_path / "killed", ("ada",))
    world.start("ada")
    train = world.workers["ada"].answers["train"]

    def hold(order, group):  # the fourth trial does not end before the hub does
        if len(world.workers["ada"].did("train")) > 3 * ROUNDS:
            assert group.ended.wait(WAIT)
        return train(order, group)

    world.workers["ada"].answers["train"] = hold
    run = world.search(**asked)
    assert eventually(lambda: len(world.trials(run)) == 4 and world.trials(run)[3].state == "running")
    world.close()

    world.workers["ada"].answers["train"] = train
    world.hub = Hub(world.home, NothingDeployed())
    assert world.hub.run(run).state == "interrupted"
    assert world.trials(run)[3].state == "interrupted"
    world.start("ada")
    assert world.hub.resume() == [run, world.trials(run)[3].run]
    found = world.end(run).sweep
    world.close()
    assert [one.parameters for one in found.trials] == [one.parameters for one in expected.trials]
    assert [one.objective for one in found.trials] == [one.objective for one in expected.trials]
    assert found.best == expected.best


TASK = '''
"""A straight line through four columns."""

import numpy as np
from torch import nn

from atoll import Mean


class Line:
    def model(self):
        return nn.Linear(4, 1)

    def examples(self, rows):
        x = np.stack([rows.table[f"x{number}"].to_numpy() for number in range(4)], 1)
        return {"x": x.astype(np.float32), "y": rows.table["y"].to_numpy().astype(np.float32)}

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])

    def metrics(self, model, batch):
        off = (model(batch["x"])[:, 0] - batch["y"]) ** 2
        return {"error": Mean(off.sum().item(), len(off))}
'''


def rows(seed):
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(80, 4))
    columns = {f"x{number}": x[:, number] for number in range(4)}
    return pa.table({**columns, "y": x @ np.arange(1.0, 5.0) + 0.1 * chance.normal(size=80)})


def test_a_sweep_of_a_real_task_finds_a_better_rate_than_the_jobs_own(tmp_path):
    asked = {"task": {"file": "task.py", "name": "Line"}, "optimiser": {"rate": 0.001}, "layout": {"data": 1}}
    asked |= {"sync": {"preset": "fedavg", "period": 5}, "steps": 30, "batch": 16}
    sweep = {"parameters": RATE, "trials": 6, "objective": "error", "sampler": "random"}
    bundle = Bundle(files={"task.py": TASK})
    with memory.world(tmp_path, {"ada": rows(1), "bob": rows(2)}, NothingDeployed()) as hub:
        plain = memory.finished(hub, memory.job(name="plain", **asked), bundle).result.metrics["error"]
        view = memory.finished(hub, memory.job(name="line", **asked, sweep=sweep), bundle)
    assert view.result.metrics["error"] < plain / 2
    assert view.result.model.startswith("line@")
    assert {"finished", "pruned"} <= {one.state for one in view.sweep.trials}


def test_a_sweep_without_optuna_is_refused_in_a_sentence(world, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "atoll.runtime.study", None)
    with pytest.raises(Exception, match="sweep: Optuna is not installed here; install it by: pip install"):
        world.search()
    assert world.hub.runs() == []


def test_a_combination_that_makes_no_job_ends_the_sweep_in_words(world):
    many = {f"task.params.p{number}": {"choice": [1, 2]} for number in range(6)}
    many |= {"batch": {"choice": [BATCH, 2]}, "layout.data": {"choice": [1, BATCH]}}
    view = world.end(world.search(parameters=many, trials=16, sampler="random", concurrent=1))
    assert (view.state, view.error) == ("failed", Invalid.__name__)
    assert f"batch: 2: the layout's data x shard x expert make {BATCH} shares" in view.words
