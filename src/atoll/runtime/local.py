"""The executor of a laptop or an edge site: each rank is a process of this machine."""

import contextlib
import logging
import math
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from atoll.drain import Drain
from atoll.errors import Unavailable
from atoll.runtime import faults, sandbox
from atoll.runtime.forked import Nursery, code_of
from atoll.runtime.member import GRACE, OnStep, Rank
from atoll.runtime.piped import SILENCE, PipedGroup
from atoll.runtime.rescue import rescue
from atoll.runtime.sandbox import Grant, Room
from atoll.spec.order import Order, Reply
from atoll.spec.plan import Layout
from atoll.spec.sandbox import Limits, Mode

# Nothing of the agent's environment reaches user code but what a Python process needs to run.
PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "HOME")
_CLOCK = os.sysconf("SC_CLK_TCK")
_MIRRORS = 2  # files of a place: one is whole while the other is written
_TICK = 0.01  # seconds between two looks at whether a process has ended
_KILLED = 30.0  # seconds until a killed process is taken for one that the kernel cannot end: its disk does not answer
_log = logging.getLogger(__name__)


class Life(Protocol):
    """What becomes of a process, in whatever way it came to be. Any thread may ask."""

    pid: int

    def ended(self, seconds: float = 0.0) -> bool:
        """Tell whether it has ended, or does within so many seconds."""
        ...

    def code(self) -> int | None:
        """Return how it ended: its exit code, or its signal's number below zero. None when nobody saw."""
        ...

    def kill(self) -> None:
        """End it by SIGKILL, and what is left of its process group. Once `let_go`, nothing."""
        ...

    def let_go(self) -> None:
        """Let its number be another's from here on."""
        ...


class Started:
    """The life of a child of this process."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid, self._process = process.pid, process
        self._turn = threading.Lock()

    def ended(self, seconds: float = 0.0) -> bool:
        until = time.monotonic() + seconds
        while self._seen() is None:
            if time.monotonic() >= until:
                return False
            time.sleep(_TICK)
        return True

    def code(self) -> int | None:
        return self._seen() if self.ended(GRACE) else None

    def kill(self) -> None:
        with self._turn:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)

    def let_go(self) -> None:
        with self._turn:
            self._process.wait()

    def _seen(self) -> int | None:
        """Return how it ended, and leave its number and its group's to it: either may still have to be killed."""
        with self._turn:
            if self._process.returncode is None:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                return None if ended is None else code_of(ended)
            return self._process.returncode


@dataclass(slots=True)
class Process:
    """A worker process, which reads orders from stdin and answers on a pipe of its own; its prints go to a log file."""

    life: Life
    orders: int  # file descriptors
    replies: int
    rest: bytes = b""
    confined: bool = False  # and what lives outside of the sandbox only waits for the one that computes

    def ended(self) -> bool:
        return self.life.ended()

    def how(self) -> str:
        """Return how it ended, once its pipe says that it has."""
        code = self.life.code()
        if code is None:
            return "in a way that nobody saw"
        return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def died(self) -> Unavailable:
        return Unavailable(f"worker: a rank ended {self.how()}; its log is in the site's folder")

    def computed(self) -> float | None:
        try:
            pid = self._inside() if self.confined else self.life.pid
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # another system; a rank is then silent only when it ends
            return None
        if words[0] == "D":  # it waits for a disk, perhaps with Python's lock: that is no silence
            return -time.monotonic()
        return (int(words[11]) + int(words[12])) / _CLOCK  # proc(5): user and system time

    def _inside(self) -> int:
        """Return the number of the process in the sandbox. Raises `OSError` or `ValueError` where nobody tells."""
        only = self.life.pid
        return int(Path(f"/proc/{only}/task/{only}/children").read_text())

    def kill(self) -> None:
        self.life.kill()

    def end(self, deadline: float) -> None:
        if not self.life.ended(max(0.0, deadline - time.monotonic())):
            self.life.kill()
            self.life.ended(_KILLED)
        self.life.kill()  # what the user's code started and left behind
        self.life.let_go()


