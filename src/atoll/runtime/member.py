"""One rank of a group as the agent talks with it: what it is yet to be told, what it has said, and that it lives."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from atoll.errors import Invalid, TaskFailed, Unavailable
from atoll.spec.document import parse_json
from atoll.spec.order import Order, Reply
from atoll.spec.pace import Pace

GRACE = 3.0  # seconds a rank has to end by itself
BEATS = 4  # signs of life in the time after which a rank without one is lost
_BUSY = 0.05  # of its time that a rank computes which is at work, though it says nothing
_REPLY_LIMIT = 8 << 20  # bytes of one reply, which is gathered piece by piece
OnStep = Callable[[int, Pace | None], None]


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

    def computed(self) -> float | None:
        """Return the seconds of processor that it has used, less than 0 while it waits for a disk.

        None where that is not known: it is not lost then.
        """
        ...

    def kill(self) -> None:
        """End it by force; returns at once."""
        ...

    def end(self, deadline: float) -> None:
        """Return when it is gone: by itself until ``deadline`` (`time.monotonic`), by force after it."""
        ...


@dataclass(slots=True, eq=False)
class Member:
    """A rank and its place in the layout. ``awaited`` answers are yet to come, the last of them that to the order."""

    place: int
    rank: Rank
    unsent: bytearray = field(default_factory=bytearray)
    awaited: int = 0
    reply: Reply | None = None
    pace: Pace | None = None
    ready: bool = False
    heard: float | None = None  # when it last gave a sign of life; None before the first one
    computed: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether it has something to do: who has not says nothing."""
        return self.reply is None and not self.ready

    def tell(self, lines: bytes, replies: int) -> None:
        self.unsent += lines
        self.awaited += replies
        self.reply = None
        self.heard, self.ready = time.monotonic() if self.heard is not None else None, False

    def send(self) -> None:
        """Write what the rank's pipe takes. Raises `Unavailable` when it is gone."""
        try:
            del self.unsent[: os.write(self.rank.orders, self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            raise self.rank.died() from None

    def hear(self) -> list[Reply]:
        """Read what it says. Raises `Unavailable` when it says nothing any more, `TaskFailed` for what is no reply."""
        data = os.read(self.rank.replies, 1 << 16)
        if not data:
            raise self.rank.died()
        self.heard = time.monotonic()
        *lines, self.rank.rest = (self.rank.rest + data).split(b"\n")
        if len(self.rank.rest) > _REPLY_LIMIT:
            raise TaskFailed(f"worker: a reply of over {_REPLY_LIMIT} bytes; return fewer metrics")
        try:
            return [parse_json(Reply, line, "worker") for line in lines]
        except Invalid:  # whose words quote what came, and that is user code's to choose
            raise TaskFailed("worker: its reply is not a reply; the task must not write to the worker's pipe") from None

    def silent(self, seconds: float) -> bool:
        """Tell whether it has given no sign of life for so long: no word, and next to nothing computed.

        Code that never lets another thread run keeps it from saying anything, and is alive. Where that code itself
        waits for ever, those threads look for the lock 200 times a second: three of them took 1.3 % of a processor.
        """
        now = time.monotonic()
        if self.heard is None or now - self.heard < seconds:
            return False
        computed = self.rank.computed()
        if computed is None or computed < 0 or computed - self.computed >= _BUSY * (now - self.heard):
            self.computed, self.heard = max(computed or 0.0, 0.0), now
            return False
        return True


@dataclass(slots=True)
class Talk:
    """An order under way."""

    order: Order
    timeout: float
    on_step: OnStep | None
    deadline: float
    failed: TaskFailed | None = None
    losses: int = 0
    broken: float | None = None  # when ranks first said that they lost each other, and nobody is known to be lost

    def fail(self, error: TaskFailed) -> None:
        self.failed = self.failed or error
        # Another rank waits for the one that failed, perhaps for ever.
        self.deadline = min(self.deadline, time.monotonic() + GRACE)

    def left(self) -> float:
        """Return the seconds left; raise what it means that there are none."""
        left = self.deadline - time.monotonic()
        if left > 0:
            return left
        if self.failed is not None:
            raise self.failed
        raise Unavailable(f"worker: no reply to '{self.order.kind}' in {self.timeout:g} s; it was ended")
