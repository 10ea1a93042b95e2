"""Updates on the hub's disk: checked, whole or not there, and no more of them than the disk has room for."""

import os
import shutil
import threading

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Corrupt, Invalid, LinkLost, Unavailable
from atoll.outer.wire import CHUNK, encode, encoded_bytes
from atoll.runtime.spool import Spool
from tests.unit.uploads import (
    CONTENT,
    HEADER,
    INT8,
    NAME,
    PACKED,
    SENT,
    SIZE,
    WAIT,
    Sender,
    kept,
    names,
    part,
    take,
)
from tests.unit.vectors import noise

# --- whole updates


def test_an_update_comes_back_as_it_was_window_by_window_in_any_order(tmp_path):
    spool, sender = Spool(tmp_path), Sender()
    digest, count = take(spool, sender)
    assert (sender.asked, count) == ([0], 4 * SIZE)
    assert np.array_equal(kept(spool), SENT)
    with spool.reading(NAME, (), SIZE) as window:
        for offset in (2 * CHUNK, 0, CHUNK, 0):
            assert np.array_equal(window(offset), SENT[offset : offset + CHUNK])
    assert spool.holds(NAME, digest)
    assert names(tmp_path) == ["1-lyon.update"]


@pytest.mark.parametrize("wire", [INT8, PACKED])
def test_an_encoded_update_is_kept_as_it_came_and_decoded_when_it_is_read(tmp_path, wire):
    spool = Spool(tmp_path)
    digest, count = take(spool, Sender(wire=wire))
    assert count <= encoded_bytes(SIZE, wire)
    assert (tmp_path / "1-lyon.update").stat().st_size == count + 3 * HEADER
    found = kept(spool, wire=wire)
    assert found.shape == SENT.shape
    again = Spool(tmp_path)  # which finds the frames by their headers
    again.check(NAME, digest)
    assert np.array_equal(kept(again, wire=wire), found)


