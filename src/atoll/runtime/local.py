"""The executor of a laptop or an edge site: each rank is a process of this machine."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from atoll.errors import Invalid, TaskFailed, Unavailable
from atoll.runtime import faults
from atoll.spec.document import parse_json
from atoll.spec.message import Order, Reply
from atoll.spec.plan import Layout

_GRACE = 3.0  # seconds a rank has to end by itself
_TICK = 0.1  # seconds after which a silent group is looked at: is it to end, has a rank died
_REPLY_LIMIT = 64 << 20  # bytes of one reply

# Nothing of the agent's environment reaches user code but what a Python process needs to run.
_PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "HOME")


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    orders: int  # file descriptors
    replies: int
    rest: bytes = b""


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
            self.deadline = min(self.deadline, time.monotonic() + _GRACE)

    def left(self) -> float:
        """Return the seconds left; raise what it means that there are none."""
        left = self.deadline - time.monotonic()
        if left > 0:
            return left
        if self.failed is not None:
            raise TaskFailed(self.failed)
        raise Unavailable(f"worker: no reply to '{self.order.kind}' in {self.timeout:g} s; it was ended")


class LocalGroup:
    """Processes that read orders from stdin and answer on a pipe of their own; their prints go to a log file.

    One thread gives orders; any thread may close the group, which ends the order under way.
    """

    def __init__(self, layout: Layout, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._meeting = folder / f"meeting-{uuid.uuid4().hex}"
        self._ranks: list[_Rank] = []
        self._closed = threading.Event()
        self._at_order, self._at_end = threading.Lock(), threading.Lock()
        try:
            for rank in range(layout.ranks):
                self._ranks.append(_start(rank, layout.ranks, self._meeting, folder / f"worker-{rank}.log"))
        except OSError as error:
            self.close()
            raise Unavailable(f"worker: cannot be started ({error}); free memory or processes") from None

    def order(self, order: Order, timeout: float, on_step: Callable[[int], None] | None = None) -> Reply:
        line = memoryview(order.model_dump_json().encode() + b"\n")
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
            raise self._died(rank) from None
        return not talk.unsent[number]

    def _read(self, rank: _Rank) -> list[Reply]:
        data = os.read(rank.replies, 1 << 16)
        if not data:
            raise self._died(rank)
        *lines, rank.rest = (rank.rest + data).split(b"\n")
        if len(rank.rest) > _REPLY_LIMIT:
            raise TaskFailed(f"worker: a reply of over {_REPLY_LIMIT} bytes; return fewer metrics")
        try:
            return [parse_json(Reply, line, "worker") for line in lines]
        except Invalid:  # whose words quote what came, and that is user code's to choose
            raise TaskFailed("worker: its reply is not a reply; the task must not write to the worker's pipe") from None

    def _check_alive(self, selector: selectors.BaseSelector) -> None:
        """Find a dead rank whose pipe is held open by something that user code started."""
        dead = [rank for rank in self._ranks if rank.process.poll() is not None]
        if dead and not selector.select(0):
            raise self._died(dead[0])

    def _died(self, rank: _Rank) -> Unavailable:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(_GRACE)
        code = rank.process.returncode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return Unavailable(f"worker: a rank ended {how}; its log is in the site's folder")

    def close(self) -> None:
        self._closed.set()
        # Whoever is at an order leaves it with the next tick, unless its caller's own `on_step` holds it up.
        free = self._at_order.acquire(timeout=_GRACE)
        try:
            if free:
                self._let_go(replies=False)  # a worker ends when nobody can give it orders any more
            with self._at_end:
                deadline = time.monotonic() + _GRACE
                for rank in self._ranks:
                    _end(rank.process, deadline)
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
                rank.orders = -1
                assert rank.process.stdin is not None
                rank.process.stdin.close()
            if replies and rank.replies >= 0:
                os.close(rank.replies)
                rank.replies = -1


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what the user's code started and left behind


def _start(rank: int, ranks: int, meeting: Path, log: Path) -> _Rank:
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    # One thread a rank: ranks share the machine's cores, and torch would otherwise take all of them in each.
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    environment |= faults.handed_on("worker")
    read, write = os.pipe()
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "atoll.runtime.worker", str(rank), str(ranks), str(meeting), str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                bufsize=0,
                pass_fds=(write,),
                env=environment,
                start_new_session=True,  # Ctrl-C is the agent's to handle
            )
    except OSError:
        os.close(read)
        raise
    finally:
        os.close(write)
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    return _Rank(process, process.stdin.fileno(), read)


class LocalExecutor:
    """Starts groups of processes on this machine."""

    def start(self, layout: Layout, folder: Path) -> LocalGroup:
        return LocalGroup(layout, folder)
