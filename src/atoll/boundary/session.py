"""A long-lived conversation of messages over one connection, the same at both ends.

One thread reads and writes: a TLS connection is not for two at once. Whoever calls `send` never waits for the network.
A killed peer is noticed at once; a silent one by its missing heartbeat.
"""

import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from pydantic import ValidationError

from atoll.boundary.channel import HEARTBEAT, SILENCE
from atoll.boundary.line import HEAD, PIECE, WORD, WORD_LIMIT, Line, lost, parsed, raise_told, told
from atoll.errors import AtollError, Invalid, LinkLost
from atoll.spec.message import MESSAGE, Beat, Message

_READ = 1 << 16
_READS = 16  # before it is time again to write, beat and look whether the peer is admitted still
_BACKLOG = 64 << 20  # bytes that may wait for a peer which does not read


class Session:
    """Carries messages until one end says so or is gone. `run` is the thread's work; the line is closed after it."""

    def __init__(self, line: Line, heard: Callable[[Message], None], good: Callable[[], None] = lambda: None) -> None:
        """``heard`` is told each message, in order; ``good`` is asked at each beat and raises to end the session."""
        self._socket, self.line = line.socket, line
        self._heard, self._good = heard, good
        self._turn = threading.Lock()
        self._out: deque[bytes] = deque()
        self._begun, self._sent = False, 0  # of the first of them: whether it was offered, and how many bytes are gone
        self._waiting = 0  # bytes in all of them
        self._in = bytearray()
        self._wake: socket.socket | None = None
        self._words: str | None = None
        self.cause: AtollError | None = None  # what ended it, once it is over
        self._over = False
        self._beat = 0.0  # when the next one is due

    def send(self, message: Message) -> None:
        """Hand over a message; what is handed over before `end` is sent. Raises `LinkLost` when the session is over,
        `Invalid` for a message larger than the other end takes."""
        self._push(MESSAGE.dump_json(message), message.kind)

    def check(self) -> None:
        """Ask now whether the other end is still admitted."""
        with self._turn:
            self._beat = 0.0
            self._stir()

    def end(self, words: str) -> None:
        """Have the session end, and the other end told why."""
        with self._turn:
            self._words = self._words or words
            self._stir()

    def run(self) -> str:
        """Carry messages; return in words why that ended."""
        try:
            words = self._woken()
            self._part(LinkLost(words), whole=True)
            return words
        except AtollError as error:
            self._part(error)
            return str(error)
        except OSError as error:
            self._part(found := lost(error))
            return str(found)
        finally:
            with self._turn:
                self._over = True

    def _woken(self) -> str:
        """Carry messages with something at hand by which other threads wake this one."""
        wake, woken = socket.socketpair()
        with wake, woken:
            for end in (self._socket, wake, woken):
                end.setblocking(False)
            with self._turn:
                self._wake = wake
            try:
                return self._carry(woken)
            finally:
                with self._turn:
                    self._wake = None

    def _carry(self, woken: socket.socket) -> str:
        heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while self._words is None:
                now = time.monotonic()
                if now >= self._beat:
                    self._beat = now + HEARTBEAT  # first, so that a check asked for meanwhile is not lost
                    self._good()
                    self._push(MESSAGE.dump_json(Beat()), "beat")
                writing = selectors.EVENT_WRITE if self._write() else 0
                selector.modify(self._socket, selectors.EVENT_READ | writing)
                selector.select(0.0 if self._ready else max(0.0, self._beat - time.monotonic()))
                with suppress(BlockingIOError):
                    woken.recv(_READ)
                if self._read():
                    heard = time.monotonic()
                elif time.monotonic() - heard > SILENCE:
                    raise LinkLost(f"not heard for {SILENCE:g} s")
        return self._words

    @property
    def _ready(self) -> bool:
        """Tell whether TLS holds what came already, of which the selector knows nothing."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

    def _part(self, error: AtollError, whole: bool = False) -> None:
        """Tell the other end why this ends, as far as it still listens; ``whole``: after all that it was to get.

        A message that is half gone is sent to its end in any case: nothing could be understood after the half of it.
        """
        with self._turn:
            self.cause, self._over = error, True
            waiting = list(self._out) if whole else list(self._out)[: int(self._begun)]
        try:
            self.line.patience(self.line.parting)
            self.line.until = time.monotonic() + self.line.parting
            for number, data in enumerate(waiting):
                self.line.write(data if number else memoryview(data)[self._sent :])
            self.line.say(told(error))
        except (LinkLost, OSError):  # it is gone, or does not read
            self.line.close()

    def _push(self, data: bytes, kind: str) -> None:
        if len(data) > WORD_LIMIT:
            raise Invalid(f"message: a {kind} of {len(data)} bytes is over the limit of {WORD_LIMIT}; ask for less")
        item = HEAD.pack(len(data), 0, 0, WORD) + data
        with self._turn:
            if self._over:
                raise LinkLost("the session with the other end is over")
            self._out.append(item)
            self._waiting += len(item)
            if self._waiting > _BACKLOG:
                self._words = self._words or "it does not take what it is sent"
            self._stir()

    def _stir(self) -> None:
        """Wake the thread. In its turn only: a closed socket's number may be another connection's the next moment."""
        if self._wake is not None:
            with suppress(BlockingIOError):  # it is to wake already
                self._wake.send(b"!")

    def _write(self) -> bool:
        """Send what waits; tell whether something is left for when the connection takes more.

        TLS wants the very piece again that it could not take, so pieces begin where the last one that went ended.
        """
        while self._out:
            data, self._begun = self._out[0], True
            try:
                self._sent += self._socket.send(memoryview(data)[self._sent : self._sent + PIECE])
            except (BlockingIOError, ssl.SSLWantWriteError):
                return True
            except ssl.SSLWantReadError:  # reading comes next in any case
                return False
            if self._sent == len(data):
                with self._turn:
                    self._out.popleft()
                    self._begun, self._sent, self._waiting = False, 0, self._waiting - len(data)
        return False

    def _read(self) -> bool:
        """Hand on the messages that are here, but no endless flood of them; tell whether anything came."""
        came = False
        for _ in range(_READS):
            try:
                data = self._socket.recv(_READ)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            if not data:
                raise LinkLost("the other end closed its session")
            came = True
            self._in += data
            while (message := self._message()) is not None:
                if not isinstance(message, Beat):
                    self._heard(message)
        return came

    def _message(self) -> Message | None:
        if len(self._in) < HEAD.size:
            return None
        size, scales, _, length = HEAD.unpack_from(self._in)
        if size > WORD_LIMIT or scales or length != WORD:
            raise Invalid("session: only words travel in it; update one of the two ends")
        if len(self._in) < HEAD.size + size:
            return None
        data = bytes(self._in[HEAD.size : HEAD.size + size])
        del self._in[: HEAD.size + size]
        raise_told(parsed(data))
        try:
            return MESSAGE.validate_json(data)
        except ValidationError as error:
            raise Invalid(f"session: a message with {error.error_count()} wrong fields; update one end") from None
