"""One suite for all channels: what holds over a socket, plain or TLS, must hold in memory: each is a stand-in."""

import numpy as np
import pytest

from atoll import errors
from atoll.boundary.channel import Frame
from atoll.boundary.network import SocketChannel
from atoll.boundary.port import Port
from atoll.errors import Corrupt, Denied, Invalid, LinkLost, NotFound, TaskFailed, Unavailable
from atoll.spec.event import Answer
from atoll.spec.fleet import Site
from atoll.spec.message import Decisions, Done, Failure, Hello, Refusal, Release, Welcome
from tests.unit.ends import SECRET, WAIT, Desk, World, frames, plain, progress, source, update, wanted

pytestmark = pytest.mark.system


@pytest.fixture(params=["memory", "plain", "tls"])
def world(request, tmp_path):
    made = World(request.param, tmp_path)
    yield made
    made.close()


# --- messages


def test_messages_reach_the_hub_in_order_under_the_sites_name(world):
    channel = world.open()
    sent = [progress(number) for number in range(50)]
    for message in sent:
        channel.send(message)
    heard = [world.desk.said.get(timeout=WAIT) for _ in sent]
    assert heard == [("lyon", message) for message in sent]


def test_messages_reach_the_site_in_order(world):
    channel = world.open()
    send = world.desk.sends.get(timeout=WAIT)
    sent = [Release(run=f"run-{number}") for number in range(50)]
    for message in sent:
        send(message)
    assert [channel.receive(WAIT) for _ in sent] == sent


def test_both_sides_talk_at_once_and_a_document_arrives_as_it_was(world):
    channel = world.open()
    send = world.desk.sends.get(timeout=WAIT)
    hello = Hello(site=Site(name="lyon", owner="zoë", region="rhône"))
    channel.send(hello)
    send(Welcome(heartbeat=2.5))
    channel.send(progress(7))
    assert channel.receive(WAIT) == Welcome(heartbeat=2.5)
    assert [world.desk.said.get(timeout=WAIT)[1] for _ in range(2)] == [hello, progress(7)]


KINDS_OF_MESSAGE = [
    Failure(run="run", position=3, words="loss is not finite", error="TaskFailed"),
    Refusal(run="run", words="purpose 'marketing' is not granted"),
    Done(run="run", answer=Answer(site="lyon", position=1, epoch=1, loss=0.5)),
    Decisions(number=1, decisions=()),
]


@pytest.mark.parametrize("message", KINDS_OF_MESSAGE, ids=lambda message: message.kind)
def test_a_message_of_every_kind_arrives_and_ends_nothing(world, message):
    """One that tells of a failure looks much like the word by which an end tells of its own."""
    channel = world.open()
    for sent in (message, progress(1)):
        channel.send(sent)
        assert world.desk.said.get(timeout=WAIT) == ("lyon", sent)
    assert world.desk.ends.empty()


def test_what_was_said_before_the_end_arrives(world):
    channel = world.open()
    sent = [progress(number) for number in range(2000)]
    for message in sent:
        channel.send(message)
    channel.close()
    assert world.desk.ends.get(timeout=WAIT)[0] == "lyon"
    assert [world.desk.said.get(timeout=WAIT)[1] for _ in sent] == sent


def test_a_site_that_hears_nothing_is_told_so(world):
    assert world.open().receive(0.01) is None


# --- streams


def test_a_stream_to_the_hub_arrives_whole_and_in_order(world):
    world.open().put(update(), source(frames(3)))
    assert world.desk.taken == [("lyon", update(), frames(3))]


def test_a_stream_goes_on_from_where_the_hub_has_none_yet(world):
    world.desk.holds = 3
    world.open().put(update(5), source(frames(5)))
    assert world.desk.taken == [("lyon", update(5), frames(5)[3:])]


def test_a_stream_to_the_site_arrives_whole_with_the_hubs_header(world):
    world.desk.gives = frames(5)
    header, found = world.open().get(wanted())
    assert header == wanted().model_copy(update={"size": 5})
    assert plain(found) == frames(5)


def test_an_empty_stream_is_a_stream(world):
    channel = world.open()
    channel.put(update(0), source(()))
    assert world.desk.taken == [("lyon", update(0), [])]
    assert list(channel.get(wanted())[1]) == []


def test_twenty_five_megabytes_are_the_same_bytes_both_ways(world):
    rng = np.random.default_rng(1)
    pieces = [rng.bytes(1 << 20) for _ in range(25)]
    big = [Frame(number << 18, 1 << 18, piece) for number, piece in enumerate(pieces)]
    world.desk.gives = big
    channel = world.open()
    channel.put(update(), source(big))
    assert world.desk.taken[0][2] == big
    assert plain(channel.get(wanted())[1]) == big


def test_a_stream_left_half_way_blocks_nobody(world):
    world.desk.gives = [Frame(number, 1, bytes(1 << 20)) for number in range(8)]
    channel = world.open()
    _, found = channel.get(wanted())
    next(found)
    del found
    channel.send(progress(1))
    assert world.desk.said.get(timeout=WAIT) == ("lyon", progress(1))
    assert len(plain(channel.get(wanted())[1])) == 8


def test_what_the_hub_does_not_want_any_more_is_never_sent(world):
    pulled = []
    world.desk.take = lambda site, parcel, frames: None
    world.open().put(update(), lambda offset: (pulled.append(frame) or frame for frame in frames(3)))
    assert pulled == []


# --- errors


KINDS = [errors.AtollError, Invalid, NotFound, Denied, TaskFailed, Unavailable, LinkLost, Corrupt]


