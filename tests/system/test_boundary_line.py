"""Words and frames over one connection, with TLS and without."""

import fcntl
import resource
import socket
import ssl
import threading
import time

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.line import HEAD, WORD, WORD_LIMIT, Line
from atoll.errors import Denied, Invalid, LinkLost
from tests.unit.ends import WAIT, frames, plain, until

pytestmark = pytest.mark.system


def test_words_and_frames_arrive_as_they_were_sent_and_in_order(pair):
    one, other = pair
    one.say({"verb": "put"})
    one.send(frames(3))
    one.say({"done": True})
    assert other.hear() == {"verb": "put"}
    assert plain(other.frames()) == frames(3)
    assert other.hear() == {"done": True}


def test_a_frame_larger_than_the_buffer_arrives_whole(pair):
    one, other = pair
    large = Frame(0, 700_000, bytes(range(256)) * 11_000, b"s" * 5)
    sender = threading.Thread(target=one.send, args=([large],))
    sender.start()
    assert plain(other.frames()) == [large]
    sender.join(WAIT)


def test_an_error_is_raised_as_the_class_it_was(pair):
    one, other = pair
    one.say({"error": "Denied", "words": "no"})
    with pytest.raises(Denied, match="no"):
        other.hear()


def test_a_stream_that_breaks_off_is_never_a_short_one(pair):
    one, other = pair
    one.write(HEAD.pack(4, 0, 0, 1) + b"data")
    one.close()
    found = other.frames()
    assert bytes(next(found).data) == b"data"
    with pytest.raises(LinkLost):
        next(found)


def test_a_sender_stops_when_the_other_end_says_something(pair):
    one, other = pair
    other.say({"error": "Invalid", "words": "frame 1 is not finite"})
    one.send(frames(100))
    found = other.frames()
    assert plain([next(found)]) == frames(1)
    with pytest.raises(LinkLost, match="broke its stream off"):  # and it is never a short one
        next(found)
    with pytest.raises(Invalid, match="frame 1"):
        one.hear()


@pytest.mark.parametrize(
    "head",
    [
        HEAD.pack(WORD_LIMIT + 1, 0, 0, WORD),
        HEAD.pack((16 << 20) + 1, 0, 0, 1),
        HEAD.pack(0, (1 << 20) + 1, 0, 1),
        HEAD.pack(0, 0, -1, 1),
        HEAD.pack(0, 0, 0, -2),
    ],
)
def test_a_header_over_a_limit_is_refused_before_its_bytes_are_taken(pair, head):
    one, other = pair
    one.write(head)
    with pytest.raises(Invalid, match="stream"):
        list(other.frames())


@pytest.mark.parametrize("data", [b"[1]", b"no json", b"\xff\xfe", b'"word"', b"", b"[" * 100_000])
def test_what_is_no_table_of_json_is_refused(pair, data):
    one, other = pair
    one.write(HEAD.pack(len(data), 0, 0, WORD) + data)
    with pytest.raises(Invalid, match="JSON"):
        other.hear()


def test_a_peer_that_stalls_is_lost(pair):
    _, other = pair
    other.patience(0.05)
    with pytest.raises(LinkLost, match="stalled"):
        other.hear()


def test_what_nobody_wants_is_read_to_its_end(pair):
    one, other = pair
    one.send(frames(3))
    one.say({"next": 1})
    next(other.frames())
    other.drain()
    other.drain()
    assert other.hear() == {"next": 1}


def test_a_flood_that_nobody_wants_ends_also_where_its_frames_are_empty(pair):
    one, other = pair
    one.write(HEAD.pack(0, 0, 0, 1) * 3)
    next(other.frames())
    with pytest.raises(LinkLost, match="nobody wants"):
        other.drain(limit=HEAD.size)


def test_numbers_are_sent_as_the_bytes_they_are(pair):
    one, other = pair
    numbers = np.arange(5, dtype=np.float32)
    one.send([Frame(0, 5, numbers.data, numbers[:0].data)])
    assert plain(other.frames()) == [Frame(0, 5, numbers.tobytes())]


