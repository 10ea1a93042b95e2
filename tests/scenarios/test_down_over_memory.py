"""Weights that go down as a change, in whole runs over the memory channel: whoever ends in between costs no bit."""

import threading

import pytest

from atoll.errors import LinkLost
from atoll.runtime.hub import Hub
from tests.scenarios.worlds import ROUNDS, World
from tests.undeployed import NothingDeployed
from tests.unit.places import SIZE, STEPS, WAIT

NAMES = ("ada", "bob")
INT8 = {"down": [{"kind": "int8"}]}
SYNCS = {
    "int8": INT8,
    "sparse": {"down": [{"kind": "topk", "share": 0.3}, {"kind": "int4"}], "outer": {"rate": 0.7, "momentum": 0.9}},
    "both ways": {"wire": [{"kind": "int4"}], **INT8},
}
CODED, WHOLE = SIZE + 4, 4 * SIZE  # bytes of the weights as an int8 step, and as they are


class Held:
    """A hub's desk to a site that is given no weights of ``version`` or later."""

    def __init__(self, desk, version):
        self._desk, self._version = desk, version
        self.reached = threading.Event()

    def __getattr__(self, name):
        return getattr(self._desk, name)

    def give(self, site, parcel):
        if parcel.purpose == "weights" and self._desk._conductor.states[parcel.run].version >= self._version:
            self.reached.set()
            raise LinkLost("the link broke")
        return self._desk.give(site, parcel)


def weights(world, run):
    view = world.end(run)
    assert view.state == "finished", view.words
    return world.hub.model(view.result.model).weights


def given(world, run, site):
    """Return the bytes of weights that a site was given, by the hub's journal, in order."""
    found = [event.crossing for event in world.journalled("crossing", run)]
    return [c.bytes for c in found if (c.kind, c.direction, c.site) == ("model", "in", site)]


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, NAMES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The model of a run that nothing happens to, for each sync."""
    made = World(tmp_path_factory.mktemp("undisturbed"), NAMES)
    for name in NAMES:
        made.start(name)
    found = {kind: weights(made, made.submit(**sync)) for kind, sync in SYNCS.items()}
    found["plain"] = weights(made, made.submit())
    made.close()
    return found


def test_a_way_down_that_loses_something_makes_another_model(undisturbed):
    assert len(set(undisturbed.values())) == len(undisturbed)


def test_after_the_first_round_a_site_is_given_changes_only_and_its_own_journal_says_the_same(world):
    for name in NAMES:
        world.start(name)
    run = world.submit(**INT8)
    weights(world, run)
    for name in NAMES:
        assert given(world, run, name) == [WHOLE] + [CODED] * ROUNDS  # the last one to evaluate on
        own = [entry.event.crossing for entry in world.agents[name]._journal.entries(kinds=("crossing",), run=run)]
        assert [c.bytes for c in own if (c.kind, c.direction) == ("model", "in")] == given(world, run, name)


@pytest.mark.parametrize("kind", ["sparse", "both ways"])
def test_a_site_that_begins_anew_is_given_all_of_the_weights_and_changes_no_bit(world, undisturbed, kind):
    desk = Held(world.hub._desk, 2)
    world.start("ada")
    world.start("bob", desk)
    run = world.submit(**SYNCS[kind])
    assert desk.reached.wait(WAIT)
    world.agents["bob"].stop()
    world.threads[-1].join(WAIT)
    world.start("bob")
    assert weights(world, run) == undisturbed[kind]
    assert given(world, run, "bob")[2] == WHOLE > given(world, run, "ada")[2]


@pytest.mark.parametrize("kind", ["sparse", "both ways"])
def test_a_hub_that_ends_between_merge_and_fetch_goes_on_to_the_same_bits(world, undisturbed, kind):
    desk = Held(world.hub._desk, 2)
    for name in NAMES:
        world.start(name, desk)
    run = world.submit(**SYNCS[kind])
    assert desk.reached.wait(WAIT)
    for name in NAMES:
        world.agents[name].stop()
    for thread in world.threads:
        thread.join(WAIT)
    world.hub.close()
    world.hub = Hub(world.home, NothingDeployed())
    for name in NAMES:
        world.start(name)
    assert world.hub.resume() == [run]
    assert weights(world, run) == undisturbed[kind]
    done = [order.done for order in world.workers["ada"].did("train")]
    assert done == [STEPS * number for number in range(ROUNDS)]
