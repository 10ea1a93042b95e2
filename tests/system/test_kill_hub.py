"""kill -9 of the process that is hub and coordinator, again and again in one run; `atoll resume` makes up for it.

At every transition of a run hub and sites are killed in `test_kill_points`; here it is the command line's own process.

The law: whatever instant the hub died at, the run ends with the very weights of a run that nobody disturbed, one model
version is registered, every journal is intact, and no process is left.
"""

import random
import time

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

DILOCO = {  # AdamW inside, whose state goes on from round to round; Nesterov outside
    "name": "kept",
    "steps": 15,
    "optimiser": {"kind": "adamw", "rate": 0.05},
    "sync": {"preset": "diloco", "period": 3},
}
OUTER_ADAM = {
    "name": "outer",
    "steps": 10,
    "sync": {"exchange": "gradient", "period": 1, "outer": {"kind": "adam", "rate": 0.1}},
}
# Each kill comes when the hub's journal has this. Stages: measure 0, initialise 1, train 2 to 6, evaluate 7, publish 8.
PHASES = {
    "submitted": ("run.submitted", 1, {}),
    "measured by one": ("run.answered", 1, {"answer__position": 0}),
    "trained by one": ("run.answered", 1, {"answer__position": 3}),
    "evaluated by all": ("run.answered", 2, {"answer__position": 7}),
}


def lay(make_home, path):
    home = make_home(path)
    home.site("berlin", rows=60)
    home.site("oslo", rows=90, slow=1.0)
    return home


@pytest.fixture(scope="module")
def undisturbed(make_home, tmp_path_factory):
    """The weights after each stage of both jobs, by job name, from a hub that nobody killed."""
    jobs = (DILOCO, OUTER_ADAM)
    found = lay(make_home, tmp_path_factory.mktemp("undisturbed")).undisturbed(*jobs)
    assert all(len(weights) > 5 for weights in found)
    return {job["name"]: weights for job, weights in zip(jobs, found, strict=True)}


@pytest.fixture
def place(make_home, tmp_path):
    home = lay(make_home, tmp_path / "home")
    yield home
    home.close()


def ended_well(home, run: str, expected: dict[int, str]) -> None:
    assert home.weights(run) == expected
    assert [(model.reference, model.weights) for model in home.published(run)] == [
        (f"{run.rsplit('-', 1)[0]}@1", list(expected.values())[-1])
    ]
    home.verify()
    models = home.asked("models")["models"]
    assert [(model["version"], model["lineage"]["run"]) for model in models] == [(1, run)]
    assert home.empty()


@pytest.mark.slow
def test_a_hub_killed_in_four_phases_ends_with_the_weights_of_an_undisturbed_run(place, undisturbed):
    hold = place.path / "hold"
    hold.touch()  # oslo does not end its second round before the hub is dead
    hub = place.start("run", place.job(**DILOCO, task__params={"hold": str(hold)}))
    for phase, (kind, count, fields) in PHASES.items():
        run = place.seen(kind, count, **fields)[-1].event.run
        hub.kill()
        head = place.head()
        if phase == "trained by one":
            assert [entry.event.answer.site for entry in place.journal("run.answered")][-1] == "berlin"
            assert place.empty(), "the sites and workers of a killed hub end by themselves"
            assert [view["state"] for view in place.asked("runs")] == ["interrupted"]
            hold.unlink()
        hub = place.start("resume", "--json")
        if phase != "evaluated by all":
            place.seen("run.restarted", after=head)
    assert hub.process.wait(90) == 0, hub.said
    assert "Traceback" not in hub.said
    ended_well(place, run, undisturbed["kept"])


@pytest.mark.slow
def test_a_hub_killed_at_random_instants_restores_the_outer_optimiser(place, undisturbed):
    chance = random.Random(2025)
    hub = place.start("run", place.job(**OUTER_ADAM, task__params={"pause": 0.1}))
    run = place.seen("run.submitted")[0].event.run
    for _ in range(3):
        time.sleep(chance.uniform(0.0, 4.0))
        hub.kill()
        hub = place.start("resume", "--json")
    assert hub.process.wait(90) == 0, hub.said
    assert "Traceback" not in hub.said
    ended_well(place, run, undisturbed["outer"])
