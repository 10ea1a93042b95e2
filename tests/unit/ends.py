"""Both ends of a channel for the tests of the boundary: a desk that keeps what it is told, and a site that dials."""

import queue
from dataclasses import dataclass, field

from atoll.boundary.channel import Frame
from atoll.boundary.flight import FlightChannel, FlightServer
from atoll.boundary.memory import MemoryChannel
from atoll.errors import Denied
from atoll.spec.message import Parcel, Progress

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
    secrets: dict = field(default_factory=lambda: {"lyon": SECRET})

    def admits(self, site, secret):
        return self.secrets.get(site) == secret

    def enrol(self, site, token, secret):
        if token != "once":
            raise Denied(f"site {site!r}: this token is unknown or was used")
        self.secrets[site] = secret

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
        kept = [Frame(f.offset, f.length, bytes(f.data), bytes(f.scales)) for f in self.faulty(frames)]
        self.taken.append((site, parcel, kept))

    def give(self, site, parcel):
        if parcel.purpose == "probe":
            return parcel, iter(())
        if self.fault is not None and not self.fault_after:
            raise self.fault
        return parcel.model_copy(update={"size": len(self.gives)}), self.faulty(self.gives)


class World:
    def __init__(self, kind):
        self.kind, self.desk = kind, Desk()
        self.server = FlightServer(self.desk) if kind == "flight" else None
        self.channels = []

    def open(self):
        if self.server is None:
            channel = MemoryChannel(self.desk, "lyon")
        else:
            channel = FlightChannel(self.server.address, "lyon", SECRET)
        self.channels.append(channel)
        return channel

    def close(self):
        for channel in self.channels:
            channel.close()
        if self.server is not None:
            self.server.close()


def progress(number):
    return Progress(run="run", position=0, state="training", step=number, steps=100)


def update(size=3):
    return Parcel(run="run", purpose="update", size=size)


def wanted():
    return Parcel(run="run", purpose="weights", size=0, digest=DIGEST)


def frames(count):
    return [Frame(number, 1, bytes([number]) * 10, bytes([number])) for number in range(count)]


def plain(found):
    return [Frame(f.offset, f.length, bytes(f.data), bytes(f.scales)) for f in found]
