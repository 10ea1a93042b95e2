"""A channel inside one process: the laptop's, and every test's."""

import queue
from collections.abc import Iterator

from atoll.boundary.channel import Desk, FrameLike, Source
from atoll.errors import LinkLost
from atoll.spec.message import Message, Parcel


class MemoryChannel:
    """Site and hub share a process; documents and frames are passed as they are, for both are immutable."""

    def __init__(self, desk: Desk, site: str) -> None:
        self._desk = desk
        self._site = site
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._open = True
        desk.opened(site, self._deliver)

    def _deliver(self, message: Message) -> None:
        if not self._open:
            raise LinkLost(f"the session of {self._site} is over")
        self._inbox.put(message)

    def send(self, message: Message) -> None:
        self._alive()
        self._desk.heard(self._site, message)

    def receive(self, timeout: float) -> Message | None:
        self._alive()
        try:
            return self._inbox.get(timeout=timeout)
        except queue.Empty:
            return None

    def put(self, parcel: Parcel, frames: Source) -> None:
        self._alive()
        self._desk.take(self._site, parcel, lambda offset: iter(frames(offset)))

    def get(self, parcel: Parcel) -> tuple[Parcel, Iterator[FrameLike]]:
        self._alive()
        return self._desk.give(self._site, parcel)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._desk.closed(self._site, self._deliver, "the site closed its session")

    def _alive(self) -> None:
        if not self._open:
            raise LinkLost(f"the session of {self._site} is over; open another")
