"""The hub's port before strangers and liars: who is let in, and what nonsense is answered with."""

import socket
import threading
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.boundary.line import HEAD, WORD, WORD_LIMIT
from atoll.boundary.network import SocketChannel
from atoll.boundary.port import Limits
from atoll.errors import Denied, Invalid, LinkLost
from tests.unit.ends import (
    DIGEST,
    SECRET,
    WAIT,
    World,
    closed,
    frames,
    parcel,
    progress,
    source,
    threads,
    until,
    update,
    wanted,
)

pytestmark = pytest.mark.system


@pytest.fixture
def world():
    made = World("plain")
    yield made
    made.close()


def test_who_has_not_said_who_it_is_has_little_to_say(world):
    """Before anybody is known, nothing is kept for what somebody says is to come."""
    line = world.bare()
    line.write(HEAD.pack(256, 0, 0, WORD))
    with pytest.raises(Invalid, match="over the limit"):
        line.hear()
    line.close()


def test_a_wrong_secret_is_denied_in_words(world):
    with pytest.raises(Denied, match="site 'lyon' is not known by this secret"):
        SocketChannel(world.server.address, "lyon", ("lyon", "x" * 32))


# --- a site that says nonsense


NONSENSE = {
    "an unknown verb": {"verb": "dance"},
    "no verb": {},
    "a verb that is no word": {"verb": ["put"]},
    "a put of nothing": {"verb": "put"},
    "a get of nothing": {"verb": "get", "parcel": None},
    "a parcel that is none": {"verb": "put", "parcel": []},
    "a parcel of a path": {"verb": "put", "parcel": parcel(run="../../x")},
    "a parcel of less than nothing": {"verb": "put", "parcel": parcel(size=-1)},
    "more than there is": {"verb": "put", "parcel": parcel(), "run": "x"},
    "a certificate without TLS": {"verb": "certify", "request": "x"},
    "who it is once more": {"verb": "here", "site": "oslo", "secret": SECRET},
    "ten thousand fields": {f"field-{number}": 1 for number in range(10_000)},
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_answered_with_what_is_wrong_and_the_connection_is_good_for_more(world, what):
    line = world.line()
    line.say(NONSENSE[what])
    with pytest.raises(Invalid) as raised:
        line.hear()
    assert len(str(raised.value)) < 300
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    line.send(frames(2))
    assert line.hear() == {"done": True}
    assert world.desk.taken == [("lyon", update(), frames(2))]
    line.close()


HEADS = {
    "a frame before nothing": HEAD.pack(1, 0, -1, 1) + b"d",
    "a frame of less than nothing": HEAD.pack(1, 0, 0, -2) + b"d",
    "no JSON": HEAD.pack(3, 0, 0, WORD) + b"{,}",
    "another word": HEAD.pack(2, 0, 0, WORD) + b"{}",
    "a frame over the limit": HEAD.pack(1 << 30, 0, 0, 1),
    "scales over the limit": HEAD.pack(0, 1 << 30, 0, 1),
    "a word over the limit": HEAD.pack(WORD_LIMIT + 1, 0, 0, WORD),
    "a word with scales": HEAD.pack(2, 1, 0, WORD) + b"{} ",
}


@pytest.mark.parametrize("what", HEADS)
def test_a_frame_of_another_shape_is_refused_in_words_and_nothing_of_its_stream_counts(world, what):
    line = world.line()
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    line.write(HEADS[what])
    with pytest.raises(Invalid):
        line.hear()
    line.close()
    assert world.desk.taken == []
    world.open().put(update(), source(frames(1)))
    assert len(world.desk.taken) == 1


def test_after_a_refusal_in_the_middle_the_connection_is_good_for_more(world):
    line = world.line()
    world.desk.fault, world.desk.fault_after = Denied("enough"), 2
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    for frame in frames(5):  # as who has sent on before it heard that
        line.write(HEAD.pack(len(frame.data), len(frame.scales), frame.offset, frame.length))
        line.write(frame.data)
        line.write(frame.scales)
    line.send([])
    with pytest.raises(Denied, match="enough"):
        line.hear()
    world.desk.fault = None
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    line.send(frames(1))
    assert line.hear() == {"done": True}
    line.close()


def test_a_site_that_breaks_its_own_stream_off_in_words_leaves_nothing_at_the_hub(world):
    line = world.line()
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    line.write(HEAD.pack(1, 0, 0, 1) + b"d")
    line.say({"error": "Denied", "words": "no more " * 10_000})
    with pytest.raises(Denied) as raised:
        line.hear()
    assert len(str(raised.value)) < 5000
    line.say({"verb": "get", "parcel": wanted().model_dump(mode="json")})
    assert line.hear()["digest"] == DIGEST
    line.close()
    assert world.desk.taken == []


@pytest.mark.parametrize("said", [b"{", b"[]", b'{"kind": "rule the world"}', b'{"kind": "progress", "run": "../up"}'])
def test_a_session_that_speaks_nonsense_is_ended(world, said):
    line = world.line()
    line.say({"verb": "session"})
    assert line.hear() == {"open": True}
    line.say(said)
    assert world.desk.ends.get(timeout=WAIT)[0] == "lyon"
    assert world.desk.said.empty()
    line.close()


def test_a_flood_of_messages_does_not_keep_a_revoked_site_in(tmp_path):
    """Who sends without an end must not be safe from being looked at."""
    world = World("tls", tmp_path)
    line = world.line()
    line.say({"verb": "session"})
    line.hear()
    item = progress(1).model_dump_json().encode()
    flood = (HEAD.pack(len(item), 0, 0, WORD) + item) * 1000
    ended = threading.Event()

    def pour():
        with suppress(LinkLost):
            while not ended.is_set():
                line.write(flood)

    thread = threading.Thread(target=pour)
    thread.start()
    world.desk.said.get(timeout=WAIT)
    world.office.members.revoked("lyon")
    world.server.recheck()
    site, words = world.desk.ends.get(timeout=WAIT)
    assert (site, "was revoked" in words) == ("lyon", True)
    ended.set()
    line.cut()
    thread.join(WAIT)
    assert not thread.is_alive()
    line.close()
    world.close()


# --- any bytes at all


ANY = st.binary(max_size=200)
HEADED = st.builds(
    lambda size, scales, offset, length, rest: HEAD.pack(size, scales, offset, length) + rest,
    st.integers(0, 300) | st.integers(0, 2**32 - 1),
    st.integers(0, 3) | st.integers(0, 2**32 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([WORD, 0, 1]) | st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=300),
)
TLS = st.builds(lambda rest: b"\x16\x03\x01" + rest, ANY)
GREETED = st.builds(
    lambda rest: HEAD.pack(len(HERE), 0, 0, WORD) + HERE + b"".join(rest), st.lists(ANY | HEADED, max_size=3)
)
HERE = b'{"verb": "here", "site": "lyon", "secret": "%s"}' % SECRET.encode()


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_whatever_bytes_come_the_port_stays_up_and_their_thread_ends(kind, tmp_path):
    world = World(kind, tmp_path, Limits(greeting=WAIT))

    @settings(suppress_health_check=list(HealthCheck))
    @given(ANY | HEADED | TLS | GREETED)
    def send(data):
        line = world.bare()
        line.write(data)
        line.socket.shutdown(socket.SHUT_WR)
        assert closed(line)
        line.close()

    send()
    assert until(lambda: threads() == ["port"])
    world.open().put(update(), source(frames(1)))
    assert world.desk.taken == [("lyon", update(), frames(1))]
    world.close()
