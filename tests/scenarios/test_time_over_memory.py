"""Rounds by time in whole runs over the memory channel: sites of unequal speed, each at its own place in its data."""

import numpy as np
import pytest

from atoll.spec.order import Reply
from tests.scenarios.test_feedback_over_memory import Narrow
from tests.scenarios.worlds import ROUNDS, World
from tests.unit.places import BATCH, SIZE, STEPS, WAIT

TAKEN = {"ada": [3, 2, 3], "bob": [1, 1, 2]}  # steps that there was time for, round by round
TIMED = {"seconds": 30.0, "wait": {"patience": 60.0}}


class Timed(World):
    """Sites whose workers come to as many steps as `TAKEN` says; each step brings a tenth of the way."""

    def _train(self, name, order, goal):
        assert self.may_train[name].wait(WAIT)
        steps = TAKEN[name][len({one.done for one in self.workers[name].did("train")}) - 1]
        ((goal - np.fromfile(order.weights, np.float32)) * np.float32(0.1 * steps)).tofile(order.output)
        return Reply(examples=steps * BATCH, steps=steps, loss=0.5)


@pytest.fixture
def world(tmp_path):
    made = Timed(tmp_path, ("ada", "bob"))
    made.start("ada")
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    made = Timed(tmp_path_factory.mktemp("undisturbed"), ("ada", "bob"))
    for name in made.names:
        made.start(name)
    view = made.end(made.submit(**TIMED))
    found = made.hub.model(view.result.model).weights
    made.close()
    return found


def test_each_site_goes_on_where_it_stopped_and_weighs_by_what_it_saw(world):
    world.start("bob")
    run = world.submit(**TIMED)
    assert world.end(run).state == "finished"
    for name, taken in TAKEN.items():
        orders = world.workers[name].did("train")
        assert [order.done for order in orders] == [sum(taken[:number]) for number in range(ROUNDS)]
        assert {order.steps for order in orders} == {STEPS}
    answers = [one for event in world.journalled("run.answered", run) for one in event.answers if one.steps]
    assert {(one.site, one.steps, one.examples) for one in answers} == {
        (name, steps, steps * BATCH) for name, taken in TAKEN.items() for steps in taken
    }


def test_a_round_that_was_trained_is_sent_again_and_not_trained_again(world, undisturbed):
    desk = Narrow(world.hub._desk, 2, "some")
    world.start("bob", desk)
    run = world.submit(**TIMED)
    assert desk.reached.wait(WAIT)
    world.agents["bob"].stop()
    world.threads[-1].join(WAIT)
    world.start("bob")
    view = world.end(run)
    assert world.hub.model(view.result.model).weights == undisturbed
    assert len(world.workers["bob"].did("train")) == ROUNDS


@pytest.mark.parametrize(("steps", "examples"), [(0, 1), (STEPS + 1, 1), (1, BATCH + 1)])
def test_more_than_the_steps_it_tells_of_can_have_is_not_sent(world, steps, examples):
    def lies(order, group):
        np.zeros(SIZE, np.float32).tofile(order.output)
        return Reply(examples=examples if steps <= STEPS else STEPS * BATCH + 1, steps=steps, loss=0.5)

    world.workers["bob"].answers["train"] = lies
    world.start("bob")
    view = world.end(world.submit(**TIMED))
    assert view.state == "failed"
    assert "the task must not answer for its worker" in view.words
