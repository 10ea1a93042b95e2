"""One connection at the hub's port: who it is, then one conversation after another (put, get, certify) or a session.

The first byte tells the two ways in apart: TLS begins with 22, and a word of ours with its size, which is more than
that and, in the first word without TLS, fits into the byte.
"""

import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal, TypeVar

from pydantic import ValidationError

from atoll.boundary.channel import Desk, Frame, FrameLike
from atoll.boundary.identity import Peer
from atoll.boundary.line import STALL, Line, told
from atoll.boundary.register import Asked, Doorkeeper
from atoll.boundary.secure import peer, secured
from atoll.boundary.session import Session
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.spec.document import Document
from atoll.spec.message import Parcel

F = TypeVar("F", bound=FrameLike)
_TLS = b"\x16"
_HERE_LIMIT = 255  # bytes of the first word without TLS; ours have 43 to 170


class Opening(Document):
    """The word that begins a conversation; ``here`` comes before the first where there is no certificate."""

    verb: Literal["here", "session", "put", "get", "certify"]
    parcel: Parcel | None = None
    site: str = ""
    secret: str = ""
    request: str = ""
    port: bool = False
    name: str = ""
    through: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end: a certificate's name, or a site of this machine."""

    peer: Peer | None
    site: str

    def __str__(self) -> str:
        return f"site {self.site[:64]!r}"


class Visit:
    """The work of one connection's thread. Only `end` and `recheck` are for others to call."""

    def __init__(self, connection: socket.socket, host: str, desk: Desk, registrar: Doorkeeper | None) -> None:
        self.host = host
        self.caller: Caller | None = None  # has not said yet who it is
        self._line = Line(connection)
        self._desk, self._registrar = desk, registrar
        self._turn = threading.Lock()
        self._session: Session | None = None
        self._ended = False

    # --- by any thread

    def end(self, words: str) -> None:
        """Have it end soon, and a session's other end told why."""
        with self._turn:
            if self._session is not None:
                self._session.end(words)
            else:
                self._cut()

    def recheck(self) -> None:
        """End it now if who is there is not admitted any more. An invitation is looked at when it is used."""
        with self._turn:
            if self._session is not None:
                self._session.check()
            elif self.caller is not None and self.caller.peer is not None and self.caller.peer.kind == "site":
                try:
                    self._admit(self.caller)
                except (Denied, LinkLost):  # a relay knows nobody whom its hub did not tell it of
                    self._cut()

    def _cut(self) -> None:
        if not self._ended:
            self._ended = True
            self._line.cut()

    # --- by its own

    def greet(self, context: ssl.SSLContext | None, seconds: float) -> Caller:
        """Learn within ``seconds`` who is there. Raises `Denied`, `LinkLost`, OSError where TLS fails."""
        connection = self._line.socket
        self._line.patience(seconds)
        self._line.until = time.monotonic() + seconds
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if connection.recv(1, socket.MSG_PEEK) == _TLS:
            self.caller = self._proven(connection, context, seconds)
        elif _local(self.host):
            self.caller = self._known()
        else:
            raise Denied(f"{self.host}: comes without TLS; join with a token of this hub")
        return self.caller

    def _proven(self, connection: socket.socket, context: ssl.SSLContext | None, seconds: float) -> Caller:
        if context is None:
            raise Denied(f"{self.host}: comes with TLS, and this hub has no CA; run: atoll hub init")
        until, wrapped = self._line.until, secured(connection, context, server=True)
        line = Line(wrapped, seconds)
        line.until = until
        with self._turn:
            self._line = line  # before the handshake, so that it can be cut
            if self._ended:  # just now, when the one before it was in nobody's hands
                line.cut()
        wrapped.do_handshake()
        proven = peer(wrapped)
        return Caller(proven, proven.name)

    def _known(self) -> Caller:
        word = _opening(self._line.hear(_HERE_LIMIT))
        if word.verb != "here" or not self._desk.admits(word.site, word.secret):
            raise Denied(f"site {word.site[:64]!r} is not known by this secret; join with a token")
        return Caller(None, word.site)

    def converse(self, caller: Caller, idle: float) -> None:
        """Have one conversation after another, with at most ``idle`` seconds between them, or a session.

        An error ends a conversation, and the connection only where nobody could tell any more what comes next.
        """
        line = self._line
        while True:
            try:
                word = _opening(line.hear())
                line.until = math.inf
                line.patience(STALL)
                if word.verb != "certify":
                    self._admit(caller)
                if word.verb == "session":
                    return self._carry(caller)
                self._do(caller, word)
            except AtollError as error:
                if line.spoilt:
                    raise
                line.say(told(error))
            line.drain()  # the rest of what the desk did not want
            line.patience(idle)

    def tell(self, error: AtollError) -> None:
        """Say why this ends, where it did not just break: who has asked nothing yet would take it for an answer."""
        if not self._line.broken:
            with suppress(LinkLost):
                self._line.say(told(error))

    def part(self) -> None:
        self._line.linger()
        with self._turn:
            self._ended = True  # from now on nobody cuts it
            self._line.close()

    def _admit(self, caller: Caller) -> None:
        if caller.peer is not None and self._registrar is not None:
            self._registrar.admit(caller.peer)

    def _do(self, caller: Caller, word: Opening) -> None:
        line = self._line
        if word.verb == "certify" and caller.peer is not None and self._registrar is not None:
            asked = Asked(word.request.encode(), word.port, word.name, word.through)
            line.say({"certificate": self._registrar.certify(caller.peer, asked).decode()})
        elif word.verb == "put" and word.parcel is not None:
            self._desk.take(caller.site, word.parcel, lambda offset: self._wanted(caller, offset))
            line.say({"done": True})
        elif word.verb == "get" and word.parcel is not None:
            header, frames = self._desk.give(caller.site, word.parcel)
            line.say(header.model_dump_json().encode())
            line.send(self._admitted(caller, frames))
        else:
            raise Invalid(f"{caller}: a conversation begins with session, put, get or certify; this one does not")

    def _wanted(self, caller: Caller, offset: int) -> Iterator[Frame]:
        """Ask for the frames of a put. What is refused, or not wanted any more, is never sent."""
        self._line.say({"go": offset})
        yield from self._admitted(caller, self._line.frames())
        self._admit(caller)

    def _admitted(self, caller: Caller, frames: Iterator[F]) -> Iterator[F]:
        """Hand on frames for as long as the caller is admitted: nothing counts of what a revoked site brings."""
        for frame in frames:
            self._admit(caller)
            yield frame

    def _carry(self, caller: Caller) -> None:
        site = caller.site
        session = Session(self._line, lambda message: self._desk.heard(site, message), lambda: self._admit(caller))
        with self._turn:
            self._session = session  # first: who is shut out while it opens is told so too
        try:
            self._line.say({"open": True})
            self._desk.opened(site, session.send)
            words = "the session ended by a fault of the hub"
            try:
                words = session.run()
            finally:
                self._desk.closed(site, session.send, words)
        finally:
            with self._turn:
                self._session = None


def _opening(word: dict[str, object]) -> Opening:
    try:
        return Opening.model_validate(word)
    except ValidationError as error:
        words = (
            f"a word with {error.error_count()} wrong fields where a conversation begins; update one of the two ends"
        )
        raise Invalid(f"stream: {words}") from None


def _local(host: str) -> bool:
    """Tell whether an address is this machine's own, also where an IPv6 port shows it as one of IPv4."""
    address = ip_address(host.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
