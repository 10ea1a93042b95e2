"""One connection between a site and the hub: words (JSON) and frames (raw numbers), one after the other.

Each item has a header of 24 bytes, little-endian: bytes of data, bytes of scales, offset, length. A word has length -1
and its JSON as data. A frame's numbers lie where the socket put them, so that nothing is copied on the way to the disk
or into a vector. TLS lies under this or, between processes of one machine, nothing.
"""

import json
import math
import select
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from pydantic_core import from_json

from atoll.boundary.channel import Bytes, Frame, FrameLike
from atoll.errors import AtollError, Invalid, LinkLost, named

HEAD = struct.Struct("<IIqq")
WORD = -1
WORD_LIMIT = 4 << 20  # bytes of one word
# What is handed to TLS at once: it takes a piece whole or not at all, so the time for moving on is for so many bytes.
PIECE = 1 << 17
STALL = 30.0  # seconds in which a conversation must move
_DATA_LIMIT = 16 << 20  # bytes of one frame's data; ours have about 1 MiB
_SCALES_LIMIT = 1 << 20
_DRAIN_LIMIT = 256 << 20  # bytes; a sender of ours looks after each frame whether it should stop
_RESET = struct.pack("ii", 1, 0)  # do not wait for what was not taken yet
_TOLD_LIMIT = 4000  # characters of an error's words
_END = {"end": True}  # after the last frame: without it a killed sender would look like a short stream
_STOP = {"end": False}  # after the last frame that was sent of more, because the other end spoke


