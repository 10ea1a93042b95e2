"""Updates whose streams break: gone on with where they broke off, by one writer at a time."""

import queue
import threading
import time

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Invalid, LinkLost
from atoll.outer.wire import CHUNK, encode
from atoll.runtime.spool import Spool
from tests.unit.uploads import (
    ANOTHER,
    CONTENT,
    HEADER,
    INT8,
    NAME,
    OTHER,
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

# --- a stream that breaks off


@pytest.mark.parametrize("wire", [(), INT8, PACKED])
def test_an_upload_goes_on_behind_the_last_whole_frame(tmp_path, wire):
    (tmp_path / "whole").mkdir()
    whole = Spool(tmp_path / "whole")
    expected = take(whole, Sender(wire=wire))
    values = kept(whole, wire=wire)
    for frames in (0, 1, 2, -1):
        for restart in (False, True):
            folder = tmp_path / f"{frames} {restart}"
            spool = Spool(folder)
            with pytest.raises(LinkLost):
                take(spool, Sender(wire=wire, breaks=frames))
            assert not spool.holds(NAME, expected[0])
            if restart:
                spool = Spool(folder)
            again = Sender(wire=wire)
            assert take(spool, again) == expected
            assert again.asked == ([frames * CHUNK] if frames >= 0 else [])  # all of it is here: nothing is asked for
            assert np.array_equal(kept(spool, wire=wire), values)
            assert names(folder) == ["1-lyon.update"]
            assert Spool(folder).holds(NAME, expected[0])


def test_an_upload_that_breaks_off_at_every_frame_comes_whole_at_last(tmp_path):
    spool, senders = Spool(tmp_path), [Sender(breaks=number) for number in (1, 1, 2)]
    for sender in senders:
        with pytest.raises(LinkLost):
            take(spool, sender)
    take(spool, last := Sender())
    assert [sender.asked for sender in (*senders, last)] == [[0], [CHUNK], [CHUNK], [2 * CHUNK]]
    assert np.array_equal(kept(spool), SENT)


@pytest.mark.parametrize("torn", [1, HEADER - 1, HEADER, HEADER + 1, HEADER + 4 * CHUNK - 1])
def test_the_torn_tail_that_a_killed_hub_leaves_is_cut(tmp_path, torn):
    with pytest.raises(LinkLost):
        take(Spool(tmp_path), Sender(breaks=2))
    frame = HEADER + 4 * CHUNK
    with part(tmp_path).open("r+b") as file:
        file.truncate(frame + torn)
    spool, again = Spool(tmp_path), Sender(breaks=1)
    with pytest.raises(LinkLost):
        take(spool, again)
    assert part(tmp_path).stat().st_size == frame
    digest, _ = take(Spool(tmp_path), again := Sender())
    assert again.asked == [CHUNK]
    assert Spool(tmp_path).holds(NAME, digest)
    assert np.array_equal(kept(Spool(tmp_path)), SENT)


def test_headers_that_say_anything_else_than_the_next_frame_end_what_is_gone_on_with(tmp_path):
    for place, number in ((0, 2 * CHUNK), (8, CHUNK - 1), (16, 1 << 62), (16, (1 << 64) - 8), (24, 4)):
        with pytest.raises(LinkLost):
            take(Spool(tmp_path), Sender(breaks=2))
        with part(tmp_path).open("r+b") as file:
            file.seek(HEADER + 4 * CHUNK + place)
            file.write(number.to_bytes(8, "little"))
        spool, again = Spool(tmp_path), Sender(breaks=0)
        with pytest.raises(LinkLost):
            take(spool, again)
        assert again.asked == [CHUNK]
        spool.drop(lambda position, site: True)


def test_another_content_begins_anew_and_drops_what_there_was(tmp_path):
    for restart in (False, True):
        spool = Spool(tmp_path)
        with pytest.raises(LinkLost):
            take(spool, Sender(breaks=2))
        spool = Spool(tmp_path) if restart else spool
        with pytest.raises(LinkLost):
            take(spool, other := Sender(OTHER, breaks=1), content=ANOTHER)
        assert other.asked == [0]
        assert part(tmp_path).stat().st_size == HEADER + 4 * CHUNK + HEADER  # the last one is blank
        take(spool, again := Sender())
        assert again.asked == [0]
        assert np.array_equal(kept(spool), SENT)
        assert names(tmp_path) == ["1-lyon.update"]
        spool.drop(lambda position, site: True)


def test_the_same_content_in_another_encoding_begins_anew(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(LinkLost):
        take(spool, Sender(breaks=2))
    take(spool, again := Sender(wire=INT8))
    assert again.asked == [0]


def test_what_has_no_name_for_its_content_is_not_gone_on_with(tmp_path):
    spool = Spool(tmp_path)
    for _ in range(2):
        with pytest.raises(LinkLost):
            take(spool, sender := Sender(breaks=2), content=None)
        assert sender.asked == [0]
        assert names(tmp_path) == []


def test_nothing_that_a_site_says_of_its_content_becomes_a_path(tmp_path):
    spool = Spool(tmp_path / "spool")
    with pytest.raises(LinkLost):
        take(spool, Sender(breaks=1), content="../../etc/\0passwd" + 5000 * "x")
    assert len(part(tmp_path / "spool").name) == len("1-lyon..part") + 32
    assert names(tmp_path) == ["spool"]


def test_a_whole_update_that_comes_again_is_not_asked_for_and_another_one_replaces_it_when_it_is_whole(tmp_path):
    spool = Spool(tmp_path)
    expected = take(spool, Sender())
    assert take(spool, again := Sender()) == expected
    assert again.asked == []
    with pytest.raises(LinkLost):
        take(spool, Sender(OTHER, breaks=2), content=ANOTHER)
    assert spool.holds(NAME, expected[0])
    assert np.array_equal(kept(spool), SENT)
    digest, _ = take(spool, Sender(OTHER), content=ANOTHER)
    assert spool.holds(NAME, digest)
    assert not spool.holds(NAME, expected[0])
    assert np.array_equal(kept(spool), OTHER)


# --- two streams of one update


class Slow:
    """A stream whose next frame comes when the test gives it; it goes on though its other end may be dead."""

    def __init__(self, spool, sent=SENT, content=CONTENT):
        self.gave, self.took, self.ended = queue.SimpleQueue(), queue.SimpleQueue(), queue.SimpleQueue()
        self.frames = list(encode(sent, ()))
        self.thread = threading.Thread(target=self._receive, args=(spool, sent, content))
        self.thread.start()
        self.asked = self.took.get(timeout=WAIT)

    def _receive(self, spool, sent, content):
        try:
            self.ended.put(spool.receive(NAME, self._stream, (), sent.size, content))
        except (LinkLost, Invalid) as error:
            self.ended.put(error)

    def _stream(self, offset):
        self.took.put(offset)
        while (number := self.gave.get(timeout=WAIT)) is not None:
            yield self.frames[number]
            self.took.put(number)  # asked for the next one, so this one is written

    def give(self, *numbers):
        for number in numbers:
            self.gave.put(number)
            assert self.took.get(timeout=WAIT) == number

    def end(self, last=None):
        """Give one more, or the end, to a stream that is to end by it; return what came of it."""
        self.gave.put(last)
        found = self.ended.get(timeout=WAIT)
        self.thread.join(WAIT)
        return found


@pytest.mark.parametrize("last", [2, None])
def test_a_stream_that_is_still_open_beside_its_repeat_writes_nothing_more(tmp_path, last):
    spool = Spool(tmp_path)
    old = Slow(spool)
    old.give(0, 1)
    new = Slow(spool)
    assert new.asked == 2 * CHUNK
    written = part(tmp_path).stat().st_size
    assert isinstance(old.end(last), LinkLost)
    assert part(tmp_path).stat().st_size == written
    new.give(2)
    digest, count = new.end()
    assert count == 4 * SIZE
    assert Spool(tmp_path).holds(NAME, digest)
    assert np.array_equal(kept(spool), SENT)


def test_a_repeat_of_what_is_whole_but_for_its_end_takes_it_and_the_old_stream_ends(tmp_path):
    spool = Spool(tmp_path)
    old = Slow(spool)
    old.give(0, 1, 2)
    digest, _ = take(spool, again := Sender())
    assert again.asked == []
    assert isinstance(old.end(), LinkLost)
    assert spool.holds(NAME, digest)
    assert names(tmp_path) == ["1-lyon.update"]


def test_another_content_stops_a_stream_that_is_still_open(tmp_path):
    spool = Spool(tmp_path)
    old = Slow(spool)
    old.give(0, 1)
    new = Slow(spool, OTHER, ANOTHER)
    assert new.asked == 0
    assert isinstance(old.end(2), LinkLost)
    new.give(0, 1, 2)
    digest, _ = new.end()
    assert spool.holds(NAME, digest)
    assert np.array_equal(kept(spool), OTHER)
    assert names(tmp_path) == ["1-lyon.update"]


def test_a_former_writers_wrong_frame_does_not_harm_its_successor(tmp_path):
    spool = Spool(tmp_path)
    old = Slow(spool)
    old.give(0)
    new = Slow(spool)
    old.frames[1] = Frame(CHUNK, CHUNK, bytes(3))
    assert isinstance(old.end(1), Invalid)
    new.give(1, 2)
    assert new.end()[1] == 4 * SIZE
    assert np.array_equal(kept(spool), SENT)


def test_what_is_dropped_while_it_comes_in_stops(tmp_path):
    spool = Spool(tmp_path)
    old = Slow(spool)
    old.give(0)
    spool.drop(lambda position, site: True)
    assert isinstance(old.end(1), LinkLost)
    assert names(tmp_path) == []


def test_many_streams_of_one_update_that_cut_each_other_off_leave_one_whole(tmp_path):
    spool, done = Spool(tmp_path), []

    def insist():
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:  # each goes on where another left it, so all come to an end
            try:
                done.append(take(spool, Sender()))
                return
            except LinkLost:
                continue

    threads = [threading.Thread(target=insist) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT)
    assert len(done) == 6
    assert len(set(done)) == 1
    assert Spool(tmp_path).holds(NAME, done[0][0])
    assert names(tmp_path) == ["1-lyon.update"]
    assert np.array_equal(kept(spool), SENT)
