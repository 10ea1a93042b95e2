"""How long a client of HTTP may take: to send a request as a whole, and to read what it is answered.

uvicorn itself waits without end for a request that has begun or never does, and for room in a connection that nobody
reads; a few thousand of those (slow loris) take all the files that a process may have open.
"""

import asyncio
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST = 30.0  # seconds for a request, headers and body, from the opening of its connection or its first byte on
READING = 60.0  # seconds for some of an answer to be taken
CONNECTIONS = 1000  # at a time; who comes after them is told so with a 503


class Punctual(H11Protocol):
    """uvicorn's HTTP/1.1, with a deadline for the client. Between two requests uvicorn's own is the shorter one."""

    def __init__(self, *arguments: Any, request: float, reading: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._request, self._reading = request, reading
        self._sending: asyncio.TimerHandle | None = None  # while a request is not here as a whole
        self._taking: asyncio.TimerHandle | None = None  # while an answer is not taken

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # pyright: ignore[reportArgumentType] - as uvicorn has it
        self._sending = self.loop.call_later(self._request, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._sending = _over(self._sending)
        elif self._sending is None:
            self._sending = self.loop.call_later(self._request, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:  # all of it was here, and nothing of another has come
            self._sending = _over(self._sending)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = _over(self._taking) or self.loop.call_later(self._reading, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taking = _over(self._taking)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._sending, self._taking = _over(self._sending), _over(self._taking)


def _over(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def punctual(request: float = REQUEST, reading: float = READING) -> Any:
    """Return the protocol for uvicorn's ``http``, with these seconds."""
    return partial(Punctual, request=request, reading=reading)
