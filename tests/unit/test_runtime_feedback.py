"""Error feedback at a site: whatever dies or comes too late, an update carries what the newest counted one lost."""

import numpy as np
import pytest

from atoll.errors import LinkLost
from atoll.outer.wire import CHUNK, Chunk, decode, encode, encoded_bytes, feedback
from atoll.runtime.errand import Errand
from atoll.runtime.frames import frames
from atoll.runtime.kept import Kept, RunFolder
from atoll.runtime.outgoing import encode_with_feedback, outgoing, outgoing_kept
from atoll.spec.model import TensorSpec
from atoll.spec.order import Reply
from atoll.spec.sync import Sync
from tests.unit.places import BATCH, SIZE, STEPS, WAIT, House, Hub, assign

SPARSE = [{"kind": "topk", "share": 0.3}, {"kind": "int8"}]
WIRE = Sync(wire=SPARSE).wire
FORGETFUL = [{"kind": "topk", "share": 0.3, "feedback": False}, {"kind": "int8", "feedback": False}]


def update(position, size=SIZE):
    return np.random.default_rng(position).normal(size=size).astype(np.float32)


def corrected(position, residual, size=SIZE):
    """Return what the hub decodes of this round's update, and the next residual, as an undisturbed site makes them."""
    pairs = list(feedback(update(position, size), residual, WIRE))
    found = np.concatenate([decode(chunk, WIRE, size) for chunk, _ in pairs])
    return found, np.concatenate([lost for _, lost in pairs])


def undisturbed(*positions):
    """Return what the hub decodes in rounds that are all counted."""
    residual, all_found = np.zeros(SIZE, np.float32), []
    for position in positions:
        found, residual = corrected(position, residual)
        all_found.append(found)
    return all_found


class Sums(Hub):
    """A hub that decodes; it may lose the receipt of what it took."""

    def __init__(self, wire=WIRE):
        super().__init__()
        self.wire, self.lost_receipts, self.frames = wire, 0, []

    def take(self, site, parcel, frames):
        self._break()
        found = [Chunk(f.offset, f.length, bytes(f.data), bytes(f.scales)) for f in frames(0)]
        self.frames.append(found)
        self._tell(self.taken, (parcel, np.concatenate([decode(chunk, self.wire, parcel.size) for chunk in found])))
        if self.lost_receipts:
            self.lost_receipts -= 1
            raise LinkLost("the link broke")


def trains(order, group):
    update(2 + order.done // STEPS).tofile(order.output)
    return Reply(examples=STEPS * BATCH, loss=0.5)


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    made.hub = Sums()
    made.gate.attach(made.hub)
    made.workers.answers["train"] = trains
    yield made
    made.journal.close()


class Site:
    """The errand of a site, which may be replaced by the next agent's."""

    def __init__(self, house):
        self.house, self.errand, self.rounds = house, Errand(house.place, "run"), 0

    def round(self, position, counted, wire=SPARSE, **fields):
        """Do a round and return what the hub decodes of it."""
        self.rounds += 1
        self.begin(position, counted, wire, **fields)
        return self.house.hub.wait_taken(self.rounds)[1]

    def begin(self, position, counted, wire=SPARSE, wait=None, **fields):
        sync = Sync.model_validate({"period": STEPS, "wire": wire, "wait": {"patience": WAIT, **(wait or {})}})
        self.errand.assign(assign(position=position, counted=counted, sync=sync, **fields))

    def end(self):
        self.errand.end(keep=True)
        assert self.errand.wait(WAIT)

    def restart(self):
        self.end()
        self.errand = Errand(self.house.place, "run")

    def files(self, pattern):
        return sorted(path.name for path in (self.house.runs / "run").glob(pattern) if path.suffix != ".spare")


@pytest.fixture
def site(house):
    made = Site(house)
    yield made
    made.end()


@pytest.mark.parametrize("restarts", [False, True])
def test_each_update_carries_what_the_one_before_lost(site, restarts):
    found = []
    for position, counted in ((2, None), (3, 2), (4, 3)):
        found.append(site.round(position, counted))
        if restarts:
            site.restart()
    np.testing.assert_array_equal(found, undisturbed(2, 3, 4))
    site.end()
    assert site.files("residual-*") == ["residual-3.f32", "residual-4.f32"]
    assert site.files("update-*") == ["update-3.json", "update-4.json", "update-4.wire"]


def test_what_a_lost_receipt_asks_for_again_is_the_same_from_this_agent_and_from_the_next(house, site):
    site.round(2, None)
    house.hub.lost_receipts = 1
    site.begin(3, 2)
    house.hub.wait_taken(3)  # sent again by the same agent
    site.restart()
    site.begin(3, 2, epoch=1)
    house.hub.wait_taken(4)
    assert house.hub.frames[1] == house.hub.frames[2] == house.hub.frames[3]
    parcels = [parcel for parcel, _ in house.hub.taken]
    assert len({parcel.content for parcel in parcels[1:]}) == 1
    assert parcels[0].content != parcels[1].content
    assert len(house.workers.did("train")) == 2
    site.rounds = 4
    np.testing.assert_array_equal(site.round(4, 3, epoch=1), undisturbed(2, 3, 4)[2])


def test_an_agent_that_died_before_its_mark_makes_the_same_again(house, site):
    site.round(2, None)
    site.round(3, 2)
    site.restart()
    for left in ("update-3.json", "residual-3.f32"):  # it was killed after one rename, and before the mark
        (house.runs / "run" / left).unlink()
    (house.runs / "run" / "residual-3.f32.part").write_bytes(b"half")
    found = site.round(3, 2, epoch=1)
    assert len(house.workers.did("train")) == 3
    np.testing.assert_array_equal(found, undisturbed(2, 3)[1])
    assert house.hub.frames[1] == house.hub.frames[2]
    assert site.files("residual-*.part") == []
    np.testing.assert_array_equal(site.round(4, 3, epoch=1), undisturbed(2, 3, 4)[2])


def test_a_round_that_went_on_without_the_site_leaves_its_residual_as_it_was(site):
    site.round(2, None)
    site.round(3, 2)  # came too late: the hub took it and let it be
    site.round(4, 2)  # and once more
    found = site.round(5, 2)
    _, residual = corrected(2, np.zeros(SIZE, np.float32))
    np.testing.assert_array_equal(found, corrected(5, residual)[0])
    site.end()
    assert site.files("residual-*") == ["residual-2.f32", "residual-5.f32"]


def test_a_first_update_that_was_never_counted_leaves_nothing_to_recall(site):
    site.round(2, None)
    np.testing.assert_array_equal(site.round(3, None), corrected(3, np.zeros(SIZE, np.float32))[0])


def test_under_a_buffer_an_update_that_is_counted_late_is_recalled(site):
    buffer = {"kind": "buffer", "count": 1}
    site.round(2, None, wait=buffer)
    site.round(3, 2, wait=buffer)  # its receipt came to nobody, and the site is asked for a newer round
    site.round(4, 2, wait=buffer)
    found = site.round(5, 3, wait=buffer)  # and yet it was the third round's that counted
    _, residual = corrected(3, corrected(2, np.zeros(SIZE, np.float32))[1])
    np.testing.assert_array_equal(found, corrected(5, residual)[0])


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(bytes(4 * SIZE)), lambda path: path.unlink()])
def test_a_residual_that_is_not_what_was_kept_ends_the_run_in_words(house, site, spoil):
    site.round(2, None)
    site.restart()
    spoil(house.runs / "run" / "residual-2.f32")
    site.begin(3, 2)
    failure = house.hub.wait("failure")
    assert (failure.error, failure.position) == ("Corrupt", 3)
    assert failure.words.startswith("lyon: what the update of stage 2 lost on the wire is not what was kept")
    assert len(house.hub.taken) == 1


