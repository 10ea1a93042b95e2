"""A channel over the network: the site dials the hub, keeps one session open, and has its conversations beside it.

``tls://host:port`` with the site's identity, ``tls://NAME@host:port`` where the relay of that name answers in the hub's
place, or ``tcp://127.0.0.1:port`` with the secret that the hub gave a site that it started itself. Nothing at a site
listens.
"""

import logging
import queue
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from atoll.boundary.channel import Frame, Source
from atoll.boundary.identity import Identity, Peer
from atoll.boundary.line import STALL, Line, lost
from atoll.boundary.register import Asked
from atoll.boundary.secure import client_context, peer, secured
from atoll.boundary.session import Session
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.spec.message import Message, Parcel

log = logging.getLogger(__name__)
_ADDRESS = re.compile(
    r"(?P<scheme>tls|tcp)://(?:(?P<relay>[a-z0-9][a-z0-9_.-]{0,62})@)?"
    r"\[?(?P<host>[A-Za-z0-9.:-]{1,253}?)\]?:(?P<port>[0-9]{1,5})"
)
_LOOPBACK = ("127.0.0.1", "::1")
_GREETING = 10.0  # seconds for a connection to stand and be answered
_RECEIPT = 600.0  # seconds for the hub to say that it has what it was sent
_IDLE = 2  # connections kept for the next conversation

Credential = Identity | tuple[str, str]  # or (site, secret)


def connect(address: str, credential: Credential) -> Line:
    """Dial the hub. Raises `Invalid` for an address that is none, `LinkLost` when the hub is not there, when it does
    not take this certificate, and when somebody else answers: none of that is the hub's own word."""
    place, relay = _parts(address, credential)
    trusted = (client_context(credential), credential.peer) if isinstance(credential, Identity) else None
    connection: socket.socket | None = None
    try:
        connection = socket.create_connection(place, _GREETING)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if trusted is not None:
            context, mine = trusted
            connection = secured(connection, context)
            _check_hub(connection, mine, relay)
        return Line(connection, _GREETING)
    except (OSError, LinkLost) as error:
        if connection is not None:
            connection.close()
        raise LinkLost(f"{address}: {lost(error) if isinstance(error, OSError) else error}") from None


def _parts(address: str, credential: Credential) -> tuple[tuple[str, int], str]:
    """Return host and port, and the relay that is to answer there, or "" for the hub itself. A secret is for this
    machine alone: it would go out as it is."""
    found = _ADDRESS.fullmatch(address)
    secure = isinstance(credential, Identity)
    if found is None or int(found["port"]) > 65535 or (found["scheme"] == "tls") != secure:
        raise Invalid(f"address: {address[:100]!r} is not what this site dials; it reads tls://host:port")
    if not secure and found["host"] not in _LOOPBACK:
        raise Invalid(f"address: {address[:100]!r} is another machine and without TLS; join with a token")
    try:
        found["host"].encode("idna")
    except UnicodeError:
        raise Invalid(f"address: {found['host'][:100]!r} is no name of a host; it reads tls://host:port") from None
    return (found["host"], int(found["port"])), found["relay"] or ""


def _check_hub(connection: socket.socket, mine: Peer, relay: str) -> None:
    try:
        hub = peer(connection)
    except Denied as error:  # whoever answers is not the one to deny anything
        raise LinkLost(f"not the hub of this site answers; look at the address ({error})") from None
    if (hub.kind, hub.hub, hub.name) != ("relay" if relay else "hub", mine.hub, relay):
        whose = f"the relay {relay}" if relay else "the hub of this site"
        raise LinkLost(f"{hub} answers, which is not {whose}; look at the address")


def certified(address: str, identity: Identity, asked: Asked) -> bytes:
    """Return a certificate for the key in a request: by an invitation's identity, or anew by a member's own.

    Raises `Denied` in the words of the hub.
    """
    line = connect(address, identity)
    try:
        about = {"port": asked.port, "name": asked.name, "through": list(asked.through)}
        line.say({"verb": "certify", "request": asked.request.decode(), **about})
        return str(line.hear().get("certificate", "")).encode()
    finally:
        line.close()