def test_an_error_of_the_hub_comes_back_as_the_same_class_with_its_words(world):
    channel = world.open()
    for kind in KINDS:
        world.desk.fault = kind("lyon: größer als erlaubt")
        for call in (lambda: channel.put(update(), source(frames(2))), lambda: channel.get(wanted())):
            with pytest.raises(kind) as raised:
                call()
            assert (type(raised.value), str(raised.value)) == (kind, "lyon: größer als erlaubt")


def test_a_refusal_before_anything_was_sent_asks_for_nothing(world):
    pulled = []
    world.desk.fault = LinkLost("the hub's disk is full; it is sent again")
    channel = world.open()
    with pytest.raises(LinkLost, match="disk is full"):
        channel.put(update(), lambda offset: (pulled.append(frame) or frame for frame in frames(3)))
    assert pulled == []


@pytest.mark.parametrize("kind", [LinkLost, Unavailable, Denied], ids=lambda kind: kind.__name__)
def test_what_the_hub_finds_out_in_the_middle_of_a_stream_comes_back_either_way(world, kind):
    """Also a lost link of the hub's own, such as a disk that is full: it is not this connection that broke."""
    world.desk.gives = [Frame(number, 1, bytes(1 << 10)) for number in range(40)]
    world.desk.fault, world.desk.fault_after = kind("no room left"), 3
    channel = world.open()
    for call in (lambda: channel.put(update(), source(world.desk.gives)), lambda: plain(channel.get(wanted())[1])):
        with pytest.raises(kind, match="no room left"):
            call()
    world.desk.fault = None
    channel.put(update(), source(frames(2)))
    assert world.desk.taken == [("lyon", update(), frames(2))]


def test_a_hub_that_has_enough_before_the_end_has_taken_it(world):
    def take(site, parcel, found):
        world.desk.taken.append([bytes(frame.data) for frame, _ in zip(found(0), range(2), strict=False)])

    world.desk.take = take
    channel = world.open()
    for _ in range(3):
        channel.put(update(), source([Frame(number, 1, bytes(1 << 16)) for number in range(40)]))
    assert world.desk.taken == [[bytes(1 << 16)] * 2] * 3


def test_a_refusal_in_the_middle_of_a_long_stream_comes_back_with_its_reason(world):
    world.desk.fault, world.desk.fault_after = Denied("enough"), 2
    long = (Frame(number, 1, bytes(1 << 20)) for number in range(40))
    with pytest.raises(Denied, match="enough"):
        world.open().put(update(), lambda offset: long)
    assert world.desk.taken == []


def test_a_hub_that_fails_in_the_middle_of_a_stream_never_looks_like_a_short_one(world):
    world.desk.gives = frames(5)
    world.desk.fault, world.desk.fault_after = Corrupt("weights: the stored bytes are others"), 3
    channel = world.open()
    with pytest.raises(Corrupt, match="the stored bytes are others"):
        list(channel.get(wanted())[1])


def test_an_error_ends_its_stream_and_not_the_session(world):
    channel = world.open()
    world.desk.fault = Invalid("too big")
    with pytest.raises(Invalid):
        channel.put(update(), source(frames(2)))
    world.desk.fault = None
    channel.put(update(), source(frames(2)))
    channel.send(progress(3))
    assert world.desk.said.get(timeout=WAIT) == ("lyon", progress(3))
    assert len(world.desk.taken) == 1


def test_a_site_that_fails_while_sending_leaves_nothing_whole_at_the_hub(world):
    def broken():
        yield frames(1)[0]
        raise TaskFailed("update: not finite")

    with pytest.raises(TaskFailed, match="not finite"):
        world.open().put(update(), lambda offset: broken())
    assert world.desk.taken == []


# --- ends


def test_a_closed_session_is_told_to_the_hub_once_and_carries_nothing_more(world):
    channel = world.open()
    send = world.desk.sends.get(timeout=WAIT)
    channel.close()
    channel.close()
    site, words = world.desk.ends.get(timeout=WAIT)
    assert (site, bool(words)) == ("lyon", True)
    assert world.desk.ends.empty()
    for call in (lambda: channel.send(progress(1)), lambda: channel.receive(WAIT), lambda: send(Release(run="run"))):
        with pytest.raises(LinkLost):
            call()
    for call in (lambda: channel.put(update(), source(())), lambda: channel.get(wanted())):
        with pytest.raises(LinkLost):
            call()
    assert world.desk.taken == []


def test_a_site_may_open_a_session_after_another(world):
    world.open().close()
    world.desk.ends.get(timeout=WAIT)
    channel = world.open()
    channel.send(progress(2))
    assert world.desk.said.get(timeout=WAIT) == ("lyon", progress(2))


def test_a_hub_that_ends_is_noticed_by_who_listens_speaks_or_sends(socket_world):
    channel = socket_world.open()
    socket_world.desk.sends.get(timeout=WAIT)
    socket_world.server.close()
    with pytest.raises(LinkLost, match="the session with the hub is over"):
        channel.receive(WAIT)
    for call in (lambda: channel.send(progress(1)), lambda: channel.put(update(), source(()))):
        with pytest.raises(LinkLost):
            call()
    assert socket_world.desk.ends.get(timeout=WAIT)[0] == "lyon"


def test_a_hub_that_is_not_there_is_a_lost_link_and_a_port_taken_is_said():
    server = Port(Desk())
    with pytest.raises(Unavailable, match=f"port {server.port} for sites"):
        Port(Desk(), server.port)
    address = server.address
    server.close()
    with pytest.raises(LinkLost):
        SocketChannel(address, "lyon", ("lyon", SECRET))