def environment() -> dict[str, str]:
    """Return what a worker finds in its environment, but for what is its own."""
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    # One thread a rank: ranks share the machine's cores, and torch would otherwise take all of them in each.
    return passed | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What holds a worker: a sandbox, where there is one, and limits."""

    room: Room | None = None
    limits: Limits = field(default_factory=Limits)


def start(
    words: Sequence[str],
    log: Path | int,
    more: Mapping[str, str],
    fds: Sequence[int] = (),
    nursery: Nursery | None = None,
    bounds: Bounds = Bounds(),
) -> Process:
    """Start a worker process here: ``words`` begin its command line, ``more`` is added to its environment.

    What it prints is added to the ``log``, a file or the number of one. That number, and those of ``fds``, stay the
    caller's; those of its reply pipe and of ``fds`` end its command line. It is forked by the
    ``nursery`` where there is one and it can. Raises `OSError`.
    """
    room = bounds.room.pidfd if bounds.room is not None else None
    found = {**environment(), **(sandbox.homeless() if room is not None else {}), **more}
    process = None
    if nursery is not None:
        try:
            process = _begin(log, fds, lambda files: nursery.fork(words, found, files, room, bounds.limits))
        except Unavailable as error:
            _log.warning("%s; this worker is started by itself, and imports what it needs", error)
    if process is None:
        process = _begin(log, fds, lambda files: _started(words, found, files, room, bounds.limits))
    process.confined = room is not None
    return process


def _begin(log: Path | int, fds: Sequence[int], begin: Callable[[Sequence[int]], Life]) -> Process:
    """Make a worker's pipes and let it begin with its ends of them: orders, replies, log, and ``fds``."""
    told, orders = os.pipe()
    replies, said = os.pipe()
    try:
        if isinstance(log, int):
            life = begin((told, said, log, *fds))
        else:
            with log.open("ab") as output:
                life = begin((told, said, output.fileno(), *fds))
    except (OSError, Unavailable):
        os.close(orders)
        os.close(replies)
        raise
    finally:
        os.close(told)
        os.close(said)
    os.set_blocking(orders, False)
    return Process(life, orders, replies)


def _started(
    words: Sequence[str], environment: Mapping[str, str], files: Sequence[int], room: int | None, limits: Limits
) -> Started:
    told, said, output, *fds = files
    line = sandbox.command("atoll.runtime.worker", room, limits)
    return Started(
        subprocess.Popen(
            [*line, *words, *map(str, (said, *fds))],
            stdin=told,
            stdout=output,
            stderr=output,
            pass_fds=(said, *fds, *(() if room is None else (room,))),
            env=environment,
            start_new_session=True,  # Ctrl-C is the agent's to handle
        )
    )


class Mirrors:
    """Memory of this machine that outlives the ranks that write to it: two files for a place, without a name.

    Nothing of them is left when this process is gone.
    """

    def __init__(self, places: int) -> None:
        made = places if hasattr(os, "memfd_create") else 0  # on Linux
        self._files: list[list[int]] = [[] for _ in range(made)]
        try:
            for files in self._files:
                files += (os.memfd_create("atoll-mirror") for _ in range(_MIRRORS))
        except OSError:
            self.close()
            raise

    def of(self, place: int) -> tuple[int, ...]:
        return tuple(self._files[place % len(self._files)]) if self._files else ()

    def save(self, folder: Path, outside: Path) -> None:
        """Write what the ranks, which are gone, had done of a round where the next ones look for it, by way of a folder
        that none of them could write to."""
        step = rescue(self._files, folder, outside)
        if step is not None:
            _log.info("a lost group's round is gone on with after its step %s", step)

    def empty(self) -> None:
        """Give the memory back; who writes to them next takes it anew."""
        for files in self._files:
            for file in files:
                os.ftruncate(file, 0)

    def close(self) -> None:
        for files in self._files:
            for file in files:
                os.close(file)
        self._files = []