class Line:
    """A connection, for one thread; others may only `cut` it. A peer that is gone, or stalls, is `LinkLost`."""

    def __init__(self, connection: socket.socket, stall: float = STALL) -> None:
        self.socket = connection
        self.broken = False  # nothing more can come
        self.spoilt = False  # nor where what came is nothing of ours: nobody can tell where the next item begins
        self.until = math.inf  # by `time.monotonic`: when it is over, however it moves
        self.parting = 1.0  # seconds for the last word to arrive
        self._gently = False
        self._flowing = False  # frames are coming, and the word after them has not come yet
        self._buffer = bytearray()
        self._secure = isinstance(connection, ssl.SSLSocket)
        self._flags, self._piece = (0, PIECE) if self._secure else (socket.MSG_WAITALL, _DATA_LIMIT)
        self.patience(stall)

    def patience(self, seconds: float) -> None:
        """Set for how long the peer may be silent."""
        if self._secure:
            self.socket.settimeout(seconds)
            return
        # The kernel keeps the time, so that one call can wait for a whole frame without a poll before each part of it.
        self.socket.setblocking(True)
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def say(self, word: object) -> None:
        """Send a word: JSON text that is there already, or what is to become it."""
        data = word if isinstance(word, bytes) else json.dumps(word).encode()
        self.write(HEAD.pack(len(data), 0, 0, WORD) + data)

    def hear(self, limit: int = WORD_LIMIT) -> dict[str, Any]:
        """Return the next word, of at most ``limit`` bytes; raise the error that it tells of, if it does."""
        item = self._next(limit)
        if isinstance(item, Frame):
            raise Invalid("stream: tensors came where a word was due; update one of the two ends")
        raise_told(item)
        return item

    def send(self, frames: Iterable[FrameLike]) -> None:
        """Send frames and the word that ends them; stop where the other end says something: it wants no more."""
        for frame in frames:
            data, scales = memoryview(frame.data), memoryview(frame.scales)
            self.write(HEAD.pack(data.nbytes, scales.nbytes, frame.offset, frame.length))
            self.write(data)
            self.write(scales)
            if self.spoken:
                return self.say(_STOP)
        return self.say(_END)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames that come; each is good until the next one. A stream that breaks off is `LinkLost`."""
        self._flowing = True
        while isinstance(item := self._next(), Frame):
            yield item
        raise_told(item)
        if item == _STOP:
            raise LinkLost("the other end broke its stream off")
        if item != _END:
            raise Invalid("stream: another word came where its end was due; update one of the two ends")

    def drain(self, limit: int = _DRAIN_LIMIT) -> None:
        """Read on to the end of a stream that is not wanted: whoever writes to a closed connection hears nothing."""
        left = limit
        while self._flowing and not self.spoilt and isinstance(item := self._next(), Frame):
            left -= HEAD.size + len(item.data) + len(item.scales)
            if left < 0:
                raise self._broken(LinkLost("the other end goes on sending what nobody wants"))

    @property
    def spoken(self) -> bool:
        """Tell whether something came that was not heard yet, or the end of the connection.

        With TLS that is a word's record, or the beginning of it: there are no tickets (see `secure`), and neither end
        changes its keys.
        """
        if isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            return True
        poll = select.poll()  # unlike select it knows a thousand connections and more
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def write(self, data: Bytes) -> None:
        """Send bytes, piece by piece."""
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), self._piece):
                self._look()
                self.socket.sendall(view[start : start + self._piece])
        except OSError as error:
            raise self._broken(lost(error)) from None

    def cut(self) -> None:
        """End the connection for whoever waits at either end of it, from any thread; its own thread closes it.

        Closed by another, its number could be a newer connection's before its own thread has noticed. And not by
        `SSLSocket.shutdown`, which takes TLS away: that thread would send on as plaintext.
        """
        with suppress(OSError):  # the other end was quicker
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def linger(self) -> None:
        """Give the last word time to arrive before `close`: with something unread, TCP would take it back."""
        if self.broken:
            return
        self._gently = True
        with suppress(OSError):  # the other end was quicker
            self.patience(self.parting)
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
            until = time.monotonic() + self.parting
            while time.monotonic() < until and socket.socket.recv(self.socket, PIECE):
                pass

    def close(self) -> None:
        """Close at once. An end alone, without a reset, would not reach whoever is just waiting for room to send."""
        if not self._gently:
            with suppress(OSError):  # it is closed already
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.cut()
        self.socket.close()

    def _next(self, limit: int = WORD_LIMIT) -> Frame | dict[str, Any]:
        head = bytearray(HEAD.size)
        self._fill(memoryview(head))
        data, scales, offset, length = HEAD.unpack(head)
        if length == WORD:
            self._flowing = False
        if data > (limit if length == WORD else _DATA_LIMIT) or scales > (0 if length == WORD else _SCALES_LIMIT):
            raise self._broken(Invalid(f"stream: an item of {data} and {scales} bytes is over the limit; send less"))
        if length == WORD:
            word = bytearray(data)
            self._fill(memoryview(word))
            return parsed(word)
        if len(self._buffer) < data + scales:
            self._buffer = bytearray(data + scales)
        view = memoryview(self._buffer)[: data + scales]
        self._fill(view)
        if offset < 0 or length < 0:
            raise Invalid(f"stream: a frame of {length} elements at {offset}; both count from 0")
        return Frame(offset, length, view[:data], view[data:])

    def _fill(self, view: memoryview) -> None:
        filled, size = 0, len(view)
        try:
            while filled < size:
                self._look()
                read = self.socket.recv_into(view[filled:], 0, self._flags)
                if not read:
                    raise self._broken(LinkLost("the other end closed the connection"))
                filled += read
        except OSError as error:
            raise self._broken(lost(error)) from None

    def _look(self) -> None:
        """See that there is time left: a byte now and then keeps no connection open that should be over."""
        if time.monotonic() > self.until:
            raise self._broken(LinkLost("the other end takes too long"))

    def _broken(self, error: AtollError) -> AtollError:
        self.spoilt, self.broken = True, isinstance(error, LinkLost)
        return error


# What OpenSSL says where the other end does not take this one's certificate, or TLS. Anyone between the two can say it
# before TLS stands, so none of it is `Denied`: that would end a site for good.
_REFUSALS = {
    "CERTIFICATE_EXPIRED": "its certificate ran out, or a clock is wrong; join again with the same token",
    "UNKNOWN_CA": "its certificate is of another CA; ask for another invitation",
    "UNSUPPORTED_CERTIFICATE": "its certificate is for another use; ask for another invitation",
    "BAD_CERTIFICATE": "its certificate is not in order or, by the clock there, not valid yet; compare the clocks",
    "CERTIFICATE_REQUIRED": "it showed no certificate; join with a token",
    "PROTOCOL_VERSION": "its TLS is older than 1.3; update it",
}


def lost(error: OSError) -> LinkLost:
    """Return what a failing connection means. Waiting too long shows as "would block", for the kernel kept the time."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return LinkLost(f"the certificate of the other end: {error.verify_message}; see that it is the hub you joined")
    if isinstance(error, ssl.SSLEOFError):
        return LinkLost("the other end closed the connection")
    if isinstance(error, BlockingIOError | TimeoutError | ssl.SSLWantReadError | ssl.SSLWantWriteError):
        return LinkLost("the other end has stalled")
    if isinstance(error, ssl.SSLError):
        for reason, words in _REFUSALS.items():
            if reason in str(error.reason):
                return LinkLost(f"the other end does not take this one: {words}")
        return LinkLost(f"the other end speaks no TLS, or ended it ({error.reason or error.strerror})")
    return LinkLost(f"the connection broke ({error.strerror or type(error).__name__})")


def parsed(data: bytes | bytearray) -> dict[str, Any]:
    """Return a word as the table it is. Raises `Invalid` for anything else."""
    try:
        word = from_json(data)  # unlike json.loads it survives a thousand brackets
    except ValueError:
        word = None
    if not isinstance(word, dict):
        raise Invalid("stream: the word in it is no JSON table; update one of the two ends")
    return word


def told(error: AtollError) -> dict[str, str]:
    """Return an error as the word that the other end raises it from."""
    return {"error": type(error).__name__, "words": str(error)[:_TOLD_LIMIT]}


def raise_told(word: dict[str, Any]) -> None:
    """Raise the error that a word tells of, as the class it was; another word passes, also one with such a field."""
    if word.keys() == {"error", "words"}:
        raise named(str(word["error"]), str(word["words"])[:_TOLD_LIMIT])
