"""The only door: every crossing is decided by the party's own rules and journalled before a byte of it moves."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Protocol, TypeVar

from atoll.boundary import network
from atoll.boundary.channel import Channel, Desk, Frame, FrameLike, Source
from atoll.boundary.identity import Identity
from atoll.boundary.memory import MemoryChannel
from atoll.boundary.port import Port
from atoll.boundary.register import Asked, Doorkeeper
from atoll.errors import Denied, Invalid, LinkLost
from atoll.spec.event import Answer, Crossed, Decided
from atoll.spec.fleet import Link
from atoll.spec.message import Done, Message, Parcel
from atoll.spec.policy import Account, Crossing, Decision, Request


class Judge(Protocol):
    """A party's rules, already read; `decide` is pure and denies on error."""

    def decide(self, request: Request) -> Decision: ...
    def account(self, request: Request) -> Account: ...


_PROBE = 4 << 20  # bytes
_PROBE_LIMIT = 8 << 20  # that another end may ask for
_PIECE = 1 << 20
_REMEMBERED = 1000  # newest crossings of a site; what is tried again is among them
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

    def account(self, request: Request) -> Account:
        """Ask the rules, each of them, about what nobody does yet; journals nothing."""
        return self._judge().account(request)

    def ask(self, request: Request, subject: str, run: str | None = None, alone: bool = True) -> Decision:
        """Decide a point that is no crossing (submit, open, release, promote, deploy), journal it, raise `Denied`.

        Without ``alone``, what is refused to one person alone is returned, for the caller to have another approve it.
        """
        decision = self.decide(request)
        self._record(decided(request, subject, decision, run))
        if not decision.allowed and (alone or not decision.approvers):
            raise Denied(str(decision))
        return decision

    def judge(self, request: Request) -> tuple[Crossing, Decision]:
        """Decide a crossing for a caller that journals the outcome together with what it caused."""
        assert request.crossing is not None, "a crossing is what a gate decides about"
        return request.crossing, self.decide(request)


class Uplink:
    """A party's way to its hub: the channel is in here, and nothing else holds one."""

    def __init__(self, party: str) -> None:
        self._name = party
        self._channel: Channel | None = None
        self._swap = threading.Lock()

    def dial(self, address: str, proof: Identity | str) -> None:
        """Open a session with the hub: at ``tls://host:port`` as who a certificate says, or with a secret at
        ``tcp://127.0.0.1:port``. Raises `LinkLost` or `Denied`."""
        self.hang_up()
        credential = (self._name, proof) if isinstance(proof, str) else proof
        self._channel = network.SocketChannel(address, self._name, credential)

    def attach(self, desk: Desk) -> None:
        """Open a session with a hub in this very process."""
        self._channel = MemoryChannel(desk, self._name)

    def hang_up(self) -> None:
        with self._swap:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def listen(self, timeout: float) -> Message | None:
        return self._line().receive(timeout)

    def measure(self) -> Link:
        """Time an empty and a full probe of the link; they carry zeros, so nothing crosses."""
        seconds = [self._probe(size) for size in (0, 0, _PROBE)]
        latency = min(seconds[:2])
        return Link(site=self._name, latency=latency, bandwidth=_PROBE / max(seconds[2] - latency, 1e-6))

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


def probed(parcel: Parcel) -> tuple[Parcel, Iterator[Frame]]:
    """Return what a hub, or a relay, gives for a probe of the link to it: zeros."""
    size = min(parcel.size, _PROBE_LIMIT)
    return parcel, (Frame(start, 0, bytes(min(_PIECE, size - start))) for start in range(0, size, _PIECE))


class RelayGate(Uplink):
    """A relay's door to its hub. It has no rules of its own: whatever passes it was decided by the rules of the site
    that it comes from or goes to, and is decided and journalled by the hub, for each of these sites by name."""

    def say(self, message: Message) -> None:
        self._line().send(message)

    def send(self, parcel: Parcel, frames: Source) -> None:
        """Pass an update on, or a sum of them. Returning means that the hub has it."""
        self._line().put(parcel, frames)

    def fetch(self, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]:
        """Fetch for the site that the parcel names, which the hub may refuse; the caller verifies the bytes."""
        return self._line().get(parcel)