class LocalGroup(PipedGroup):
    """Processes of this machine, the sandbox that they are in, and the memory by which one takes another's place."""

    room: Room | None = None
    longest = math.inf  # seconds that an order may take, whatever whoever gives it would wait

    def __init__(self, ranks: Sequence[Rank], meeting: Path, silence: float, again: Callable[[int], Rank]) -> None:
        super().__init__(ranks, meeting, silence, again)
        self.mirrors = Mirrors(0)
        self.drains: list[Drain] = []  # of what each place prints in the room

    def order(self, order: Order, timeout: float, on_step: OnStep | None = None) -> Reply:
        return super().order(order, min(timeout, self.longest), on_step)

    def rest(self) -> None:
        self.mirrors.empty()

    def close(self) -> None:
        try:
            super().close()
        finally:  # before anything is looked at: whatever user code left behind in it writes nowhere any more
            gone = self.room is None or self.room.close()
            for drain in self.drains:
                drain.close()
        if self.unfinished is not None and gone:
            work = self.unfinished.parent
            self.mirrors.save(self.unfinished, work if self.room is None else work.parent)
        elif not gone:
            _log.warning("sandbox: something in it does not end, and may write later; look at the machine's disks")
        self.unfinished = None
        self.mirrors.close()


class LocalExecutor:
    """Starts groups of processes on this machine, forked from one nursery where that can be."""

    def __init__(self, silence: float = SILENCE, mode: Mode = "off", limits: Limits = Limits()) -> None:  # noqa: B008
        """``silence`` is how many seconds without a sign of life make a rank a lost one; ``mode`` says whether groups
        live in sandboxes. Where they must and cannot, `refuses` says so, and nobody should start any."""
        self._silence, self._turn = silence, threading.Lock()
        why = sandbox.missing() if mode != "off" else ""
        self.confined, self._limits = mode != "off" and not why, limits
        self.refuses = f"sandbox: it is required here, and there is none: {why}" if mode == "required" and why else ""
        if mode == "on" and why:
            _log.warning("sandbox: workers run without one: %s", why)
        self._nursery: Nursery | None = None
        self._closed = not hasattr(os, "pidfd_open")  # where there are none (all but Linux) workers are started

    def warm(self) -> None:
        """Begin to import what workers need, before there is one; returns at once."""
        self._running()

    def _running(self) -> Nursery | None:
        """Return the nursery, another one when the last has ended; None when there is to be none."""
        with self._turn:
            ended = self._nursery is not None and self._nursery.gone()
            if self._nursery is not None and ended:
                self._closed = self._closed or self._nursery.hopeless
                self._nursery.close()
                self._nursery = None
            if self._nursery is None and not self._closed:
                try:
                    self._nursery = Nursery(environment())
                except OSError as error:
                    _log.warning("nursery: it cannot be started (%s); each worker imports what it needs", error)
            return self._nursery

    def start(self, layout: Layout, folder: Path, grant: Grant | None = None) -> PipedGroup:
        folder.mkdir(parents=True, exist_ok=True)
        nursery = self._running()
        if nursery is not None and not layout.plain:
            nursery.parts = True

        def begin(place: int) -> Process:
            log: Path | int = group.drains[place].pipe if group.room is not None else _log_of(folder, place)
            more, bounds = faults.handed_on("worker"), Bounds(group.room, self._limits)
            try:
                return start((), log, more, group.mirrors.of(place), self._running(), bounds)
            except OSError as error:
                raise Unavailable(f"worker: cannot be started ({error}); free memory or processes") from None

        ranks: list[Rank] = []
        where = grant.folder if self.confined and grant is not None and grant.folder is not None else folder
        group = LocalGroup(ranks, where / f"meeting-{uuid.uuid4().hex}", self._silence, begin)
        group.longest = self._limits.order_seconds or math.inf
        try:
            self._furnish(group, layout.ranks, folder, grant)
            ranks.extend(begin(place) for place in range(layout.ranks))
        except Unavailable:
            group.close()
            raise
        return group

    def _furnish(self, group: LocalGroup, places: int, folder: Path, grant: Grant | None) -> None:
        try:
            group.mirrors = Mirrors(places)
            if self.confined:
                assert grant is not None, "who asks for workers that see nothing else says what they are to see"
                for place in range(places):
                    group.drains.append(Drain(_log_of(folder, place)))
                group.room = Room(grant, self._limits)
        except OSError as error:
            raise Unavailable(f"worker: cannot be started ({error}); free memory or files") from None

    def close(self) -> None:
        """End the nursery; there will be no other."""
        with self._turn:
            nursery, self._nursery, self._closed = self._nursery, None, True
        if nursery is not None:
            nursery.close()


def _log_of(folder: Path, place: int) -> Path:
    return folder / f"worker-{place}.log"
