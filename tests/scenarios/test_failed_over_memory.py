"""Whole runs with a site whose task fails there: done without, named and journalled; each ends as its rule says."""

import pytest

from atoll.errors import TaskFailed
from atoll.runtime.hub import Hub
from tests.scenarios.worlds import ROUNDS, World
from tests.undeployed import NothingDeployed
from tests.unit.places import WAIT, eventually, until_closed

NAMES = ("ada", "bob", "cid")
QUORUM = {"kind": "quorum", "count": 2, "deadline": 15.0}  # which no test waits for
WORDS = "loss is nan at step 4 of the run; lower the optimiser's rate or look at the data"


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, NAMES)
    for name in NAMES:
        made.start(name)
    yield made
    made.close()


def fail(world, name, rounds, kind="train"):
    """Have a site's workers fail when they do the order of these rounds, from 1 on, the n-th time it is given."""
    done = world.workers[name].answers.get(kind)
    given = []

    def answer(order, group):
        given.append(order)
        if len(given) in rounds:
            raise TaskFailed(WORDS)
        return done(order, group)

    world.workers[name].answers[kind] = answer


def rounds(world, run):
    """Return the sites of each round's merge; the first merge is of the first weights."""
    return [event.sites for event in world.journalled("run.merged", run)][1 : ROUNDS + 1]


def test_a_quorum_does_without_the_site_in_that_round_and_names_it_in_the_result(world):
    fail(world, "bob", {2})
    run = world.submit(wait=QUORUM)
    view = world.end(run)
    assert (view.state, view.words, view.round) == ("finished", "", ROUNDS)
    assert rounds(world, run) == [NAMES, ("ada", "cid"), NAMES]
    assert view.result.failed == {"bob": f"bob: {WORDS}"}
    [event] = world.journalled("run.broken", run)
    assert (event.site, event.position, event.error) == ("bob", 2, "TaskFailed")


def test_under_all_the_same_failure_ends_the_run(world):
    fail(world, "bob", {2})
    view = world.end(world.submit())
    assert (view.state, view.words, view.error) == ("failed", f"bob: {WORDS}", "TaskFailed")


def test_a_mistake_that_fails_everywhere_ends_a_quorum_in_the_words_of_the_first(world):
    for name in NAMES:
        fail(world, name, range(1, 100))
    run = world.submit(wait=QUORUM)
    view = world.end(run)
    first = world.journalled("run.broken", run)[0]
    assert (view.state, view.words, view.error) == ("failed", first.words, "TaskFailed")


def test_a_buffer_does_without_a_site_that_always_fails(world):
    fail(world, "bob", range(1, 100))
    run = world.submit(wait={"kind": "buffer", "count": 2})
    view = world.end(run)
    assert view.state == "finished"
    assert rounds(world, run) == [("ada", "cid")] * ROUNDS
    assert set(view.result.failed) == {"bob"}


def test_metrics_without_a_site_that_could_not_give_them_say_so(world):
    fail(world, "bob", {1}, kind="evaluate")
    view = world.end(world.submit(data={"holdout": 0.2}, wait=QUORUM))
    assert (view.state, view.result.missing, sorted(view.result.by_site)) == ("finished", ("bob",), ["ada", "cid"])
    assert set(view.result.failed) == {"bob"}


def test_a_hub_that_ends_in_the_round_of_a_failure_goes_on_to_the_same_bits(world):
    fail(world, "bob", {2})
    undisturbed = world.end(world.submit(wait=QUORUM))
    expected = world.hub.model(undisturbed.result.model).weights
    trained, held = world.workers["cid"].answers["train"], []
    fail(world, "bob", {2})

    def second(order, group):
        if not order.done or held:
            return trained(order, group)
        held.append(order)
        return until_closed(order, group)

    world.workers["cid"].answers["train"] = second
    run = world.submit(wait=QUORUM)
    assert eventually(lambda: world.journalled("run.broken", run) and held)
    for name in NAMES:
        world.agents[name].stop()
    for thread in world.threads:
        thread.join(WAIT)
    world.hub.close()
    world.hub = Hub(world.home, NothingDeployed())
    for name in NAMES:
        world.start(name)
    assert world.hub.resume() == [run]
    view = world.end(run)
    assert world.hub.model(view.result.model).weights == expected
    assert rounds(world, run) == [NAMES, ("ada", "cid"), NAMES]
