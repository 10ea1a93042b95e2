"""The hub's one port: sites that joined come in by TLS, those of this machine that the hub started itself by a secret.

A thread serves each connection, and what it says there is in `visit`. How much anybody may take of the port is here.
"""

import logging
import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from atoll.boundary.channel import Desk
from atoll.boundary.identity import Identity
from atoll.boundary.line import lost
from atoll.boundary.register import Doorkeeper
from atoll.boundary.secure import server_context
from atoll.boundary.visit import Caller, Visit
from atoll.errors import AtollError, Invalid, LinkLost, Unavailable

log = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "::1")
_ANYWHERE = ("0.0.0.0", "::")  # noqa: S104 - named to be told apart, not listened on by themselves
_CLOSING = 10.0  # seconds for all visits together to end
_PAUSE = 0.1  # seconds before the next is let in, where the system has no room for one more


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a port anybody may take."""

    connections: int = 2048
    of_one: int = 128  # of them; a site has one for its session and one for each stream
    greeting: float = 10.0  # seconds for TLS's handshake and for the first word
    idle: float = 600.0  # seconds between two conversations


class Port:
    """Listens from the start until `close`. Without a ``registrar`` it is for sites of this machine only."""

    def __init__(
        self,
        desk: Desk,
        port: int = 0,
        host: str = "127.0.0.1",
        registrar: Doorkeeper | None = None,
        limits: Limits | None = None,
    ) -> None:
        if registrar is None and host not in _LOOPBACK:
            raise Invalid(f"host: {host} can be dialled from elsewhere, and this hub has no CA; run: atoll hub init")
        self._desk, self._registrar, self._limits = desk, registrar, limits or Limits()
        self._turn = threading.Lock()
        self._spoken: tuple[Identity, ssl.SSLContext] | None = None
        self._context()  # an identity that is none is told now
        self._visits: dict[Visit, threading.Thread] = {}
        self._closing = threading.Event()
        self._sockets = _listening(host, port)
        self.port: int = self._sockets[0].getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{'tls' if registrar is not None else 'tcp'}://{shown}:{self.port}"
        self._accepting = [
            threading.Thread(target=self._accept, args=(one,), name="port", daemon=True) for one in self._sockets
        ]
        for thread in self._accepting:
            thread.start()

    def close(self) -> None:
        """End every session and conversation; returns when no thread of the port is left."""
        self._closing.set()
        for listening in self._sockets:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        until = time.monotonic() + _CLOSING
        for thread in self._accepting:
            thread.join(max(0.0, until - time.monotonic()))
        for listening in self._sockets:
            listening.close()
        with self._turn:
            visits = dict(self._visits)
        for visit in visits:
            visit.end("the hub is closing")
        for thread in visits.values():
            thread.join(max(0.0, until - time.monotonic()))
        if left := sum(thread.is_alive() for thread in visits.values()):
            log.warning("port: %d connections did not end in %g s; they end with this process", left, _CLOSING)

    def recheck(self) -> None:
        """End at once, and not at its next beat or frame, whatever a site has open that is not admitted any more."""
        with self._turn:
            visits = list(self._visits)
        for visit in visits:
            visit.recheck()

    def _accept(self, listening: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, (host, *_) = listening.accept()
            except OSError as error:
                if not self._closing.is_set():
                    self._wait(error.strerror or type(error).__name__)
                continue
            if len(self._visits) >= self._limits.connections:
                log.warning("port: %d connections are open; one from %s was turned away", len(self._visits), host)
                connection.close()
                continue
            visit = Visit(connection, host, self._desk, self._registrar)
            thread = threading.Thread(target=self._serve, args=(visit,), name=f"port-{host}", daemon=True)
            with self._turn:
                self._visits[visit] = thread
            try:
                thread.start()
            except RuntimeError as error:  # no more threads
                with self._turn:
                    del self._visits[visit]
                connection.close()
                self._wait(str(error))

    def _wait(self, words: str) -> None:
        """Let what is open end before the next one is let in: the system has no room for more, and the port outlives
        that."""
        log.warning("port: nobody can be let in (%s)", words)
        self._closing.wait(_PAUSE)

    def _serve(self, visit: Visit) -> None:
        try:
            caller = visit.greet(self._context(), self._limits.greeting)
            self._check_share(caller)
            visit.converse(caller, self._limits.idle)
        except AtollError as error:
            visit.tell(error)
            # As a lost link every connection ends, soon or late.
            log.log(logging.DEBUG if isinstance(error, LinkLost) else logging.INFO, "%s: %s", visit.host, error)
        except OSError as error:
            log.info("%s: %s", visit.host, lost(error))
        except Exception:
            # A fault of ours in one conversation must not take the port with it.
            log.exception("a conversation with %s", visit.host)
        finally:
            visit.part()
            with self._turn:
                del self._visits[visit]

    def _context(self) -> ssl.SSLContext | None:
        """Return what TLS is spoken with: the hub's certificate of now, which is renewed while the port is open."""
        if self._registrar is None:
            return None
        with self._turn:
            identity = self._registrar.identity
            if self._spoken is None or self._spoken[0] != identity:
                self._spoken = identity, server_context(identity)
            return self._spoken[1]

    def _check_share(self, caller: Caller) -> None:
        """See that one site does not take the place of all others. Not `Denied`: it is to come again."""
        with self._turn:
            count = sum(visit.caller == caller for visit in self._visits)
        if count > self._limits.of_one:
            raise LinkLost(f"{caller}: has {count - 1} connections, and none is free for another; try again")


def _listening(host: str, port: int) -> list[socket.socket]:
    """Return what listens at ``host`` and, where that is one address of several, also for the sites of this machine."""
    first = _bound(host, port)
    if host in (*_LOOPBACK, *_ANYWHERE):
        return [first]
    try:
        return [first, _bound(_LOOPBACK[0], first.getsockname()[1])]
    except Unavailable:
        first.close()
        raise


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=host == "::")
    except OSError as error:
        why = os.strerror(error.errno or 0)  # without the address that Python adds
        raise Unavailable(
            f"port {port} for sites: cannot be used at {host} ({why}); choose another with --site-port"
        ) from None
