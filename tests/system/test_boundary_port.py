"""How much of the hub's port anybody may take: time, connections, a share of them; and how it ends."""

import socket
import ssl
import threading
import time

import pytest
from cryptography import x509

from atoll.boundary.certificates import HUB_LIFE
from atoll.boundary.channel import Frame
from atoll.boundary.line import HEAD, WORD
from atoll.boundary.port import Limits
from atoll.boundary.secure import server_context
from atoll.boundary.visit import Visit
from atoll.errors import LinkLost
from tests.unit.ends import (
    WAIT,
    Desk,
    World,
    closed,
    frames,
    parcel,
    plain,
    source,
    threads,
    until,
    update,
    wanted,
)
from tests.unit.papers import Office

pytestmark = pytest.mark.system

BRIEF = Limits(greeting=0.1)


@pytest.fixture(params=["plain", "tls"])
def brief(request, tmp_path):
    """A port with little patience."""
    made = World(request.param, tmp_path, BRIEF)
    yield made
    made.close()


# --- who takes its time


STARTS = {
    "nothing": b"",
    "the beginning of TLS": b"\x16",
    "the beginning of a hello": b"\x16\x03\x01\x02\x00\x01\x00\x01",
    "the beginning of a word": HEAD.pack(50, 0, 0, WORD)[:10],
    "half a word": HEAD.pack(50, 0, 0, WORD) + b'{"verb": "he',
}


@pytest.mark.parametrize("what", STARTS)
def test_who_does_not_say_who_it_is_in_time_is_gone(brief, what):
    line = brief.bare()
    line.write(STARTS[what])
    assert closed(line)
    line.close()
    assert until(lambda: threads() == ["port"])


def patiently(call):
    """Do as a site does whose greeting came too late: try again."""
    end = time.monotonic() + WAIT
    while True:
        try:
            return call()
        except LinkLost:
            if time.monotonic() > end:
                raise


def test_a_member_that_says_nothing_is_gone_and_one_that_spoke_in_time_is_not_hurried(brief):
    silent, good = patiently(brief.line), patiently(brief.open)
    assert closed(silent)
    silent.close()

    def slowly(offset):
        for frame in frames(3):
            yield frame
            time.sleep(0.1)

    patiently(lambda: good.put(update(), slowly))
    patiently(lambda: good.put(update(), source(frames(1))))
    assert len(brief.desk.taken) == 2


def test_no_more_connections_than_the_port_can_serve(tmp_path):
    world = World("plain", tmp_path, Limits(connections=3))
    channel, held = world.open(), [world.bare(), world.bare()]
    assert until(lambda: len(threads()) == 5)  # one accepts, one is the site's own
    one_more = world.bare()
    assert closed(one_more)
    for line in (one_more, held.pop()):
        line.close()
    assert until(lambda: len(threads()) == 4)
    channel.put(update(), source(frames(1)))
    assert len(world.desk.taken) == 1
    held.pop().close()
    world.close()


def test_one_site_does_not_take_the_place_of_all_others(tmp_path):
    world = World("tls", tmp_path, Limits(of_one=2))
    greedy, other = world.office.member().identity, world.office.member("oslo").identity
    channel, held = world.open(greedy), world.line(greedy)
    held.say({"verb": "get", "parcel": wanted().model_dump(mode="json")})
    held.hear()
    with pytest.raises(LinkLost, match="site 'lyon': has 2 connections"):
        channel.put(update(), source(frames(1)))
    world.open(other).put(update(), source(frames(1)))
    held.close()
    assert until(lambda: len([name for name in threads() if name.startswith("port-")]) == 3)
    channel.put(update(), source(frames(1)))
    assert [site for site, _, _ in world.desk.taken] == ["oslo", "lyon"]
    world.close()


# --- the end of the port


def silent(world):
    return world.bare()


def shaking(world):
    line = world.bare()
    line.write(b"\x16\x03\x01\x02\x00\x01\x00\x01")
    return line


def waiting(world):
    line = world.line()
    line.say({"verb": "get", "parcel": wanted().model_dump(mode="json")})
    line.hear()
    return line


def bringing(world):
    line = world.line()
    line.say({"verb": "put", "parcel": parcel()})
    assert line.hear() == {"go": 0}
    line.write(HEAD.pack(100, 0, 0, 1) + b"some")
    return line


def fetching(world):
    world.desk.gives = [Frame(number, 1, bytes(1 << 20)) for number in range(100)]
    line = waiting(world)
    next(line.frames())
    return line


@pytest.mark.parametrize("state", [silent, shaking, waiting, bringing, fetching])
@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_port_that_closes_leaves_no_thread_whatever_goes_on(kind, state, tmp_path):
    world = World(kind, tmp_path)
    lines = [state(world) for _ in range(3)]
    assert until(lambda: len(threads()) == 4)
    world.close()
    assert threads() == []
    for line in lines:
        assert closed(line)
        line.close()
    assert world.desk.taken == []


def test_a_visit_that_is_ended_just_when_it_turns_to_tls_ends_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname(), WAIT)
        visit = Visit(listening.accept()[0], "127.0.0.1", Desk(), None)
    context = server_context(Office(tmp_path).registrar.identity)

    class Meanwhile:
        def wrap_socket(self, *arguments, **named):
            wrapped = context.wrap_socket(*arguments, **named)
            visit.end("the hub is closing")
            return wrapped

    def serve():
        with pytest.raises((OSError, LinkLost)):
            visit.greet(Meanwhile(), WAIT)
        visit.tell(LinkLost("the hub is closing"))
        visit.part()

    far.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01")
    serving = threading.Thread(target=serve)
    serving.start()
    serving.join(WAIT / 4)
    assert not serving.is_alive()
    far.close()


def test_a_port_that_closes_while_a_site_talks_sends_and_fetches_leaves_no_thread(tmp_path):
    world = World("tls", tmp_path)
    world.desk.gives = [Frame(number, 1, bytes(1 << 20)) for number in range(1000)]
    channel, reached = world.open(), threading.Event()

    def endless(offset):
        while True:
            yield Frame(0, 1, bytes(1 << 16))
            reached.set()

    ends = []

    def until_it_ends(call):
        with pytest.raises(LinkLost) as raised:
            call()
        ends.append(str(raised.value))

    calls = [lambda: channel.put(update(), endless), lambda: plain(channel.get(wanted())[1])]
    busy = [threading.Thread(target=until_it_ends, args=(call,)) for call in calls]
    for thread in busy:
        thread.start()
    assert reached.wait(WAIT)
    world.server.close()
    for thread in busy:
        thread.join(WAIT)
    assert len(ends) == 2
    assert until(lambda: threads() == [])
    assert world.desk.taken == []
    world.close()


# --- which certificate it shows


def shown(world):
    """Return the hub's certificate as DER, looked at by somebody who believes in any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", world.server.port), WAIT) as raw, context.wrap_socket(raw) as line:
        return line.getpeercert(binary_form=True)


def test_a_port_that_stays_open_for_long_shows_a_certificate_that_still_holds(tmp_path):
    world = World("tls", tmp_path)
    try:
        first = shown(world)
        assert shown(world) == first
        world.office.ahead = 0.6 * HUB_LIFE.total_seconds()
        again = x509.load_der_x509_certificate(shown(world))
        assert again.not_valid_after_utc == world.office.registrar.identity.ends
        assert again.public_key() != x509.load_der_x509_certificate(first).public_key()
    finally:
        world.close()
