"""Weights as the hub gives them out: a change to who has exactly the ones before, and all of them to everybody else."""

import numpy as np
import pytest

from atoll.outer.down import follow
from atoll.outer.wire import Chunk
from atoll.runtime.files import Folders, RunFiles
from atoll.runtime.merging import merged
from atoll.spec.message import Parcel
from atoll.spec.wire import Transform
from tests.unit.houses import SIGNATURE, ZERO

INT8 = (Transform(kind="int8"),)
DOWN = {"down": [{"kind": "int8"}]}
CODED = 8 + 4  # bytes of eight steps and their scale
FRAGMENTS = {"period": 2, "fragments": 2, "keep_optimiser": True}


def brought(house, version):
    """Bring both sites' updates; return the state that is to be merged."""
    low, high = house.conductor.states["run"].plan.sync.span(8, version)
    for number, site in enumerate(("ada", "bob"), start=1):
        sent = number * np.linspace(-1, 1, high - low, dtype=np.float32) / (1 + version)
        house.bring(site, house.parcel("run", site, size=high - low), sent)
    return house.conductor.states["run"]


def rounds(house, count=1, **sync):
    """Merge so many rounds as the hub does; return the digests of the weights from the first ones on."""
    digests = [house.run(**sync)]
    for version in range(count):
        state = brought(house, version)
        event = merged(state, state.merging, house.files("run"))
        house.conductor.record(event)
        digests.append(event.weights)
    return digests


def fetched(house, digest, base=None, site="ada"):
    asked = Parcel(run="run", purpose="weights", size=8, digest=digest, base=base)
    header, frames = house.desk.give(site, asked)
    return header, [Chunk(frame.offset, frame.length, bytes(frame.data), bytes(frame.scales)) for frame in frames]


def given(house, site="ada"):
    found = [event.crossing for event in house.crossings()]
    return [(c.bytes, c.wire) for c in found if (c.kind, c.direction, c.site) == ("model", "in", site)]


def vector(house, digest):
    return RunFiles(house.files("run").folder).vector(digest, SIGNATURE)


@pytest.mark.parametrize("sync", [DOWN, FRAGMENTS, FRAGMENTS | DOWN], ids=["int8", "fragments", "both"])
def test_who_has_the_version_before_gets_the_change_and_rebuilds_the_digests_bits(house, sync):
    before, after = rounds(house, **sync)
    header, chunks = fetched(house, after, before)
    assert header.base == before
    plan = house.conductor.states["run"].plan
    low, high = plan.sync.span(8, 0)
    assert header.size == high - low
    rebuilt, [chunk] = vector(house, before).copy(), chunks
    rebuilt[low:high] = follow(rebuilt[low:high], chunk, plan.sync.down, high - low)
    assert np.array_equal(rebuilt.view(np.uint32), vector(house, after).view(np.uint32))
    kinds = tuple(step.kind for step in plan.sync.down)
    assert given(house) == [(len(chunk.data) + len(chunk.scales), kinds)]


def test_who_missed_a_version_or_names_none_gets_all_of_them(house):
    first, second, third = rounds(house, 2, **DOWN)
    for base in (first, None, ZERO, third):
        header, [frame] = fetched(house, third, base)
        assert (header.base, header.size) == (None, 8)
        assert np.array_equal(np.frombuffer(frame.data, np.float32), vector(house, third))
    assert fetched(house, third, second)[0].base == second


def test_what_is_given_again_is_journalled_once_and_the_whole_beside_the_change(house):
    before, after = rounds(house, **DOWN)
    for base in (before, before, None, None):
        fetched(house, after, base)
    assert given(house) == [(CODED, ("int8",)), (32, ())]


def test_a_sync_without_fragments_or_a_way_down_has_only_whole_weights(house):
    before, after = rounds(house)
    assert fetched(house, after, before)[0].base is None
    assert not list(house.files("run").folder.glob("*.change"))


def test_a_hub_that_begins_anew_gives_all_of_them_and_merges_to_the_same_bits(house):
    before, after = rounds(house, **DOWN)
    state = brought(house, 1)
    anew = Folders(house.files("run").folder.parent).of("run")
    again = merged(state, state.merging, anew)
    expected = merged(state, state.merging, house.files("run"))
    assert (again.weights, again.outer) == (expected.weights, expected.outer)
    assert anew.outer(again.outer).residual.any()
    house.folders._open.clear()  # as after a start
    assert fetched(house, after, before)[0].base is None
