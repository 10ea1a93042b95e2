"""The executor of a laptop or an edge site: each rank is a process of this machine."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import Invalid, TaskFailed, Unavailable
from atoll.spec.document import parse_json
from atoll.spec.message import Order, Reply
from atoll.spec.plan import Layout

_GRACE = 3.0  # seconds a rank has to end by itself
_REPLY_LIMIT = 64 << 20  # bytes of one reply

# Nothing of the agent's environment reaches user code but what a Python process needs to run.
_PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "HOME")


@dataclass(slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    replies: int  # file descriptor
    rest: bytes = b""


class LocalGroup:
    """Processes that read orders from stdin and answer on a pipe of their own; their prints go to a log file."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        meeting = folder / f"meeting-{uuid.uuid4().hex}"
        self._ranks: list[_Rank] = []
        try:
            for rank in range(layout.ranks):
                self._ranks.append(_start(rank, layout.ranks, meeting, folder / f"worker-{rank}.log"))
        except OSError as error:
            self.close()
            raise Unavailable(f"worker: cannot be started ({error}); free memory or processes") from None

    @property
    def pids(self) -> list[int]:
        return [rank.process.pid for rank in self._ranks]

    def order(self, order: Order, timeout: float, on_step: Callable[[int], None] | None = None) -> Reply:
        line = order.model_dump_json().encode() + b"\n"
        deadline = time.monotonic() + timeout
        replies: dict[int, Reply] = {}
        failed: str | None = None
        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self._ranks):
                selector.register(rank.replies, selectors.EVENT_READ, number)
                self._tell(rank, line)
            while len(replies) < len(self._ranks):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and failed is not None:
                    raise TaskFailed(failed)  # another rank waits for the one that failed, perhaps for ever
                if not ready:
                    raise Unavailable(f"worker: no reply to '{order.kind}' in {timeout:g} s; it was ended")
                for key, _ in ready:
                    reply = self._final(key.data, on_step)
                    if reply is not None:
                        replies[key.data] = reply
                    if reply is not None and reply.failed is not None:
                        failed = failed or reply.failed
                        deadline = min(deadline, time.monotonic() + _GRACE)
        if failed is not None:
            raise TaskFailed(failed)
        if 0 not in replies:
            raise Unavailable("worker: its group was ended before it replied; the run is over or starts another")
        return replies[0]

    def _final(self, number: int, on_step: Callable[[int], None] | None) -> Reply | None:
        """Read what a rank said; tell rank 0's progress, and return the reply that ends its order if it came."""
        final: Reply | None = None
        for reply in self._read(self._ranks[number]):
            if reply.progress is None:
                final = reply
            elif on_step is not None and number == 0:
                on_step(reply.progress)
        return final

    def _tell(self, rank: _Rank, line: bytes) -> None:
        assert rank.process.stdin is not None
        try:
            rank.process.stdin.write(line)
            rank.process.stdin.flush()
        except OSError:
            raise self._died(rank) from None

    def _read(self, rank: _Rank) -> list[Reply]:
        data = os.read(rank.replies, 1 << 16)
        if not data:
            raise self._died(rank)
        *lines, rank.rest = (rank.rest + data).split(b"\n")
        if len(rank.rest) > _REPLY_LIMIT:
            raise TaskFailed(f"worker: a reply of over {_REPLY_LIMIT} bytes; return fewer metrics")
        try:
            return [parse_json(Reply, line, "worker") for line in lines]
        except Invalid:
            raise TaskFailed("worker: its reply is not a reply; the task must not write to the worker's pipe") from None

    def _died(self, rank: _Rank) -> Unavailable:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(_GRACE)
        code = rank.process.returncode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return Unavailable(f"worker: a rank ended {how}; its log is in the site's folder")

    def close(self) -> None:
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                if rank.process.stdin is not None:
                    rank.process.stdin.close()  # a worker ends when nobody can give it orders any more
        deadline = time.monotonic() + _GRACE
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)  # what the user's code started and left behind
            with contextlib.suppress(OSError):
                os.close(rank.replies)
            rank.replies = -1
        self._ranks.clear()


def _start(rank: int, ranks: int, meeting: Path, log: Path) -> _Rank:
    environment = {name: os.environ[name] for name in _PASSED if name in os.environ}
    # One thread a rank: ranks share the machine's cores, and torch would otherwise take all of them in each.
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    read, write = os.pipe()
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "atoll.runtime.worker", str(rank), str(ranks), str(meeting), str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(write,),
                env=environment,
                start_new_session=True,  # Ctrl-C is the agent's to handle
            )
    except OSError:
        os.close(read)
        raise
    finally:
        os.close(write)
    return _Rank(process, read)


class LocalExecutor:
    """Starts groups of processes on this machine."""

    def start(self, layout: Layout, folder: Path) -> LocalGroup:
        return LocalGroup(layout, folder)
