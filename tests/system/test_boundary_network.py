"""The site's end: connections that are kept, and that are gone; streams left half-way; a hub that answers oddly."""

import gc
import socket
import threading
from contextlib import suppress

import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.line import HEAD, WORD, Line
from atoll.boundary.network import SocketChannel
from atoll.boundary.port import Limits, Port
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from tests.unit.ends import SECRET, WAIT, Desk, World, frames, plain, progress, source, threads, until, update, wanted

pytestmark = pytest.mark.system


@pytest.fixture
def world(socket_world):
    return socket_world


def served():
    """Return how many connections ports have."""
    return len([name for name in threads() if name.startswith("port-")])


# --- connections


def test_one_connection_carries_one_conversation_after_another(world):
    """With TLS too: nothing comes on it unasked that would look like the hub's end of it."""
    world.desk.gives = frames(2)
    channel = world.open()
    for number in range(5):
        channel.put(update(), source(frames(3)))
        assert plain(channel.get(wanted())[1]) == frames(2)
        assert len(world.desk.taken) == number + 1
    assert served() == 2  # the session, and this one


def test_no_more_connections_are_kept_than_are_of_use(world):
    channel, all_in = world.open(), threading.Barrier(6, timeout=WAIT)

    def slow(offset):
        yield frames(1)[0]
        all_in.wait()

    putting = [threading.Thread(target=channel.put, args=(update(), slow)) for _ in range(6)]
    for thread in putting:
        thread.start()
    for thread in putting:
        thread.join(WAIT)
    assert len(world.desk.taken) == 6
    assert until(lambda: served() == 3)


def test_streams_of_many_threads_do_not_mix(world):
    taken, channel = {}, world.open()
    world.desk.take = lambda site, parcel, found: taken.setdefault(parcel.size, [bytes(f.data) for f in found(0)])

    def put(number):
        channel.put(update(number), source([Frame(at, 1, bytes([number]) * 5000) for at in range(20)]))

    putting = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in putting:
        thread.start()
    for thread in putting:
        thread.join(WAIT)
    assert taken == {number: [bytes([number]) * 5000] * 20 for number in range(8)}


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_connection_that_the_hub_has_closed_meanwhile_is_replaced(kind, tmp_path):
    world = World(kind, tmp_path, Limits(idle=0.05))
    channel = world.open()
    for number in range(3):
        channel.put(update(), source(frames(1)))
        assert len(world.desk.taken) == number + 1
        assert until(lambda: served() == 1)
    world.close()


def test_a_hub_that_was_restarted_is_dialled_anew_and_not_by_what_was_kept(world):
    channel = world.open()
    channel.put(update(), source(frames(1)))
    world.server.close()
    registrar = world.office.registrar if world.office else None
    world.server = Port(world.desk, world.server.port, registrar=registrar)
    with pytest.raises(LinkLost, match="the session with the hub is over"):
        channel.put(update(), source(frames(1)))
    assert served() == 0
    world.open().put(update(), source(frames(1)))
    assert len(world.desk.taken) == 2


# --- streams left half-way


@pytest.mark.parametrize("read", [0, 1])
def test_a_stream_that_somebody_drops_ends_its_connection_and_nothing_else(world, read):
    world.desk.gives = [Frame(number, 1, bytes(1 << 20)) for number in range(30)]
    channel = world.open()
    header, found = channel.get(wanted())
    for _ in range(read):
        next(found)
    assert (header.size, served()) == (30, 2)
    del found
    gc.collect()
    assert until(lambda: served() == 1)
    channel.send(progress(1))
    assert world.desk.said.get(timeout=WAIT) == ("lyon", progress(1))
    assert len(plain(channel.get(wanted())[1])) == 30


def test_what_a_site_fails_with_while_it_sends_keeps_its_cause(world):
    """Whether a disk is full is asked of the cause."""

    def broken(offset):
        yield frames(1)[0]
        try:
            raise OSError(28, "no space left")
        except OSError as error:
            raise AtollError("cannot be read") from error

    channel = world.open()
    with pytest.raises(AtollError, match="cannot be read") as raised:
        channel.put(update(), broken)
    assert isinstance(raised.value.__cause__, OSError)
    assert until(lambda: served() == 1)
    assert world.desk.taken == []


def test_a_site_that_closes_ends_what_it_has_under_way(world):
    world.desk.gives = [Frame(number, 1, bytes(1 << 20)) for number in range(30)]
    channel, reached, words = world.open(), threading.Event(), []

    def endless(offset):
        while True:
            yield Frame(0, 1, bytes(1 << 16))
            reached.set()

    def put():
        with pytest.raises(LinkLost) as raised:
            channel.put(update(), endless)
        words.append(str(raised.value))

    _, found = channel.get(wanted())
    next(found)
    putting = threading.Thread(target=put)
    putting.start()
    assert reached.wait(WAIT)
    channel.close()
    putting.join(WAIT)
    assert "the session with the hub is over" in words[0]
    with pytest.raises(LinkLost, match="the session with the hub is over"):
        plain(found)
    assert until(lambda: threads() == ["port"])


