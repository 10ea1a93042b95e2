"""Error feedback in a whole run over the memory channel: an agent that ends while it sends costs no bit of a model."""

import threading

import pytest

from atoll.errors import LinkLost
from tests.scenarios.worlds import ROUNDS, World
from tests.unit.places import STEPS, WAIT

NAMES = ("ada", "bob")
SPARSE = [{"kind": "topk", "share": 0.3}, {"kind": "int8"}]
FORGETFUL = [{**step, "feedback": False} for step in SPARSE]


class Narrow:
    """A hub's desk as a site sees it over a link that is gone from its update of stage ``position`` on.

    ``taken``: how much of that update the hub has by then.
    """

    def __init__(self, desk, position, taken):
        self._desk, self._position, self._taken = desk, position, taken
        self.reached = threading.Event()

    def __getattr__(self, name):
        return getattr(self._desk, name)

    def take(self, site, parcel, frames):
        if parcel.answer.position < self._position:
            self._desk.take(site, parcel, frames)
            return
        if self._taken == "all" and not self.reached.is_set():
            self._desk.take(site, parcel, frames)
        elif self._taken == "some":
            next(iter(frames(0)))
        self.reached.set()
        raise LinkLost("the link broke")


def weights(world, run):
    """Return the digest of a run's model once it is there."""
    view = world.end(run)
    assert view.state == "finished", view.words
    return world.hub.model(view.result.model).weights


def trained(world, name):
    return [order.done for order in world.workers[name].did("train")]


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, NAMES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The models of runs that nothing happens to: with feedback, and without."""
    made = World(tmp_path_factory.mktemp("undisturbed"), NAMES)
    for name in NAMES:
        made.start(name)
    found = [weights(made, made.submit(wire=wire)) for wire in (SPARSE, FORGETFUL)]
    made.close()
    return found


def test_what_is_fed_back_makes_another_model(undisturbed):
    with_feedback, without = undisturbed
    assert with_feedback != without


@pytest.mark.parametrize("taken", ["none", "some", "all"])
def test_an_agent_that_ends_between_encoding_and_receipt_changes_no_bit_of_the_model(world, undisturbed, taken):
    desk = Narrow(world.hub._desk, 3, taken)
    world.start("ada")
    world.start("bob", desk)
    run = world.submit(wire=SPARSE)
    assert desk.reached.wait(WAIT)
    world.agents["bob"].stop()
    world.threads[-1].join(WAIT)
    world.start("bob")
    assert weights(world, run) == undisturbed[0]
    assert trained(world, "bob") == trained(world, "ada") == [STEPS * number for number in range(ROUNDS)]
