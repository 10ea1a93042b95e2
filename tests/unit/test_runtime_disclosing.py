"""What runs found is for whoever asked and for whom the hub's rules let release it; all else about them is for all."""

from dataclasses import replace

import pytest

from atoll.policy.defaults import HUB_POLICY
from atoll.policy.rules import Rules
from atoll.registry.lineage import LineageTree, RunOrigin
from atoll.runtime.disclosing import Disclosing
from atoll.runtime.machine import begin
from atoll.spec.event import Result, Submitted
from atoll.spec.model import Model, Moments
from atoll.spec.pace import Pace
from atoll.spec.policy import Policy
from atoll.spec.run import RunView, SiteProgress
from atoll.spec.sweep import SweepView, Trial, TrialView
from atoll.spec.user import LOCAL, User
from tests.unit.houses import rules
from tests.unit.runs import ZERO, model, train_job

HEART = train_job().model_copy(update={"project": "heart"})
ADA, BEA, EVE = (
    User(name=name, roles=("scientist",), projects=(project,))
    for name, project in (("ada", "heart"), ("bea", "heart"), ("eve", "lung"))
)
VIC, BOB = User(name="vic", roles=("viewer",), projects=("heart",)), User(name="bob", roles=("operator",), projects=())
SECRET = 0.123456


def submitted(run: str, **about: object):
    return begin(Submitted(run=run, user="ada", job=HEART, **about))[0]


STATES = {run: submitted(run) for run in ("run", "one", "two")}
DISCLOSING = Disclosing(lambda: rules(HUB_POLICY), STATES)


def view(**fields: object) -> RunView:
    known = {"run": "run", "name": "job", "job_kind": "train", "purpose": "care", "user": "ada"}
    return RunView.model_validate({**known, "state": "running", **fields})


def made_by(run: str, **fields: object) -> Model:
    made = model()
    return made.model_copy(update={"lineage": made.lineage.model_copy(update={"run": run}), **fields})


FULL = view(
    loss=SECRET,
    losses=(SECRET,),
    round=1,
    bytes_up=7,
    sites={"lyon": SiteProgress(pace=Pace(loss=SECRET, steps=3)), "oslo": SiteProgress()},
    paces={"rome": Pace(loss=SECRET, steps=2)},
)
TRIALS = (
    TrialView(number=1, run="one", parameters={"steps": 3}, state="finished", loss=SECRET, objective=SECRET),
    TrialView(number=2, run="two", parameters={"steps": 4}, state="pruned", loss=SECRET, words=f"loss {SECRET}"),
    TrialView(number=3, run="six", parameters={"steps": 5}, state="failed", loss=SECRET, words="no room"),
)
SWEEP = SweepView(objective="loss", direction="minimise", asked=3, trials=TRIALS, best=1)


@pytest.mark.parametrize(
    ("user", "reads"), [(ADA, True), (BEA, True), (EVE, False), (VIC, False), (BOB, True), (LOCAL, True)]
)
def test_what_a_run_found_is_for_its_user_and_for_whom_the_rules_let_release_it(user, reads):
    found = view(state="finished", result=Result(metrics={"auc": SECRET}))
    shown = DISCLOSING.runs((found, FULL), user)
    assert (shown == [found, FULL]) == reads
    assert (str(SECRET) in str(shown)) == reads
    assert [bool(one.withheld) for one in shown] == [not reads] * 2


def test_without_results_a_view_still_tells_how_far_the_run_is():
    shown = FULL.without_results()
    assert (shown.state, shown.round, shown.bytes_up, shown.sites["lyon"].pace.steps) == ("running", 1, 7, 3)
    assert shown.sites["oslo"] == FULL.sites["oslo"]
    assert shown.withheld.startswith("what it found is for ada, and for whom")
    assert view(state="failed", words="no site has it").without_results().words == "no site has it"


def test_of_a_sweep_whatever_tells_how_well_a_trial_did_is_withheld():
    told = f"trial 1 of 3 is the best: loss {SECRET}"
    shown = view(sweep=SWEEP, state="finished", words=told, result=Result()).without_results()
    assert str(SECRET) not in shown.model_dump_json()
    assert (shown.sweep.best, shown.sweep.asked, [one.state for one in shown.sweep.trials]) == (
        None,
        3,
        ["finished", "pruned", "failed"],
    )
    assert shown.sweep.trials[2].words == "no room"
    trial = Trial(sweep="run", number=2, parameters={})
    assert view(trial=trial, state="cancelled", words=f"pruned: loss {SECRET}").without_results().words == ""


def test_a_models_metrics_and_statistics_are_its_runs_results_also_in_a_lineage():
    scores = {"metrics": {"auc": SECRET}, "statistics": {"age": Moments(count=9, mean=SECRET, std=1.0)}}
    made, parent = made_by("one", **scores), made_by("two", **scores)
    origin = RunOrigin(run="one", plan_digest=ZERO, job_digest=ZERO)
    about = {"entry": 1, "published": 1.0, "origin": origin, "code": ZERO}
    tree = LineageTree(model=made, parents=(LineageTree(model=parent, **about),), **about)
    assert DISCLOSING.models((made,), BEA) == [made]
    assert DISCLOSING.lineage(tree, BEA) == tree
    shown = DISCLOSING.lineage(tree, EVE)
    assert str(SECRET) not in shown.model_dump_json() + str(DISCLOSING.model(made, EVE))
    assert "metrics: for its run's user" in str(shown.branch())
    assert (shown.withheld, shown.parents[0].withheld, shown.model.reference) == (True, True, made.reference)


def test_a_run_that_waits_for_its_approval_is_its_askers_and_a_model_of_no_known_run_is_for_nobody():
    waits = view(run="waits", state="waiting")
    assert DISCLOSING.run(waits, ADA) == waits
    assert DISCLOSING.run(waits, BEA).withheld
    assert not DISCLOSING.reader(ADA)("unknown", "")


class Counted(Rules):
    """The hub's rules, which count what they were asked."""

    def __init__(self, text: str):
        super().__init__(Policy(party="hub", text=text))
        self.asked = 0

    def permits(self, request, at=None):
        self.asked += 1
        return super().permits(request, at)


def test_rules_are_asked_once_of_what_they_cannot_tell_apart_and_anew_once_they_are_others():
    inside = [Counted(HUB_POLICY)]
    states = {f"run-{number}": replace(STATES["run"], run=f"run-{number}") for number in range(500)}
    disclosing = Disclosing(lambda: inside[-1], states)
    views = [view(run=run) for run in states]
    for _ in range(3):
        assert all(one.withheld for one in disclosing.runs(views, EVE))
        assert not any(one.withheld for one in disclosing.runs(views, BEA))
    assert inside[0].asked == 2
    inside.append(Counted(HUB_POLICY + '@id("all") permit (principal, action == Action::"release", resource);'))
    assert not any(one.withheld for one in disclosing.runs(views, EVE))
    moved = EVE.model_copy(update={"projects": ("heart",)})
    inside.append(Counted(HUB_POLICY))
    assert [disclosing.run(views[0], user).withheld == "" for user in (EVE, moved)] == [False, True]
