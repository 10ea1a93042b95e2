"""Weights that come in as a change to those that are here: rebuilt to the digest, or else fetched whole."""

import tracemalloc

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Corrupt, Denied, LinkLost
from atoll.outer.down import take
from atoll.outer.wire import CHUNK, encode
from atoll.registry.weights import save
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import RunFolder
from atoll.runtime.reports import Reports
from atoll.spec.document import sha256
from atoll.spec.model import TensorSpec
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform
from tests.unit.places import House, assign
from tests.unit.vectors import noise

SIZE = CHUNK + 9
OLD = noise(SIZE)
INT8 = Sync(down=(Transform(kind="int8"),))
PARTS = Sync(period=2, fragments=2, keep_optimiser=True)
CODED = PARTS.model_copy(update={"down": (Transform(kind="int4"),)})
SYNCS = {"int8": INT8, "fragments": PARTS, "int4 fragments": CODED}


def signature(vector):
    return (TensorSpec(name="w", shape=vector.shape),)


def digest(vector):
    return sha256(save(vector, signature(vector)))


def stepped(sync, version=0, old=OLD):
    """Return the weights after the round from `version`, and the frames of their change."""
    after, frames = old.copy(), []
    low, high = sync.span(old.size, version)
    for start in range(low, high, CHUNK):
        place = slice(start, min(start + CHUNK, high))
        after[place] *= np.float32(0.99)
        chunk = take(sync.down, start - low, (old[place], after[place]), None)
        frames.append(Frame(chunk.offset, chunk.length, bytes(chunk.data), bytes(chunk.scales)))
    return after, frames


class Giving(House):
    """A site with `old`, whose hub gives `change` to who asks for one from these, and `whole` to everybody else."""

    def __init__(self, home, sync, version=1, old=OLD):
        super().__init__(home)
        self.sync, self.version, self.asked = sync, version, []
        self.new, self.change = stepped(sync, version - 1, old)
        self.whole = {digest(old): old, digest(self.new): self.new}
        self.gate.attach(self)
        self.folder = RunFolder(home / "runs" / "run")
        self.folder.open(0, 2)
        self.incoming = Incoming(self.place, self.folder, Reports(self.place))

    def opened(self, site, send):
        pass

    def closed(self, site, send, words):
        pass

    def heard(self, site, message):
        pass

    def give(self, site, parcel):
        self.asked.append(parcel.base)
        if self.change is not None and parcel.base is not None:
            return parcel, iter(self.change)
        return parcel.model_copy(update={"base": None}), encode(self.whole[parcel.digest], ())

    def fetch(self, vector=None, version=None):
        wanted = self.new if vector is None else vector
        place = {"version": self.version if version is None else version, "sync": self.sync}
        path = self.incoming.weights(assign(weights=digest(wanted), signature=signature(wanted), **place))
        return np.fromfile(path, np.float32)

    def crossed(self):
        return [(event.crossing.bytes, event.crossing.wire) for event in self.crossings("model")]


@pytest.fixture
def giving(tmp_path):
    made = []

    def give(*how):
        made.append(Giving(tmp_path, *how))
        return made[-1]

    yield give
    for house in made:
        house.journal.close()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", SYNCS)
def test_what_is_here_and_the_change_are_the_new_weights_bit_for_bit(giving, kind, version):
    old = noise(2 * CHUNK + 9)  # half of which has two chunks
    house = giving(SYNCS[kind], version, old)
    house.fetch(old, version - 1)
    assert np.array_equal(house.fetch().view(np.uint32), house.new.view(np.uint32))
    assert house.asked == [None, digest(old)]
    assert house.folder.fetched == digest(house.new)
    [(bytes_whole, _), (bytes_change, wire)] = house.crossed()
    assert bytes_whole == old.nbytes
    assert bytes_change == sum(len(frame.data) + len(frame.scales) for frame in house.change)
    assert wire == tuple(step.kind for step in house.sync.down)


def test_a_hub_without_the_change_gives_the_whole_weights_in_the_same_conversation(giving):
    house = giving(INT8)
    house.fetch(OLD, 0)
    house.change = None
    assert np.array_equal(house.fetch(), house.new)
    assert house.asked == [None, digest(OLD)]
    assert house.crossed() == [(OLD.nbytes, ())] * 2