class SocketChannel:
    """A session with the hub at ``address``. Raises as `connect`, and `Denied` when the hub does not admit the site.

    The session is the site's presence: when it ends, so does every conversation that is under way.
    """

    def __init__(self, address: str, site: str, credential: Credential) -> None:
        self._address, self._credential = address, credential
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        # Reentrant: a stream that somebody dropped may be closed wherever memory is tidied up.
        self._turn = threading.RLock()
        self._idle: list[Line] = []
        self._busy: set[Line] = set()
        self._open = True
        line = self._connected()
        try:
            line.say({"verb": "session"})
            line.hear()
        except BaseException:
            line.close()
            raise
        self._session = Session(line, self._inbox.put)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"{site}-session")
        self._thread.start()

    def _run(self) -> None:
        try:
            log.info("%s: %s", self._address, self._session.run())
        finally:  # also after a fault of ours: who waits for a message must not wait for ever
            self._end()
            self._inbox.put(None)
            self._session.line.linger()
            self._session.line.close()

    def _end(self) -> None:
        with self._turn:
            self._open = False
            for line in self._busy:
                line.cut()
            while self._idle:
                self._idle.pop().close()

    def _connected(self) -> Line:
        line = connect(self._address, self._credential)
        if isinstance(self._credential, tuple):
            site, secret = self._credential
            try:
                line.say({"verb": "here", "site": site, "secret": secret})
            except BaseException:
                line.close()
                raise
        return line

    def send(self, message: Message) -> None:
        try:
            self._session.send(message)
        except LinkLost:
            raise self._over() from None

    def receive(self, timeout: float) -> Message | None:
        try:
            message = self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None
        if message is None:
            self._inbox.put(None)  # the next caller learns it too
            raise self._over()
        return message

    def _over(self) -> AtollError:
        """Return what everybody is told once the session has ended: the hub's own word where it denied this site."""
        cause = self._session.cause
        if isinstance(cause, Denied):
            return Denied(f"{self._address}: {cause}")
        return LinkLost(f"{self._address}: the session with the hub is over; dial again")

    def put(self, parcel: Parcel, frames: Source) -> None:
        line, answer = self._begun("put", parcel)
        try:
            if answer != _DONE:  # else the hub has it already, or went on without it
                line.send(frames(_offset(answer)))
                line.patience(_RECEIPT)
                if line.hear() != _DONE:
                    raise Invalid("put: the hub answered with something else than a receipt; update it or the site")
        except BaseException as error:
            self._failed(line, error)
            raise
        self._free(line)

    def get(self, parcel: Parcel) -> tuple[Parcel, Iterator[Frame]]:
        line, answer = self._begun("get", parcel)
        try:
            header = Parcel.model_validate(answer)
        except ValidationError:
            self._drop(line)
            raise Invalid("get: the hub answered with something else than a parcel; update it or the site") from None
        frames = self._frames(line)
        next(frames)  # begun here, so that it ends the connection also for who drops it unread
        return header, frames

    def _frames(self, line: Line) -> Iterator[Frame]:
        try:
            yield Frame(0, 0, b"")
            yield from line.frames()
        except BaseException as error:  # also of whoever does not want the rest
            self._failed(line, error)
            raise
        self._free(line)

    def _begun(self, verb: str, parcel: Parcel) -> tuple[Line, dict[str, Any]]:
        """Open a conversation; return its connection and the hub's first word. A connection that was kept may be gone
        by now: another one is tried then."""
        while True:
            line, kept = self._line()
            try:
                line.patience(STALL)
                line.say({"verb": verb, "parcel": parcel.model_dump(mode="json")})
                return line, line.hear()
            except BaseException as error:
                self._failed(line, error)
                if not (kept and line.spoilt and isinstance(error, LinkLost)):
                    raise

    def _line(self) -> tuple[Line, bool]:
        """Return a connection, and whether it was used before."""
        with self._turn:
            while self._idle:
                line = self._idle.pop()
                if not line.spoken:  # whoever has been asked nothing says only that it is gone
                    self._busy.add(line)
                    return line, True
                line.close()
        if not self._open:
            raise self._over()
        line = self._connected()
        with self._turn:
            if self._open:
                self._busy.add(line)
                return line, False
        line.close()
        raise self._over()

    def _failed(self, line: Line, error: BaseException) -> None:
        """End a conversation that came to nothing; where that was because the session is over, say so instead."""
        self._drop(line)
        if isinstance(error, LinkLost) and not self._open:
            raise self._over() from None

    def _drop(self, line: Line) -> None:
        with self._turn:
            self._busy.discard(line)
        line.close()

    def _free(self, line: Line) -> None:
        with self._turn:
            self._busy.discard(line)
            if self._open and len(self._idle) < _IDLE:
                self._idle.append(line)
                return
        line.close()

    def close(self) -> None:
        """End the session and with it whatever is under way."""
        self._end()
        self._session.end("the site closed its session")
        self._thread.join(_GREETING)


_DONE = {"done": True}


def _offset(answer: dict[str, Any]) -> int:
    """Return from where on the hub wants a stream."""
    offset = answer.get("go")
    if type(offset) is not int or offset < 0:
        raise Invalid("put: the hub answered with no place to begin at; update it or the site")
    return offset
