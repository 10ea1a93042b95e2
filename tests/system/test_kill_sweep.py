"""kill -9 of whoever has a sweep in hand: the hub with all its sites, or the command line that asked for it.

The law: the sweep ends with the very trials, losses and models of one that nobody disturbed.
"""

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'atoll[sweep]'")
SWEEP = {
    "parameters": {"optimiser.rate": {"low": 0.001, "high": 1.0, "log": True}, "batch": {"choice": [8, 16]}},
    "trials": 3,
    "concurrent": 1,  # so that what a suggestion rests on does not hang on who is first
    "objective": "accuracy",
    "direction": "maximise",
    "seed": 3,
    "pruner": {"kind": "none"},
}
# Each kill comes when the hub's journal has this of the trial's run: before its plan, in its rounds, after the last.
INSTANTS = [(1, "run.submitted", 1), (2, "run.merged", 3), (3, "run.answered", 6)]


@pytest.fixture
def place(make_home, tmp_path):
    home = make_home(tmp_path / "home")
    home.site("berlin")
    yield home
    home.close()


@pytest.fixture(scope="module")
def undisturbed(make_home, tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("undisturbed"))
    home.site("berlin")
    run = home.asked("run", home.job(sweep=SWEEP))["run"]
    return told(home, run)


def told(home, run):
    """Return of each trial its values, its losses and its model's weights, then what the sweep says of them."""
    views = {view["run"]: view for view in home.asked("runs")}
    sweep = home.asked("sweep", "show", run)
    weights = {model["lineage"]["run"]: model["weights"] for model in home.asked("models")["models"]}
    trials = [
        (one["parameters"], views[one["run"]]["losses"], one["objective"], weights.get(one["run"]))
        for one in sweep["trials"]
    ]
    return views[run]["state"], trials, sweep["best"], views[run]["result"]["metrics"]


def trial(home, number, kind, count):
    """Wait until a trial's run has so many entries of this kind; return the sweep's run."""
    submitted = home.seen("run.submitted", 1 + number)[number].event  # the sweep itself is the first
    home.seen(kind, count, run=submitted.run)
    return submitted.trial.sweep


@pytest.mark.slow
def test_a_hub_killed_three_times_in_a_sweep_ends_with_the_trials_of_an_undisturbed_one(place, undisturbed):
    hub = place.start("run", place.job(sweep=SWEEP))
    for number, kind, count in INSTANTS:
        run = trial(place, number, kind, count)
        hub.kill()
        assert place.empty(), "the sites and workers of a killed hub end by themselves"
        hub = place.start("resume", "--json")
    assert hub.process.wait(120) == 0, hub.said
    assert "Traceback" not in hub.said
    assert told(place, run) == undisturbed
    place.verify()
    assert place.empty()


@pytest.mark.slow
def test_a_sweep_goes_on_without_the_command_that_asked_for_it(place, undisturbed):
    service = place.start("hub", "start")
    place.seen("site.connected")
    command = place.start("run", place.job(sweep=SWEEP))
    run = trial(place, 1, "run.merged", 2)
    command.kill()
    place.seen("run.swept", run=run)
    assert told(place, run) == undisturbed
    service.end()
    assert place.empty()