class SiteGate(Gate, Uplink):
    """A site's door: whatever passes it was decided by the owner's rules."""

    def __init__(self, party: str, judge: Callable[[], Judge], record: Record) -> None:
        Gate.__init__(self, party, judge, record)
        Uplink.__init__(self, party)
        self.beyond = ""  # the region on the other side, as the hub says; nobody can check it
        self._turn = threading.Lock()
        self._crossed: OrderedDict[Hashable, tuple[Decision, ...]] = OrderedDict()  # crossing -> what was journalled
        self._admitted: OrderedDict[Hashable, Decided] = OrderedDict()  # run and action -> the newest that was

    def admit(self, request: Request, subject: str, run: str) -> None:
        """Decide anew whether a run's work may go on; raise `Denied`. The journal has the first time, and then each
        time that the question or its answer is another one."""
        said = decided(request, subject, self.decide(request), run)
        key = (run, request.action)
        with self._turn:
            known = self._admitted.get(key) == said
        if not known:
            self._record(said)
        with self._turn:
            _remember(self._admitted, key, said)
        if not said.decision.allowed:
            raise Denied(str(said.decision))

    def allow(self, request: Request, subject: str, run: str) -> None:
        """Decide again about what was done before, such as code that has crossed and lies here. Only a refusal is
        journalled, and raised as `Denied`: that it was done is in the journal already, and nothing crosses."""
        decision = self.decide(request)
        if not decision.allowed:
            if request.crossing is not None:
                self._record(Crossed(crossing=request.crossing.model_copy(update={"bytes": 0}), decision=decision))
            else:
                self._record(decided(request, subject, decision, run))
            raise Denied(str(decision))

    def answer(self, request: Request, subject: str) -> Decision:
        """Decide what a hub asks beforehand. That it may not plan is journalled here; that it may is when it did."""
        decision = self.decide(request)
        if request.action == "plan" and not decision.allowed:
            self._record(decided(request, subject, decision))
        return decision

    def say(self, message: Message, request: Request | None = None) -> None:
        """Send a message; one that carries anything computed from data comes with its crossing to be checked."""
        if request is not None:
            # Progress is told over and over, and is one crossing.
            self._check(request, _told(message.answer) if isinstance(message, Done) else message.kind)
        self._line().send(message)

    def send(self, parcel: Parcel, frames: Source, request: Request) -> None:
        """Let tensors out; ``frames(offset)`` gives those that the hub does not have yet. Returning means that it has
        them all."""
        self._check(request, _told(parcel.answer))
        self._line().put(parcel, frames)

    def fetch(self, parcel: Parcel, request: Request) -> tuple[Parcel, Iterator[FrameLike]]:
        """Let weights or code in, by digest; the caller verifies the bytes against it."""
        self._check(request, ("digest", parcel.digest))
        return self._line().get(parcel)

    def fetch_to_read(self, parcel: Parcel, request: Request) -> tuple[Parcel, Iterator[FrameLike]]:
        """Let code in for its owner to read: it is refused, and so does not run, until the owner has approved it."""
        crossing, party = request.crossing, self._name
        assert crossing is not None, "a crossing is what a gate decides about"
        words = f"{party} takes it in to be read, and does not run it"
        self._record(Crossed(crossing=crossing, decision=Decision(allowed=True, party=party, reasons=(words,))))
        return self._line().get(parcel)

    def fetch_change(self, parcel: Parcel, request: Request, whole: Request) -> tuple[Parcel, Iterator[FrameLike]]:
        """Let in weights as the change from those of `parcel.base`, or ``whole`` where the hub gives them so.

        What crosses is known with the hub's first word, and is decided and journalled then, before its frames are read.
        Raises `Invalid` when it is the change from other weights.
        """
        if not self.decide(request).allowed:
            self._check(request, ("digest", parcel.digest, parcel.base))
        header, frames = self._line().get(parcel)
        try:
            if header.base not in (None, parcel.base):
                raise Invalid(f"weights: given as a change from {header.base}, and {parcel.base} are here; ask again")
            self._check(whole if header.base is None else request, ("digest", parcel.digest, header.base))
        except BaseException:
            if isinstance(frames, Generator):
                frames.close()  # and with it the connection, on which they are coming
            raise
        return header, frames

    def _check(self, request: Request, what: Hashable | None) -> None:
        """Decide a crossing and journal it; raise `Denied` in the words of the rule. ``what`` tells a repeat.

        What is tried again after a broken link is one crossing, and its bytes are counted once. It is decided each
        time, for the rules may have changed. The same decision again would tell a reader of the journal nothing, so it
        is left out; another one is written down, without the bytes when an entry before it has them. What an agent
        sent in an earlier life is not known here: it is sent again, and counted again.
        """
        crossing, decision = self.judge(request)
        key = (crossing.run, crossing.round, crossing.kind, crossing.direction, crossing.dataset, what)
        with self._turn:
            before = self._crossed.get(key, ()) if what is not None else ()
        if decision not in before:
            counted = decision.allowed and any(earlier.allowed for earlier in before)
            entry = crossing.model_copy(update={"bytes": 0}) if counted else crossing
            self._record(Crossed(crossing=entry, decision=decision))
        with self._turn:
            if what is not None:
                _remember(self._crossed, key, tuple(dict.fromkeys((*before, decision))))
        if not decision.allowed:
            raise Denied(str(decision))


def decided(request: Request, subject: str, decision: Decision, run: str | None = None) -> Decided:
    """Return what to journal of a decision that is about no crossing: with all that its rules looked at."""
    return Decided(action=request.action, subject=subject, run=run, decision=decision, request=request.kept)


V = TypeVar("V")


def _remember(known: OrderedDict[Hashable, V], key: Hashable, value: V) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > _REMEMBERED:
        known.popitem(last=False)


def _told(answer: Answer | None) -> Hashable | None:
    """Return what makes an answer the same answer when it is sent again; another hub's epoch asks for another."""
    return (answer.position, answer.epoch) if answer is not None else None


class Door(Protocol):
    """The hub's open port."""

    @property
    def port(self) -> int: ...
    @property
    def address(self) -> str:
        """Where sites that joined dial."""
        ...

    def recheck(self) -> None:
        """Have every session shown again to whoever admits sites: one of them may have been revoked."""
        ...

    def close(self) -> None: ...


def listen(desk: Desk, registrar: Doorkeeper, host: str = "127.0.0.1", port: int = 0) -> Door:
    """Open the one port of a hub, or of a relay, for sites. Raises `Unavailable` when it is taken."""
    return Port(desk, port, host, registrar)


def enrol(address: str, identity: Identity, request: bytes) -> bytes:
    """Return a certificate for the key in ``request``, by the identity of a join token or by the one that it renews.

    Both are PEM. Raises `Denied` in the words of the hub, `LinkLost`.
    """
    return pass_on(address, identity, Asked(request))


def pass_on(address: str, identity: Identity, asked: Asked) -> bytes:
    """Return what a relay asks its hub for: a certificate for another, or for its own port. Raises as `enrol`."""
    return network.certified(address, identity, asked)