def test_nothing_is_heard_before_something_is_said(pair):
    """With TLS too, where a ticket would look like a word: an upload would stop, a kept connection be given up."""
    one, other = pair
    assert (one.spoken, other.spoken) == (False, False)
    one.say({"verb": "put"})
    assert until(lambda: other.spoken)
    assert other.hear() == {"verb": "put"}
    assert (one.spoken, other.spoken) == (False, False)
    other.close()
    assert until(lambda: one.spoken)


def test_of_two_words_in_one_piece_the_second_is_not_overheard(pair):
    one, other = pair
    word = HEAD.pack(2, 0, 0, WORD) + b"{}"
    one.write(word + word)
    assert until(lambda: other.spoken)
    other.hear()
    assert other.spoken
    other.hear()
    assert not other.spoken


def test_a_hub_of_many_connections_still_hears(pair):
    """What is numbered over 1023 is more than select() knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    one, other = socket.socketpair()
    high = Line(socket.socket(fileno=fcntl.fcntl(one, fcntl.F_DUPFD, 2000)), WAIT)
    assert not high.spoken
    Line(other, WAIT).say({})
    assert high.spoken
    assert high.hear() == {}
    for end in (one, other, high):
        end.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_header_with_more_than_a_word_is_refused(pair):
    one, other = pair
    one.write(HEAD.pack(2, 2, 0, WORD) + b"{}{}")
    with pytest.raises(Invalid, match="over the limit"):
        other.hear()
    assert other.spoilt


def test_whoever_is_cut_off_by_another_thread_is_told_and_still_speaks_tls(pair):
    """`shutdown` of Python's TLS would take it away, and what is just being sent would go on as plaintext."""
    one, other = pair
    began, said = threading.Event(), []

    def endless():
        while True:
            yield Frame(0, 1, bytes(1 << 16))
            began.set()

    def send():
        with pytest.raises(LinkLost) as raised:
            one.send(endless())
        said.append(str(raised.value))

    thread = threading.Thread(target=send)
    thread.start()
    assert began.wait(WAIT)
    one.cut()
    thread.join(WAIT)
    assert len(said) == 1
    if isinstance(one.socket, ssl.SSLSocket):
        assert one.socket.version() == "TLSv1.3"
    other.close()


def test_what_is_over_at_a_time_is_over_however_it_moves(pair):
    one, other = pair
    other.patience(0.05)
    other.until = time.monotonic() + 0.05
    over = threading.Event()

    def drip():
        one.write(HEAD.pack(WORD_LIMIT, 0, 0, WORD))
        while not over.wait(0.01):
            one.write(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    with pytest.raises(LinkLost, match="takes too long"):
        other.hear()
    over.set()
    thread.join(WAIT)


def test_the_last_word_arrives_also_where_much_was_not_read(tmp_path):
    """Over TCP, which takes back what was sent by whoever closes with something unread."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = Line(socket.create_connection(server.getsockname(), WAIT), WAIT)
        other = Line(server.accept()[0], WAIT)
    one.write(bytes(300_000))
    other.say({"error": "Denied", "words": "not you"})
    leaving = threading.Thread(target=lambda: (other.linger(), other.close()))
    leaving.start()
    with pytest.raises(Denied, match="not you"):
        one.hear()
    one.close()
    leaving.join(WAIT)
    assert not leaving.is_alive()


def test_who_waits_for_room_to_send_is_told_that_the_other_end_has_gone():
    """The end of a connection alone does not wake it: what was left in between may never be asked for."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = Line(socket.create_connection(server.getsockname(), WAIT), WAIT)
        other = Line(server.accept()[0], WAIT)
    full = threading.Event()

    def fill():
        with pytest.raises(LinkLost, match="broke"):
            one.send(iter(lambda: full.set() or Frame(0, 1, bytes(1 << 22)), None))

    thread = threading.Thread(target=fill)
    thread.start()
    assert full.wait(WAIT)
    found = other.frames()
    next(found)
    other.cut()
    with pytest.raises(LinkLost):
        list(found)
    other.close()
    thread.join(WAIT / 4)
    assert not thread.is_alive()
    one.close()