def test_a_process_that_begins_anew_asks_for_all_of_them(giving):
    house = giving(INT8)
    house.fetch(OLD, 0)
    house.incoming = Incoming(house.place, RunFolder(house.folder.path), Reports(house.place))
    assert np.array_equal(house.fetch(), house.new)
    assert house.asked == [None, None]


def bad(kind):
    other = stepped(INT8)[1]
    first = other[0]
    nan = np.full(len(first.scales) // 4, np.nan, np.float32).tobytes()
    return {
        "other numbers": [Frame(first.offset, first.length, bytes(len(first.data)), first.scales), *other[1:]],
        "nothing": [],
        "truncated": other[:-1],
        "too many": [*other, other[-1]],
        "wrong order": [other[1], other[0], *other[2:]],
        "not encoded": list(encode(OLD, ())),
        "short": [Frame(first.offset, first.length, first.data[:-1], first.scales)],
        "not finite": [Frame(first.offset, first.length, first.data, nan)],
        "past the end": [*other, Frame(SIZE, 1, b"0", bytes(4))],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "other numbers",
        "nothing",
        "truncated",
        "too many",
        "wrong order",
        "not encoded",
        "short",
        "not finite",
        "past the end",
    ],
)
def test_a_change_that_does_not_lead_to_the_digest_is_dropped_for_the_whole_weights(giving, kind):
    house = giving(INT8)
    house.fetch(OLD, 0)
    house.change = bad(kind)
    assert np.array_equal(house.fetch(), house.new)
    assert house.asked == [None, digest(OLD), None]
    assert [size for size, _ in house.crossed()] == [OLD.nbytes, SIZE + 4 * -(-SIZE // 1024), OLD.nbytes]


def test_whole_weights_of_another_digest_are_still_refused(giving):
    house = giving(INT8)
    house.fetch(OLD, 0)
    house.change, house.whole[digest(house.new)] = None, OLD
    with pytest.raises(Corrupt, match="what came is not"):
        house.fetch()
    assert house.folder.fetched == digest(OLD)


def test_a_change_from_other_weights_than_those_here_is_not_taken(giving):
    house = giving(INT8)
    house.fetch(OLD, 0)
    give = house.give

    def lying(site, parcel):
        header, frames = give(site, parcel)
        return (header.model_copy(update={"base": digest(house.new)}) if parcel.base else header), frames

    house.give = lying
    assert np.array_equal(house.fetch(), house.new)
    assert house.asked == [None, digest(OLD), None]
    assert house.crossed() == [(OLD.nbytes, ())] * 2


def test_a_link_that_breaks_half_way_leaves_what_was_here(giving):
    house = giving(INT8)
    house.fetch(OLD, 0)
    change = house.change

    def breaking():
        yield change[0]
        raise LinkLost("the link broke")

    house.change = breaking()
    with pytest.raises(LinkLost):
        house.fetch()
    house.change = change
    assert np.array_equal(house.fetch(), house.new)
    assert house.asked == [None, digest(OLD), digest(OLD)]
    assert len(house.crossed()) == 2  # what is tried again is one crossing


def test_the_owners_rules_may_let_changes_in_and_not_whole_weights(giving):
    house = giving(INT8)
    house.fetch(OLD, 0)
    house.policy += (
        '\n@id("small")\nforbid (principal, action == Action::"cross", resource)'
        ' when { context.kind == "model" && !context.wire.contains("int8") };\n'
    )
    assert np.array_equal(house.fetch(), house.new)
    house.change, house.version = None, 2
    house.whole[digest(-OLD)] = -OLD
    with pytest.raises(Denied, match="small"):
        house.fetch(-OLD)
    assert house.folder.fetched == digest(house.new)


def test_a_change_comes_in_without_a_vector_in_memory(giving):
    old = noise(4 * CHUNK + 9)
    house = giving(INT8, 1, old)
    house.fetch(old, 0)
    asked = assign(weights=digest(house.new), signature=signature(old), version=1, sync=INT8)
    tracemalloc.start()
    house.incoming.weights(asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * CHUNK < old.nbytes
