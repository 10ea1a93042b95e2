"""The session that stays open: order, size, what ends it, and that both ends learn why; with TLS and without."""

import queue
import socket
import threading
import time

import pytest

from atoll.boundary.line import WORD_LIMIT
from atoll.boundary.session import Session
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.spec.message import Release
from tests.unit.ends import WAIT, until

pytestmark = pytest.mark.system


class End:
    """One end of a session with its thread."""

    def __init__(self, line):
        self.heard = queue.SimpleQueue()
        self.ends = queue.SimpleQueue()
        self.session = Session(line, self.heard.put)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        self.ends.put(self.session.run())
        self.session.line.linger()
        self.session.line.close()


@pytest.fixture
def ends(pair):
    made = [End(line) for line in pair]
    yield made
    for end in made:
        end.session.end("the test is over")
    for end in made:
        end.thread.join(WAIT)
        assert not end.thread.is_alive()


def test_messages_of_a_session_arrive_in_order_both_ways(ends):
    one, other = ends
    sent = [Release(run=f"run-{number}") for number in range(200)]
    for message in sent:
        one.session.send(message)
        other.session.send(message)
    for end in ends:
        assert [end.heard.get(timeout=WAIT) for _ in sent] == sent


def test_a_message_larger_than_the_sockets_buffer_passes(ends):
    one, other = ends
    large = Release(run="run", words="w" * 3_000_000)
    one.session.send(large)
    assert other.heard.get(timeout=WAIT) == large


def test_both_ends_learn_why_a_session_ended(ends):
    one, other = ends
    one.session.end("enough")
    assert (one.ends.get(timeout=WAIT), other.ends.get(timeout=WAIT)) == ("enough", "enough")


def test_nothing_can_be_sent_over_a_session_that_is_over(ends):
    one, _ = ends
    one.session.end("enough")
    one.thread.join(WAIT)
    with pytest.raises(LinkLost, match="over"):
        one.session.send(Release(run="run"))


def test_a_peer_that_is_gone_ends_the_session(pair):
    one, other = pair
    end = End(one)
    other.close()
    words = end.ends.get(timeout=WAIT)
    assert "closed" in words or "broke" in words
    end.thread.join(WAIT)


def test_a_peer_that_does_not_read_is_given_up(pair):
    end = End(pair[0])
    large = Release(run="run", words="w" * 4_000_000)
    for _ in range(20):
        try:
            end.session.send(large)
        except LinkLost:
            break
    assert "does not take" in end.ends.get(timeout=WAIT)
    end.thread.join(WAIT)


def test_a_message_with_a_wrong_field_ends_the_session_in_words(pair):
    end = End(pair[0])
    pair[1].say({"kind": "release", "run": "../up"})
    assert "1 wrong field" in end.ends.get(timeout=WAIT)
    end.thread.join(WAIT)


def test_who_is_not_admitted_any_more_is_told_so_and_the_session_ends(pair):
    def refuse():
        raise Denied("site 'lyon': its certificate was revoked")

    session = Session(pair[0], lambda message: None, refuse)
    words = []
    thread = threading.Thread(target=lambda: words.append(session.run()))
    thread.start()
    with pytest.raises(Denied, match="revoked"):
        pair[1].hear()
    thread.join(WAIT)
    assert words == ["site 'lyon': its certificate was revoked"]


def test_messages_of_any_size_arrive_in_order_both_ways_where_the_sockets_take_little(pair):
    for line in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            line.socket.setsockopt(socket.SOL_SOCKET, option, 4096)
    made = [End(line) for line in pair]
    sent = [Release(run=f"run-{number}", words="w" * (number % 7) * 30_000) for number in range(40)]
    for message in sent:
        for end in made:
            end.session.send(message)
    for end in made:
        assert [end.heard.get(timeout=WAIT) for _ in sent] == sent
        end.session.end("the test is over")
    for end in made:
        end.thread.join(WAIT)
        assert not end.thread.is_alive()


def test_many_threads_send_at_once_and_each_ones_order_is_kept(ends):
    one, other = ends

    def say(name):
        for number in range(50):
            one.session.send(Release(run=name, words=str(number)))

    threads = [threading.Thread(target=say, args=(f"run-{name}",)) for name in range(6)]
    for thread in threads:
        thread.start()
    heard = [other.heard.get(timeout=WAIT) for _ in range(300)]
    for thread in threads:
        thread.join(WAIT)
    for name in range(6):
        assert [int(message.words) for message in heard if message.run == f"run-{name}"] == list(range(50))


def test_a_session_that_ends_sends_first_what_it_was_given(ends):
    one, other = ends
    one.session.line.parting = WAIT
    sent = [Release(run=f"run-{number}", words="w" * 20_000) for number in range(50)]
    for message in sent:
        one.session.send(message)
    one.session.end("enough")
    assert other.ends.get(timeout=WAIT) == "enough"
    assert [other.heard.get(timeout=WAIT) for _ in sent] == sent
    with pytest.raises(LinkLost, match="over"):
        one.session.send(sent[0])


def overheard(line):
    """Return the words that come in a session, and the error that ends it."""
    heard = []
    while True:
        try:
            heard.append(line.hear())
        except AtollError as error:
            return heard, error


@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_an_end_in_the_middle_of_a_message_is_understood(pair, size):
    """Also with TLS, which has begun a piece that it could not send, and takes no other before it."""
    one, other = pair
    one.parting = WAIT
    one.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    large, admitted = Release(run="run", words="w" * size), threading.Event()

    def refuse():
        if admitted.is_set():
            raise Denied("site 'lyon': its certificate was revoked")

    session = Session(one, lambda message: None, refuse)
    session.send(large)
    session.send(large)
    thread = threading.Thread(target=session.run)
    thread.start()
    assert until(lambda: other.spoken)
    time.sleep(0.02)  # it has sent by now what nobody reads
    admitted.set()
    session.check()
    heard, error = overheard(other)
    assert [len(word["words"]) for word in heard] == [size]
    assert (type(error), "was revoked" in str(error)) == (Denied, True)
    thread.join(WAIT)
    assert not thread.is_alive()


def test_a_session_may_be_spoken_to_and_ended_before_it_runs(pair):
    """By whoever is told of it first; a thousand times would fill whatever wakes it."""
    one, other = pair
    one.parting = WAIT
    session = Session(one, lambda message: None)
    sent = [Release(run=f"run-{number}") for number in range(1000)]
    for message in sent:
        session.send(message)
        session.check()
    session.end("never began")
    thread = threading.Thread(target=session.run)
    thread.start()
    heard, error = overheard(other)
    thread.join(WAIT)
    assert [word["run"] for word in heard] == [message.run for message in sent]
    assert str(error) == "never began"


def test_a_message_that_the_other_end_would_not_take_is_refused_to_who_sends_it(ends):
    one, other = ends
    with pytest.raises(Invalid, match="message: a release of "):
        one.session.send(Release(run="run", words="w" * WORD_LIMIT))
    one.session.send(Release(run="run"))
    assert other.heard.get(timeout=WAIT) == Release(run="run")


def test_what_the_end_that_hears_refuses_is_told_to_the_one_that_spoke(pair):
    def heard(message):
        raise Invalid("a message of kind 'release' is the hub's to send")

    session = Session(pair[0], heard)
    thread = threading.Thread(target=session.run)
    thread.start()
    other = End(pair[1])
    other.session.send(Release(run="run"))
    assert "the hub's to send" in other.ends.get(timeout=WAIT)
    assert isinstance(other.session.cause, Invalid)
    for one in (thread, other.thread):
        one.join(WAIT)
        assert not one.is_alive()
