"""A layout's ranks behind pipes: how orders reach them and replies come back, wherever the ranks are."""

import os
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from atoll.errors import Invalid, TaskFailed, Unavailable
from atoll.runtime import faults
from atoll.spec.document import parse_json
from atoll.spec.message import Order, Reply

GRACE = 3.0  # seconds a rank has to end by itself
_TICK = 0.1  # seconds after which a silent group is looked at: is it to end, has a rank died
_REPLY_LIMIT = 64 << 20  # bytes of one reply


class Rank(Protocol):
    """One rank: a pipe that takes its orders, one that gives its replies, and its life. Neither pipe blocks it."""

    orders: int  # file descriptors, -1 once they are closed; the first does not block
    replies: int
    rest: bytes  # of a reply that is not whole yet

    def ended(self) -> bool:
        """Tell whether it is gone, though its pipe may be held open by something that user code started."""
        ...

    def died(self) -> Unavailable:
        """Return what to say of a rank that ended though nobody wanted it to."""
        ...

    def end(self, deadline: float) -> None:
        """Return when it is gone: by itself until ``deadline`` (`time.monotonic`), by force after it."""
        ...


@dataclass(slots=True)
class _Talk:
    """An order under way: what of it each rank has not been told yet, and what they have said."""

    order: Order
    timeout: float
    on_step: Callable[[int], None] | None
    deadline: float
    unsent: dict[int, memoryview]
    replies: dict[int, Reply] = field(default_factory=dict[int, Reply])
    failed: str | None = None

    def heard(self, rank: int, reply: Reply) -> None:
        if reply.progress is not None:
            if self.on_step is not None and rank == 0:
                self.on_step(reply.progress)
            return
        self.replies[rank] = reply
        if reply.failed is not None:
            self.failed = self.failed or reply.failed
            # Another rank waits for the one that failed, perhaps for ever.
            self.deadline = min(self.deadline, time.monotonic() + GRACE)

    def left(self) -> float:
        """Return the seconds left; raise what it means that there are none."""
        left = self.deadline - time.monotonic()
        if left > 0:
            return left
        if self.failed is not None:
            raise TaskFailed(self.failed)
        raise Unavailable(f"worker: no reply to '{self.order.kind}' in {self.timeout:g} s; it was ended")


class PipedGroup:
    """One thread gives orders; any thread may close the group, which ends the order under way."""

    def __init__(self, ranks: Sequence[Rank], meeting: Path) -> None:
        """``meeting`` is a file that the ranks made to find each other."""
        self._ranks, self._meeting = ranks, meeting
        self._closed = threading.Event()
        self._at_order, self._at_end = threading.Lock(), threading.Lock()

    def lines(self, order: Order) -> bytes:
        """Return an order as each rank is told it."""
        return order.model_dump_json().encode() + b"\n"

    def order(self, order: Order, timeout: float, on_step: Callable[[int], None] | None = None) -> Reply:
        line = memoryview(self.lines(order))
        unsent = dict.fromkeys(range(len(self._ranks)), line)
        talk = _Talk(order, timeout, on_step, time.monotonic() + timeout, unsent)
        with self._at_order:
            try:
                self._converse(talk)
            finally:
                if self._closed.is_set():
                    self._let_go()
        if talk.failed is not None:
            raise TaskFailed(talk.failed)
        return talk.replies[0]

    def _converse(self, talk: _Talk) -> None:
        """Carry the order to the ranks and their words back, until all have ended it or it is clear that not all will.

        Neither way blocks: a rank that was stopped reads nothing, and a long order is more than a pipe holds.
        """
        with selectors.DefaultSelector() as selector:
            if not self._closed.is_set():
                for number, rank in enumerate(self._ranks):
                    selector.register(rank.orders, selectors.EVENT_WRITE, number)
                    selector.register(rank.replies, selectors.EVENT_READ, number)
            while len(talk.replies) < len(self._ranks):
                if self._closed.is_set():
                    raise Unavailable("worker: its group was ended; the run is over or starts another")
                ready = selector.select(min(talk.left(), _TICK))
                for key, events in ready:
                    if events & selectors.EVENT_READ:
                        self._listen(key.data, talk)
                    elif self._tell(key.data, talk):
                        selector.unregister(key.fileobj)
                        if not any(talk.unsent.values()):
                            faults.reached("site", "ordered", talk.order.kind)
                if not ready:
                    self._check_alive(selector)

    def _listen(self, number: int, talk: _Talk) -> None:
        for reply in self._read(self._ranks[number]):
            talk.heard(number, reply)

    def _tell(self, number: int, talk: _Talk) -> bool:
        """Write what the rank's pipe takes of the order; return whether that was the last of it."""
        rest, rank = talk.unsent[number], self._ranks[number]
        try:
            talk.unsent[number] = rest[os.write(rank.orders, rest) :]
        except BlockingIOError:
            return False
        except OSError:
            raise rank.died() from None
        return not talk.unsent[number]

    def _read(self, rank: Rank) -> list[Reply]:
        data = os.read(rank.replies, 1 << 16)
        if not data:
            raise rank.died()
        *lines, rank.rest = (rank.rest + data).split(b"\n")
        if len(rank.rest) > _REPLY_LIMIT:
            raise TaskFailed(f"worker: a reply of over {_REPLY_LIMIT} bytes; return fewer metrics")
        try:
            return [parse_json(Reply, line, "worker") for line in lines]
        except Invalid:  # whose words quote what came, and that is user code's to choose
            raise TaskFailed("worker: its reply is not a reply; the task must not write to the worker's pipe") from None

    def _check_alive(self, selector: selectors.BaseSelector) -> None:
        """Find a dead rank whose pipe is held open by something that user code started."""
        dead = [rank for rank in self._ranks if rank.ended()]
        if dead and not selector.select(0):
            raise dead[0].died()

    def close(self) -> None:
        self._closed.set()
        # Whoever is at an order leaves it with the next tick, unless its caller's own `on_step` holds it up.
        free = self._at_order.acquire(timeout=GRACE)
        try:
            if free:
                self._let_go(replies=False)  # a worker ends when nobody can give it orders any more
            with self._at_end:
                deadline = time.monotonic() + GRACE
                for rank in self._ranks:
                    rank.end(deadline)
            if free:
                self._let_go()
        finally:
            if free:
                self._at_order.release()
        self._meeting.unlink(missing_ok=True)

    def _let_go(self, replies: bool = True) -> None:
        """Close the pipes, once. Only who is at an order may: their numbers can be another file's at once."""
        for rank in self._ranks:
            if rank.orders >= 0:
                os.close(rank.orders)
                rank.orders = -1
            if replies and rank.replies >= 0:
                os.close(rank.replies)
                rank.replies = -1
