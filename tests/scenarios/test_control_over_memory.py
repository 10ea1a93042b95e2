"""SCAFFOLD in whole runs over the memory channel: what becomes a model, and an agent that ends while it sends."""

import numpy as np
import pytest

from atoll.registry.blobs import Blobs
from atoll.registry.weights import load
from atoll.spec.order import Reply
from tests.scenarios.test_feedback_over_memory import Narrow
from tests.scenarios.worlds import ROUNDS, World
from tests.unit.places import BATCH, SIGNATURE, SIZE, STEPS, WAIT, WEIGHTS

RATE = 0.2
STEEP = {"ada": 1.0, "bob": 3.0}  # how differently the sites' losses bend
SCAFFOLD = {"preset": "scaffold", "period": STEPS}
INT8 = {**SCAFFOLD, "wire": [{"kind": "int8"}]}


class Turned(World):
    """Sites whose workers take real SCAFFOLD steps on a bowl around a point of their site's own."""

    def _train(self, name, order, goal):
        assert self.may_train[name].wait(WAIT)
        given = np.fromfile(order.weights, np.float32)
        start, common = given[:SIZE], given[SIZE:]
        own = np.fromfile(order.control_in, np.float32) if order.control_in else np.zeros_like(common)
        weights, total = start.copy(), np.zeros_like(start)
        for _ in range(order.steps):
            gradient = STEEP[name] * (weights - goal)
            weights, total = weights - np.float32(RATE) * (gradient + common - own), total + gradient
        after = (total / order.steps).astype(np.float32)
        after.tofile(order.control_out)
        np.concatenate([weights - start, after - own]).astype(np.float32).tofile(order.output)
        return Reply(examples=STEPS * BATCH, loss=0.5)


@pytest.fixture
def world(tmp_path):
    made = Turned(tmp_path, ("ada", "bob"))
    made.start("ada")
    yield made
    made.close()


def finished(world, run):
    view = world.end(run)
    assert view.state == "finished", view.words
    return world.hub.model(view.result.model)


@pytest.fixture(scope="module", params=["plain", "int8"])
def undisturbed(request, tmp_path_factory):
    """A sync, and the digest of the model of a run under it that nothing happens to."""
    made = Turned(tmp_path_factory.mktemp("undisturbed"), ("ada", "bob"))
    for name in made.names:
        made.start(name)
    sync = SCAFFOLD if request.param == "plain" else INT8
    digest = finished(made, made.submit(**sync)).weights
    made.close()
    return sync, digest


def test_the_model_is_the_weights_alone_and_crossings_carry_both(world, tmp_path):
    world.start("bob")
    run = world.submit(data={"evaluate": ["ada"]}, **SCAFFOLD)
    model = finished(world, run)
    assert model.signature == SIGNATURE
    vector, _ = load(Blobs(tmp_path / "hub" / "blobs").get(model.weights), SIGNATURE)
    assert np.abs(vector - WEIGHTS).max() > 1.0  # it was trained
    [evaluated] = world.workers["ada"].did("evaluate")
    assert (evaluated.control, [spec.name for spec in evaluated.signature][2:]) == (True, ["control.w", "control.b"])
    updates = [one.crossing.bytes for one in world.journalled("crossing", run) if one.crossing.kind == "update"]
    assert updates == [2 * 4 * SIZE] * (2 * ROUNDS)


@pytest.mark.parametrize("taken", ["none", "some", "all"])
def test_an_agent_that_ends_between_training_and_receipt_changes_no_bit_of_the_model(world, undisturbed, taken):
    sync, digest = undisturbed
    desk = Narrow(world.hub._desk, 2, taken)
    world.start("bob", desk)
    run = world.submit(**sync)
    assert desk.reached.wait(WAIT)
    world.agents["bob"].stop()
    world.threads[-1].join(WAIT)
    world.start("bob")
    assert finished(world, run).weights == digest