def test_without_feedback_nothing_more_is_kept(house, site):
    house.hub.wire = Sync(wire=FORGETFUL).wire
    site.round(2, None, wire=FORGETFUL)
    found = site.round(3, 2, wire=FORGETFUL)
    chunks = encode(update(3), house.hub.wire)
    np.testing.assert_array_equal(found, np.concatenate([decode(chunk, house.hub.wire, SIZE) for chunk in chunks]))
    site.end()
    assert site.files("residual-*") == []
    assert site.files("update-*") == ["update-2.json", "update-3.f32", "update-3.json"]


def test_a_crossing_has_the_bytes_that_are_sent_where_they_are_known_beforehand(house, site):
    site.round(2, None)
    ((sent,),) = house.hub.frames
    assert [one.crossing.bytes for one in house.crossings("update")] == [len(sent.data) + len(sent.scales)]
    assert len(sent.data) + len(sent.scales) <= encoded_bytes(SIZE, WIRE)
    site.end()
    house.hub.wire = Sync(wire=FORGETFUL).wire
    site.errand = Errand(house.place, "other")  # a run has one wire
    site.round(2, None, wire=FORGETFUL, run="other")
    assert house.crossings("update")[-1].crossing.bytes == encoded_bytes(SIZE, WIRE)


# --- streams


LONG = 2 * CHUNK + 100


@pytest.fixture
def long(tmp_path):
    """A folder with an update of three chunks, and its assignment."""
    folder = RunFolder(tmp_path / "run")
    folder.open(0, 2)
    update(2, LONG).tofile(folder.update(2))
    return folder, assign(sync=Sync(period=STEPS, wire=SPARSE), signature=(TensorSpec(name="w", shape=(LONG,)),))


def same(found, expected):
    keys = [[(f.offset, f.length, bytes(f.data), bytes(f.scales)) for f in list_] for list_ in (found, expected)]
    return keys[0] == keys[1]


def test_a_stream_begins_where_it_is_asked_to(long):
    folder, a = long
    residual = encode_with_feedback(folder, a)
    kept = Kept(a.weights, 12, 0.5, 1.0, residual_crc=residual)
    chunks = [chunk for chunk, _ in feedback(update(2, LONG), np.zeros(LONG, np.float32), WIRE)]
    source, size = outgoing_kept(folder, a, kept)
    assert size == sum(len(chunk.data) + len(chunk.scales) for chunk in chunks)
    plain = list(encode(update(2, LONG), WIRE))
    for at, first in ((0, 0), (1, 1), (CHUNK, 1), (2 * CHUNK, 2), (LONG, 3)):
        assert same(source(at), chunks[first:])
        assert same(outgoing(folder.update(2), WIRE)(at), plain[first:])


def test_encoding_again_gives_the_same_files(long):
    folder, a = long
    first = encode_with_feedback(folder, a), folder.wire(2).read_bytes(), folder.residual(2).read_bytes()
    again = encode_with_feedback(folder, a), folder.wire(2).read_bytes(), folder.residual(2).read_bytes()
    assert first == again
    folder.keep(2, Kept(a.weights, 12, 0.5, 1.0, residual_crc=first[0]))
    assert RunFolder(folder.path).kept(2) == folder.kept(2) is not None
    assert len(list(frames(folder.wire(2)))) == 3
