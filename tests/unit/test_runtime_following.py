"""A stream that comes to a relay is read while it comes, by any number of sites, at no pace but the hub's."""

import threading
from functools import partial

import pytest

from atoll.boundary.channel import Frame
from atoll.errors import LinkLost
from atoll.runtime.shelf import Shelf
from atoll.spec.document import sha256
from atoll.spec.message import Parcel
from tests.unit.places import WAIT

PIECES = (b"first ", b"second ", b"third")
WANTED = Parcel(run="run", purpose="code", size=0, digest=sha256(b"".join(PIECES)))


@pytest.fixture
def slow(tmp_path):
    """A shelf whose hub sends one piece and waits for ``go``; ``asked`` is what was asked for, ``ends`` how it ends."""

    class Slow:
        def __init__(self):
            self.go, self.asked, self.ends = threading.Event(), [], []
            self.shelf = Shelf(tmp_path / "shelf", self.fetch)
            self.give = partial(self.shelf.give, asked=WANTED, signature=())

        def fetch(self, parcel):
            self.asked.append((parcel.site, parcel.held))
            return parcel, self.frames() if not parcel.held else iter(())

        def frames(self):
            yield Frame(0, 6, PIECES[0])
            assert self.go.wait(WAIT)
            if self.ends:
                raise self.ends.pop()
            yield from (Frame(6, 7, PIECES[1]), Frame(13, 5, PIECES[2]))

    made = Slow()
    yield made
    made.go.set()


def test_header_and_frames_are_given_before_the_stream_has_come(slow):
    (header, one), (_, other) = slow.give("ada"), slow.give("bob")
    assert (header.site, header.digest) == (None, WANTED.digest)
    assert next(one).data == next(other).data == PIECES[0]
    slow.go.set()
    assert tuple(frame.data for frame in one) == tuple(frame.data for frame in other) == PIECES[1:]
    assert tuple(frame.data for frame in slow.give("cy")[1]) == PIECES
    assert slow.asked == [("ada", False), ("bob", True), ("cy", True)]


def test_a_stream_that_is_lost_is_lost_to_all_who_read_it_and_fetched_anew(slow):
    slow.ends = [LinkLost("the link broke")]
    streams = [slow.give(site)[1] for site in ("ada", "bob")]
    slow.go.set()
    for frames in streams:
        with pytest.raises(LinkLost, match="the link broke"):
            list(frames)
    assert tuple(frame.data for frame in slow.give("ada")[1]) == PIECES
    assert slow.asked[-1] == ("ada", False)


def test_who_leaves_in_the_middle_takes_the_stream_from_nobody(slow):
    one, other = slow.give("ada")[1], slow.give("bob")[1]
    next(one)
    one.close()
    slow.go.set()
    assert tuple(frame.data for frame in other) == PIECES


def test_a_stream_that_is_put_away_is_given_to_the_end_to_who_has_begun_it(slow):
    frames = slow.give("ada")[1]
    next(frames)
    for number in range(8):
        slow.shelf.give("ada", WANTED.model_copy(update={"digest": sha256(str(number).encode())}), ())
    slow.go.set()
    assert tuple(frame.data for frame in frames) == PIECES[1:]
    assert slow.asked.count(("ada", False)) == 9
