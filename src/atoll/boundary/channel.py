"""The seam between a site and the hub: typed messages both ways, and tensor streams that the site opens.

A site holds a `Channel`; the hub is reached through what it offers, a `Desk`. Two forms fit the seam, `memory`
(one process) and `network` (TLS), and both are products. Only `atoll.boundary.gate` may use either.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from atoll.spec.message import Message, Parcel

Bytes = bytes | bytearray | memoryview
HEARTBEAT = 2.0  # seconds between two signs of life, either way
SILENCE = 10.0  # seconds without one after which a session is dead


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a stream: `length` elements from `offset` on, encoded as the parcel's `wire` says."""

    offset: int
    length: int
    data: Bytes
    scales: Bytes = b""


class FrameLike(Protocol):
    """What a stream is made of; `Frame` and the outer plane's chunks both are."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def data(self) -> Bytes: ...
    @property
    def scales(self) -> Bytes: ...


Send = Callable[[Message], None]
# From element `offset` on: whoever receives says where it wants a stream to begin, for it may have the rest already.
Source = Callable[[int], Iterable[FrameLike]]
Wanted = Callable[[int], Iterator[FrameLike]]


class Desk(Protocol):
    """What the hub offers a site. Every method may be called from any thread and names the authenticated site."""

    def admits(self, site: str, secret: str) -> bool:
        """Tell whether this secret is that of a site which the hub started on this machine."""
        ...

    def opened(self, site: str, send: Send) -> None:
        """A session began; `send` reaches the site until `closed`."""
        ...

    def heard(self, site: str, message: Message) -> None: ...

    def closed(self, site: str, send: Send, words: str) -> None:
        """The session with this `send` ended. A newer one of the same site may have begun already."""
        ...

    def take(self, site: str, parcel: Parcel, frames: Wanted) -> None:
        """Receive an update; returning means that it is journalled and on disk, or not wanted any more.

        ``frames(offset)`` asks the site for them, once; each is good until the next. Not asking is not wanting.
        """
        ...

    def give(self, site: str, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]:
        """Return weights or code by digest."""
        ...


class Channel(Protocol):
    """A site's end. Errors of the hub come back as the same `AtollError`; a dead link is `LinkLost`."""

    def send(self, message: Message) -> None: ...

    def receive(self, timeout: float) -> Message | None:
        """Return the next message, or None when `timeout` seconds brought none."""
        ...

    def put(self, parcel: Parcel, frames: Source) -> None: ...

    def get(self, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]: ...

    def close(self) -> None: ...