def test_threads_read_windows_of_one_update_each_in_room_of_its_own(tmp_path):
    spool, found = Spool(tmp_path), {}
    take(spool, Sender())
    meet = threading.Barrier(3)
    with spool.reading(NAME, (), SIZE) as window:

        def read(offset):
            values = window(offset)
            meet.wait(WAIT)
            found[offset] = values.copy()

        threads = [threading.Thread(target=read, args=(offset,)) for offset in (0, CHUNK, 2 * CHUNK)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert all(np.array_equal(values, SENT[offset : offset + CHUNK]) for offset, values in found.items())
    assert len(found) == 3


def broken(kind):
    first, second, third = encode(SENT, ())
    spoiled = SENT.copy()
    spoiled[5] = np.nan
    return {
        "empty": [],
        "truncated": [first, second],
        "oversized": [first, second, third, Frame(3 * CHUNK, 1000, bytes(4000))],
        "twice": [first, first, second],
        "wrong order": [second, first],
        "a gap": [first, third],
        "wrong offset": [first, Frame(CHUNK + 1, 999, bytes(3996))],
        "negative offset": [Frame(-CHUNK, CHUNK, first.data)],
        "short data": [Frame(0, CHUNK, bytes(first.data)[:-4])],
        "long data": [Frame(0, CHUNK, bytes(first.data) + bytes(4))],
        "scales": [Frame(0, CHUNK, first.data, bytes(4))],
        "not finite": [Frame(0, CHUNK, spoiled[:CHUNK].tobytes()), second],
    }[kind]


KINDS = [
    *("empty", "truncated", "oversized", "twice", "wrong order", "a gap", "wrong offset", "negative offset"),
    *("short data", "long data", "scales", "not finite"),
]


@pytest.mark.parametrize("content", [CONTENT, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_stream_is_invalid_and_leaves_no_trace(tmp_path, kind, content):
    spool = Spool(tmp_path)
    with pytest.raises(Invalid):
        spool.receive(NAME, lambda offset: iter(broken(kind)), (), SIZE, content)
    assert names(tmp_path) == []
    assert take(spool, again := Sender(), content=content)[1] == 4 * SIZE
    assert again.asked == [0]


def test_an_update_in_another_encoding_than_the_plans_is_invalid(tmp_path):
    spool = Spool(tmp_path)
    for sent, due in (((), INT8), (INT8, ())):
        with pytest.raises(Invalid):
            spool.receive(NAME, Sender(wire=sent), due, SIZE)
    assert names(tmp_path) == []


def test_what_an_earlier_process_wrote_is_hashed_and_what_this_one_wrote_is_not(tmp_path):
    spool = Spool(tmp_path)
    digest, _ = take(spool, Sender())
    with (tmp_path / "1-lyon.update").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x01")
    assert spool.holds(NAME, digest)
    again = Spool(tmp_path)
    assert not again.holds(NAME, digest)
    with pytest.raises(Corrupt, match="update of lyon for stage 1 is not what was received"):
        again.check(NAME, digest)
    assert not again.holds((2, "lyon"), digest)
    (tmp_path / "1-lyon.update").unlink()
    assert not spool.holds(NAME, digest)


@pytest.mark.parametrize("length", [0, 7, HEADER + 4 * CHUNK, 4 * SIZE])
def test_a_file_cut_short_is_read_by_nobody(tmp_path, length):
    spool = Spool(tmp_path)
    take(spool, Sender())
    with (tmp_path / "1-lyon.update").open("r+b") as file:
        file.truncate(length)
    for one in (spool, Spool(tmp_path)):
        with pytest.raises(Corrupt, match="not what was received"):
            kept(one)
    (tmp_path / "1-lyon.update").unlink()
    with pytest.raises(Corrupt, match="not what was received"):
        kept(spool)


# --- room


def test_a_disk_without_room_is_told_before_a_frame_is_asked_for_and_counts_what_others_may_still_write(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    size = CHUNK * (free // 3 // (4 * CHUNK))
    spool, sender = Spool(tmp_path), Sender()

    def second(offset):  # while two thirds of what is free are promised to this one and the one below
        with pytest.raises(Unavailable, match="no room"):
            spool.receive((1, "oslo"), sender, (), size, CONTENT)
        raise LinkLost("broke off")
        yield

    def first(offset):
        with pytest.raises(LinkLost):
            spool.receive((1, "bern"), second, (), size, CONTENT)
        raise LinkLost("broke off")
        yield

    with pytest.raises(LinkLost):
        spool.receive(NAME, first, (), size, CONTENT)
    assert sender.asked == []
    with pytest.raises(Unavailable, match="no room"):
        spool.receive((2, "lyon"), sender, (), 4 * size, CONTENT)


def test_what_cannot_be_stored_is_told_and_a_later_try_begins_anew(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(LinkLost):
        take(spool, Sender(breaks=2))
    left = part(tmp_path)
    os.rename(left, tmp_path / "aside")
    left.mkdir()
    with pytest.raises(Unavailable, match="update of lyon: cannot be stored"):
        take(spool, Sender())
    left.rmdir()
    os.rename(tmp_path / "aside", left)
    take(spool, again := Sender())
    assert again.asked == [2 * CHUNK]
    assert np.array_equal(kept(spool), SENT)


# --- what is spent


def test_only_what_is_spent_is_dropped_whatever_dots_and_dashes_a_site_is_called_by(tmp_path):
    spool = Spool(tmp_path)
    for name in [(1, "lyon"), (2, "lyon"), (1, "saint-denis.north"), (11, "a.update"), (12, "b.part")]:
        take(spool, Sender(noise(8, 1)), name)
    for name in [(3, "saint-denis.north"), (4, "saint-denis")]:
        with pytest.raises(LinkLost):
            take(spool, Sender(breaks=1), name)
    (tmp_path / "readme.txt").write_text("of somebody else")
    asked = []
    gone = [(1, "saint-denis.north"), (3, "saint-denis.north")]
    spool.drop(lambda position, site: asked.append((position, site)) or (position, site) in gone)
    whole = [(1, "lyon"), (1, "saint-denis.north"), (2, "lyon"), (11, "a.update"), (12, "b.part")]
    assert sorted(asked) == sorted([*whole, (3, "saint-denis.north"), (4, "saint-denis")])
    left = names(tmp_path)
    assert [name for name in left if not name.startswith("4-saint-denis.")] == [
        *("1-lyon.update", "1-saint-denis.north.update.spare"),
        *("11-a.update.update", "12-b.part.update", "2-lyon.update", "readme.txt"),
    ]
    assert len(left) == 7
    take(spool, again := Sender(), (3, "saint-denis.north"))
    assert again.asked == [0]
