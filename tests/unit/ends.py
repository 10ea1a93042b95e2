"""Both ends of a channel for the tests of the boundary: a desk that keeps what it is told, and a site that dials."""

import queue
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.line import Line
from atoll.boundary.memory import MemoryChannel
from atoll.boundary.network import SocketChannel, connect
from atoll.boundary.port import Limits, Port
from atoll.boundary.secure import client_context, server_context
from atoll.errors import Denied, LinkLost
from atoll.spec.message import Parcel, Progress
from tests.unit.papers import Office

SECRET = "s" * 32
WAIT = 20.0  # seconds after which something that should happen has not
DIGEST = "sha256:" + 64 * "0"


@dataclass
class Desk:
    """A hub's side that keeps what it is told and does as the test says."""

    said: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    ends: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    sends: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    taken: list = field(default_factory=list)
    gives: list = field(default_factory=list)
    fault: Exception | None = None
    fault_after: int = 0  # frames before the fault
    holds: int = 0  # elements of a stream that it has already
    secrets: dict = field(default_factory=lambda: {"lyon": SECRET})

    def admits(self, site, secret):
        return self.secrets.get(site) == secret

    def opened(self, site, send):
        self.sends.put(send)

    def heard(self, site, message):
        self.said.put((site, message))

    def closed(self, site, send, words):
        self.ends.put((site, words))

    def faulty(self, frames):
        for number, frame in enumerate(frames):
            if self.fault is not None and number == self.fault_after:
                raise self.fault
            yield frame

    def take(self, site, parcel, frames):
        if self.fault is not None and not self.fault_after:
            raise self.fault
        kept = [Frame(f.offset, f.length, bytes(f.data), bytes(f.scales)) for f in self.faulty(frames(self.holds))]
        self.taken.append((site, parcel, kept))

    def give(self, site, parcel):
        if parcel.purpose == "probe":
            return parcel, iter(())
        if self.fault is not None and not self.fault_after:
            raise self.fault
        return parcel.model_copy(update={"size": len(self.gives)}), self.faulty(self.gives)


class World:
    """Both ends of a channel: ``memory``, ``plain`` (a socket of this machine) or ``tls``, with a CA in ``folder``."""

    def __init__(self, kind, folder=None, limits=None, **office):
        self.desk, self.channels = Desk(), []
        self.office = Office(folder, **office) if kind == "tls" else None
        registrar = self.office.registrar if self.office else None
        self.server = Port(self.desk, registrar=registrar, limits=limits or Limits()) if kind != "memory" else None

    def open(self, identity=None):
        if self.server is None:
            channel = MemoryChannel(self.desk, "lyon")
        elif self.office is None:
            channel = SocketChannel(self.server.address, "lyon", ("lyon", SECRET))
        else:
            identity = identity or self.office.member().identity
            channel = SocketChannel(self.server.address, identity.peer.name, identity)
        self.channels.append(channel)
        return channel

    def line(self, identity=None):
        """Return a connection of a site without any of its own client but the first steps."""
        if self.office is not None:
            return connect(self.server.address, identity or self.office.member().identity)
        line = connect(self.server.address, ("lyon", SECRET))
        line.say({"verb": "here", "site": "lyon", "secret": SECRET})
        return line

    def bare(self):
        """Return a connection of somebody who says nothing that the test does not say."""
        return Line(socket.create_connection(("127.0.0.1", self.server.port), WAIT), WAIT)

    def close(self):
        for channel in self.channels:
            channel.close()
        if self.server is not None:
            self.server.close()


def progress(number):
    return Progress(run="run", position=0, state="training", step=number, steps=100)


def update(size=3):
    return Parcel(run="run", purpose="update", size=size)


def parcel(**changed):
    """Return an update's header as the table in a word."""
    return {**update().model_dump(mode="json"), **changed}


def wanted():
    return Parcel(run="run", purpose="weights", size=0, digest=DIGEST)


def frames(count):
    return [Frame(number, 1, bytes([number]) * 10, bytes([number])) for number in range(count)]


def source(made):
    """Return what a channel's `put` takes: these frames, from an offset on."""
    return lambda offset: (frame for frame in made if frame.offset >= offset)


def secured(folder):
    """Return both ends of a connection with TLS, the site's first; nothing was said on it yet."""
    office = Office(folder)
    ends = socket.socketpair()
    hub = server_context(office.registrar.identity).wrap_socket(ends[1], True, do_handshake_on_connect=False)
    shaking = threading.Thread(target=hub.do_handshake)
    shaking.start()
    site = client_context(office.member().identity).wrap_socket(ends[0])
    shaking.join(WAIT)
    return site, hub


def lines(kind, folder):
    """Return both ends of a connection, ``plain`` or ``tls``, that do not wait long for their last words."""
    ends = [Line(end, WAIT) for end in (socket.socketpair() if kind == "plain" else secured(folder))]
    for end in ends:
        end.parting = 0.05
    return ends


def closed(line):
    """Tell whether the other end closed the connection, whatever it said before."""
    line.patience(WAIT)
    try:
        while line.socket.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except (BlockingIOError, TimeoutError):
        return False
    return True


def refused(address, credential):
    """Return what a site is told that dials and is not let in."""
    with pytest.raises((Denied, LinkLost)) as raised:
        SocketChannel(address, "lyon", credential)
    assert "\n" not in str(raised.value)
    return type(raised.value), str(raised.value)


def answer(line, word):
    """Return the kind and the words of the error that a word is answered with."""
    line.say(word)
    with pytest.raises((Denied, LinkLost)) as raised:
        line.hear()
    line.close()
    return type(raised.value), str(raised.value)


def threads():
    """Return the names of the threads that belong to a port or a session."""
    return sorted(one.name for one in threading.enumerate() if one.name.startswith("port") or "session" in one.name)


def until(true, seconds=WAIT):
    """Wait for what another thread is about to do; tell whether it came."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


def plain(found):
    return [Frame(f.offset, f.length, bytes(f.data), bytes(f.scales)) for f in found]