# --- a hub that answers oddly


class Scripted:
    """A hub that does with its connections, in turn, what the test says."""

    def __init__(self, *scripts):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve, args=(scripts,))
        self.thread.start()

    def serve(self, scripts):
        playing = []
        for script in scripts:
            try:
                line = Line(self.socket.accept()[0], WAIT)
            except OSError:
                break
            playing.append(threading.Thread(target=self.play, args=(script, line)))
            playing[-1].start()
        for one in playing:
            one.join(WAIT)

    def play(self, script, line):
        with suppress(LinkLost):
            assert line.hear()["verb"] == "here"
            script(line)
        line.close()

    def close(self):
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(WAIT)
        self.socket.close()


@pytest.fixture
def scripted():
    made, channels = [], []

    def start(*scripts):
        made.append(Scripted(session, *scripts))
        channels.append(SocketChannel(made[0].address, "lyon", ("lyon", SECRET)))
        return channels[0]

    yield start
    for one in (*channels, *made):
        one.close()


def session(line):
    assert line.hear() == {"verb": "session"}
    line.say({"open": True})
    while line.hear():
        pass


def says(*words):
    def script(line):
        line.hear()
        for word in words:
            line.say(word)
        line.hear()

    return script


RECEIPT = {"done": True}


@pytest.mark.parametrize(
    "answer",
    [{}, {"go": -1}, {"go": "0"}, {"go": True}, {"go": None}, {"done": False}, {"open": True}],
)
def test_what_is_no_receipt_is_never_taken_for_one(scripted, answer):
    channel = scripted(says(answer), lambda line: (line.hear(), line.say(RECEIPT), line.hear()))
    with pytest.raises(Invalid, match="put: the hub answered with"):
        channel.put(update(), source(frames(1)))
    channel.put(update(), source(frames(1)))


def test_what_comes_after_a_stream_is_a_receipt_or_none(scripted):
    def odd(line):
        line.hear()
        line.say({"go": 0})
        plain(line.frames())
        line.say({"thanks": True})

    channel = scripted(odd)
    with pytest.raises(Invalid, match="something else than a receipt"):
        channel.put(update(), source(frames(1)))


@pytest.mark.parametrize("answer", [{}, {"size": 3}, {"error": "Denied"}, b"[]", b"{", b'"word"'])
def test_what_is_no_parcel_is_refused(scripted, answer):
    channel = scripted(says(answer))
    with pytest.raises(Invalid):
        channel.get(wanted())


@pytest.mark.parametrize("word", [HEAD.pack(2, 0, 0, WORD) + b"{}", HEAD.pack(1, 0, 0, -5) + b"d"])
def test_a_stream_that_ends_in_another_way_is_never_a_short_one(scripted, word):
    def odd(line):
        line.hear()
        line.say(wanted().model_dump_json().encode())
        line.write(HEAD.pack(1, 0, 0, 1) + b"d")
        line.write(word)
        line.hear()

    _, found = scripted(odd).get(wanted())
    assert bytes(next(found).data) == b"d"
    with pytest.raises(Invalid):
        next(found)


def test_a_kept_connection_that_is_dead_without_a_sign_is_tried_once_and_replaced(scripted):
    """As after a machine at the other end was switched off and on: only who writes is told."""

    def once(line):
        line.hear()
        line.say(RECEIPT)
        line.hear()

    channel = scripted(once, once)
    channel.put(update(), source(frames(1)))
    channel.put(update(), source(frames(1)))  # the first connection goes away on hearing this


def test_a_word_of_the_hub_is_no_dead_connection(scripted):
    def denies(line):
        line.hear()
        line.say(RECEIPT)
        line.hear()
        line.say({"error": "LinkLost", "words": "the disk is full"})
        line.hear()

    channel = scripted(denies, says(RECEIPT))
    channel.put(update(), source(frames(1)))
    with pytest.raises(LinkLost, match="the disk is full"):
        channel.put(update(), source(frames(1)))


def test_whoever_waits_for_a_receipt_is_told_when_the_session_ends(scripted):
    asked, over = threading.Event(), threading.Event()

    def silent(line):
        line.hear()
        asked.set()
        over.wait(WAIT)

    channel = scripted(silent)
    said = []

    def put():
        with pytest.raises(LinkLost) as raised:
            channel.put(update(), source(frames(1)))
        said.append(str(raised.value))

    thread = threading.Thread(target=put)
    thread.start()
    assert asked.wait(WAIT)
    channel._session.end("as if the hub had been silent for too long")
    thread.join(WAIT)
    over.set()
    assert "the session with the hub is over; dial again" in said[0]


def test_a_hub_that_answers_a_session_oddly_is_given_up():
    desk = Desk()
    desk.opened = lambda site, send: (_ for _ in ()).throw(Denied("no more sites today"))
    port = Port(desk)
    channel = SocketChannel(port.address, "lyon", ("lyon", SECRET))
    with pytest.raises(Denied, match="no more sites today"):
        channel.receive(WAIT)
    channel.close()
    assert desk.ends.empty()
    port.close()
    assert threads() == []
