"""Runs through relays: the same model as without them, the same bits however answers fall, and one update a relay."""

import numpy as np
import pytest

from atoll.registry.weights import load
from atoll.runtime.relay import Relay
from atoll.spec.event import Restarted
from tests.scenarios.branches import Branching, until
from tests.scenarios.worlds import ROUNDS

SITES = ("ada", "bob", "cy", "dan", "eve")
BELOW = ("ada", "bob", "cy")
TWO = {"alps": BELOW}  # with dan and eve directly at the hub
THREE = {"alps": ("jura", "cy"), "jura": ("ada", "bob")}  # hub - alps - jura - ada, bob
INT8 = [{"kind": "int8"}]


class Counting:
    """The hub's desk, which notes what leaves it."""

    def __init__(self, desk):
        self.desk, self.fetched = desk, []

    def __getattr__(self, name):
        return getattr(self.desk, name)

    def give(self, site, parcel):
        if parcel.purpose != "probe" and not parcel.held:
            self.fetched.append((site, parcel.purpose, parcel.digest))
        return self.desk.give(site, parcel)


@pytest.fixture
def plant(tmp_path):
    """Return what makes worlds; all of them end with the test."""
    made = []

    def plant(tree, order=SITES, relays=None, counted=False):
        world = Branching(tmp_path / str(len(made)), SITES, tree)
        made.append(world)
        world.top = Counting(world.hub._desk) if counted else world.top
        world.grow(*order, relays=relays)
        return world

    yield plant
    for world in made:
        world.close()


def model(world, run):
    """Return the weights of a run that finished."""
    view = world.end(run)
    assert view.state == "finished", view.words
    found = world.hub.model(view.result.model)
    return load(world.hub._blobs.get(found.weights), found.signature)[0]


def sums(world, run):
    """Return of each sum that the hub was brought its stage, by which relays it came, and its sites."""
    answered = [event for event in world.journalled("run.answered", run) if event.answer.via]
    return [(event.answer.position, event.answer.via[0], [one.site for one in event.answers]) for event in answered]


def spooled(world, run, relay, site, stage):
    return (world.home / "relays" / relay / "runs" / run / "spool" / f"{stage}-{site}.update").exists()


@pytest.mark.parametrize(("tree", "merge"), [(TWO, "weighted_mean"), (THREE, "mean")], ids=["two", "three"])
def test_a_tree_trains_what_a_flat_run_does_within_rounding_whatever_the_order(plant, tree, merge):
    flat = plant({})
    expected = model(flat, flat.submit(merge=merge))
    first, second = plant(tree), plant(tree, SITES[::-1])
    one, other = (model(world, world.submit(merge=merge)) for world in (first, second))
    np.testing.assert_allclose(one, expected, rtol=0, atol=2e-6)
    assert one.tobytes() == other.tobytes()
    [run] = [view.run for view in first.hub.runs()]
    assert [(maker, sites) for _, maker, sites in sums(first, run)] == [("alps", list(BELOW))] * ROUNDS


@pytest.mark.parametrize(("tree", "lost"), [(TWO, "alps"), (THREE, "jura"), (THREE, "alps")])
def test_a_relay_that_is_lost_with_updates_in_its_spool_costs_no_bit_also_of_what_the_wire_lost(plant, tree, lost):
    undisturbed = plant(tree)
    expected = model(undisturbed, undisturbed.submit(wire=INT8))
    world = plant(tree)
    world.may_train["bob"].clear()
    run = world.submit(wire=INT8)
    until(lambda: spooled(world, run, world.above["ada"], "ada", 1))
    world.lose_relay(lost)
    world.may_train["bob"].set()
    for relay in [one for one in tree if lost in (one, *world.hub._desk.tree.way(one))]:
        world.relays[relay].close()
        world.start_relay(relay)
    world.begin_anew(*(site for site in BELOW if lost in world.hub._desk.tree.way(site)))
    assert model(world, run).tobytes() == expected.tobytes()
    assert [sites for _, _, sites in sums(world, run)] == [list(BELOW)] * ROUNDS


def test_a_hub_that_begins_anew_without_a_sum_asks_for_all_that_was_in_it(plant):
    undisturbed = plant(TWO)
    expected = model(undisturbed, undisturbed.submit(wire=INT8))
    world = plant(TWO)
    world.may_train["eve"].clear()
    run = world.submit(wire=INT8)
    until(lambda: sums(world, run))
    world.hub._conductor.record(Restarted(run=run, missing=BELOW))
    world.may_train["eve"].set()
    assert model(world, run).tobytes() == expected.tobytes()
    assert [sites for _, _, sites in sums(world, run)] == [list(BELOW)] * (ROUNDS + 1)


@pytest.mark.parametrize(
    "sync",
    [
        {"merge": "median"},
        {"merge": "multi_krum", "hostile": 1},
        {"merge": "mean", "bound": {"times": 1.0}},
        {"wait": {"kind": "buffer", "count": 5}},
        {"merge": "mean", "wire": [{"kind": "clip", "value": 10.0}, {"kind": "mask"}]},
    ],
    ids=["median", "multi_krum", "bound", "buffer", "mask"],
)
def test_what_does_not_compose_is_passed_on_one_by_one(plant, sync):
    flat, tree = plant({}), plant(THREE)
    run = tree.submit(**sync)
    made = model(tree, run)
    assert sums(tree, run) == []
    if "merge" in sync:
        assert made.tobytes() == model(flat, flat.submit(**sync)).tobytes()


def test_under_a_quorum_a_relay_sends_what_it_has_and_passes_the_rest_on(plant):
    world = plant(TWO)
    world.may_train["cy"].clear()
    run = world.submit(wait={"kind": "quorum", "count": 4, "deadline": 2.0})
    until(lambda: sums(world, run))
    assert sums(world, run)[0][1:] == ("alps", ["ada", "bob"])
    until(lambda: world.journalled("run.merged", run)[1:])
    world.may_train["cy"].set()
    model(world, run)
    merged = world.journalled("run.merged", run)[1]
    assert set(merged.sites) == {"ada", "bob", "dan", "eve"}


def test_weights_and_code_come_over_a_relay_s_link_once_and_the_hub_journals_each_site_s(plant):
    world = plant(THREE, counted=True)
    fetched = world.top.fetched
    run = world.submit()
    model(world, run)
    by_alps = [what for site, *what in fetched if site == "alps"]
    assert by_alps
    assert len(by_alps) == len({tuple(what) for what in by_alps})
    crossed = [one.crossing for one in world.journalled("crossing", run) if one.crossing.direction == "in"]
    for site in SITES:
        assert sum(one.kind == "model" and one.site == site for one in crossed) >= ROUNDS


class Torn(Relay):
    """A relay to which bob's first update comes longer than it is."""

    torn = False

    def take(self, site, parcel, frames):
        if site == "bob" and parcel.answer.position == 1 and not self.torn:
            self.torn = True
            parcel = parcel.model_copy(update={"size": parcel.size + 1})
        super().take(site, parcel, frames)


def test_an_update_that_a_relay_does_not_take_is_journalled_in_its_site_s_name_and_asked_for_again(plant):
    world = plant(TWO, relays={"alps": Torn})
    run = world.submit()
    model(world, run)
    [rejected] = world.journalled("run.rejected", run)
    assert (rejected.site, rejected.position) == ("bob", 1)
    assert "an update of 9 elements" in rejected.words
    assert [sites for _, _, sites in sums(world, run)] == [list(BELOW)] * ROUNDS
