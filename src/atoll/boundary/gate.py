"""The only door: every crossing is decided by the party's own rules and journalled before a byte of it moves."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from atoll.boundary.channel import Channel, Desk, FrameLike
from atoll.boundary.flight import FlightChannel, FlightServer
from atoll.boundary.memory import MemoryChannel
from atoll.errors import Denied, LinkLost
from atoll.spec.event import Crossed, Decided
from atoll.spec.fleet import Link
from atoll.spec.message import Message, Parcel
from atoll.spec.policy import Crossing, Decision, Request


class Judge(Protocol):
    """A party's rules, already read; `decide` is pure and denies on error."""

    def decide(self, request: Request) -> Decision: ...


_PROBE = 4 << 20  # bytes
Record = Callable[..., object]  # (*events) -> once it returns they are durable


class Gate:
    """One party's door. The hub and each site have their own, with their own rules and their own journal."""

    def __init__(self, party: str, judge: Callable[[], Judge], record: Record) -> None:
        self._party = party
        self._judge = judge  # asked each time, so that an edited policy holds from the next crossing on
        self._record = record

    def decide(self, request: Request) -> Decision:
        """Ask the rules without journalling: planning asks many questions of which few come true."""
        return self._judge().decide(request)

    def ask(self, request: Request, subject: str) -> Decision:
        """Decide a point that is no crossing (submit, open, promote, deploy), journal it, raise `Denied`."""
        decision = self.decide(request)
        run = request.crossing.run if request.crossing else None
        self._record(Decided(action=request.action, subject=subject, run=run, decision=decision))
        if not decision.allowed:
            raise Denied(str(decision))
        return decision

    def check(self, request: Request) -> Decision:
        """Decide a crossing and journal it; raise `Denied` in the words of the rule."""
        crossing, decision = self.judge(request)
        self._record(Crossed(crossing=crossing, decision=decision))
        if not decision.allowed:
            raise Denied(str(decision))
        return decision

    def judge(self, request: Request) -> tuple[Crossing, Decision]:
        """Decide a crossing for a caller that journals the outcome together with what it caused."""
        assert request.crossing is not None, "a crossing is what a gate decides about"
        return request.crossing, self.decide(request)


class SiteGate(Gate):
    """A site's door: the channel is behind it, and nothing else holds one."""

    def __init__(self, party: str, judge: Callable[[], Judge], record: Record) -> None:
        super().__init__(party, judge, record)
        self._channel: Channel | None = None
        self._turn = threading.Lock()

    def dial(self, address: str, secret: str, token: str | None = None) -> None:
        """Open a session with the hub at ``grpc://host:port``. Raises `LinkLost` or `Denied`."""
        self.hang_up()
        self._channel = FlightChannel(address, self._party, secret, token)

    def attach(self, desk: Desk) -> None:
        """Open a session with a hub in this very process."""
        self._channel = MemoryChannel(desk, self._party)

    def hang_up(self) -> None:
        with self._turn:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def say(self, message: Message, request: Request | None = None) -> None:
        """Send a message; one that carries anything computed from data comes with its crossing to be checked."""
        if request is not None:
            self.check(request)
        self._line().send(message)

    def listen(self, timeout: float) -> Message | None:
        return self._line().receive(timeout)

    def send(self, parcel: Parcel, frames: Iterable[FrameLike], request: Request) -> None:
        """Let tensors out. Returning means the hub has them safe."""
        self.check(request)
        self._line().put(parcel, frames)

    def fetch(self, parcel: Parcel, request: Request) -> tuple[Parcel, Iterator[FrameLike]]:
        """Let weights or code in, by digest; the caller verifies the bytes against it."""
        self.check(request)
        return self._line().get(parcel)

    def measure(self) -> Link:
        """Time an empty and a full probe of the link; they carry zeros, so nothing crosses."""
        seconds = [self._probe(size) for size in (0, 0, _PROBE)]
        latency = min(seconds[:2])
        return Link(site=self._party, latency=latency, bandwidth=_PROBE / max(seconds[2] - latency, 1e-6))

    def _probe(self, size: int) -> float:
        began = time.monotonic()
        _, frames = self._line().get(Parcel(run="probe", purpose="probe", size=size))
        for _ in frames:
            pass
        return time.monotonic() - began

    def _line(self) -> Channel:
        channel = self._channel
        if channel is None:
            raise LinkLost("there is no session with the hub; dial first")
        return channel


class Door(Protocol):
    """The hub's open port."""

    @property
    def port(self) -> int: ...
    @property
    def address(self) -> str: ...
    def close(self) -> None: ...


def listen(desk: Desk, port: int = 0) -> Door:
    """Open the hub's one port for sites. Raises `Unavailable` when it is taken."""
    return FlightServer(desk, port)
