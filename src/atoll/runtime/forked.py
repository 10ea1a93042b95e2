"""The agent's end of a nursery: it asks for workers that are forked, not started, and hears how each of them ended."""

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from atoll.errors import Invalid, Unavailable
from atoll.runtime.member import GRACE
from atoll.spec.document import Document, parse_json
from atoll.spec.sandbox import Limits

LIMIT = 1 << 17  # bytes of one message, most of them a worker's environment
MOST = 64  # file descriptors with one message
# Read as the libraries are loaded. Arrow's jemalloc, which nothing here uses, would start a thread, and of several
# threads a fork copies one.
_LOADING = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
_LOADED = 60.0  # seconds to import what a worker needs
_FORKED = 30.0  # seconds to fork, of which the first for parts of a model has more to import
_GROUP = 1 << 2  # pidfd_send_signal(2): to the group that the process led, whoever has its number now
_NONE = Limits()
_TICK = 0.05  # seconds that who waits for a worker's end keeps others from asking


class Birth(Document):
    """Asks for a worker. With it come its stdin, reply pipe, log, its life's other end, and what else is its."""

    words: tuple[str, ...]  # of its command line, before the numbers of its pipes
    environment: dict[str, str]
    parts: bool  # its group may be one whose ranks hold parts of a model, which need more to be imported
    files: int  # that come with it, of which a full table would lose some without a word
    confined: bool  # the last of them is the room that it goes into before anything else
    limits: Limits


class Born(Document):
    """The answer, with a pidfd; or why there is none. The first one, without a number, tells that all is imported."""

    pid: int = 0
    refused: str = ""
    hopeless: bool = False  # to be forked by another nursery, too


class Ended(Document):
    """Comes over a life once the worker has ended."""

    code: int  # of the exit; the signal's number below zero


def code_of(ended: os.waitid_result) -> int:
    """Return how a process ended as `Ended` and `subprocess` tell it."""
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


class Forked:
    """The life of a worker that a nursery forked: who asks here is not its parent.

    Its parent keeps what is left of it until `let_go`, so that its number is nobody else's before. When the parent was
    killed the number may be: then only the pidfd is believed, and an old kernel leaves alone what is left of the group.
    """

    def __init__(self, pid: int, pidfd: int, life: socket.socket) -> None:
        self.pid, self._pidfd, self._life = pid, pidfd, life
        self._turn = threading.Lock()
        self._code: int | None = None
        self._over = False

    def ended(self, seconds: float = 0.0) -> bool:
        """Tell whether it has ended, or does within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            left = max(0.0, until - time.monotonic())
            with self._turn:
                if self._over or self._gone(min(left, _TICK)):
                    return True
            if not left:
                return False

    def code(self) -> int | None:
        """Return how it ended; None while it has not, or when its nursery did not live to tell."""
        if self.ended(GRACE):
            with self._turn:
                self._hear()
        return self._code

    def kill(self) -> None:
        """End it by SIGKILL, and what is left of its process group. Once `let_go`, nothing."""
        with self._turn:
            if self._over:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                self._kill_group()
            with contextlib.suppress(ProcessLookupError):  # it may have been forked a moment ago, and lead no group yet
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def let_go(self) -> None:
        """Let its nursery forget it; returns once it has. From here on its number may be another's."""
        with self._turn:
            if not self._over:
                self._hear()
                self._over = True
                self._life.settimeout(GRACE)
                with self._life, contextlib.suppress(OSError):  # who was killed has forgotten everything
                    self._life.shutdown(socket.SHUT_WR)
                    self._life.recv(LIMIT)
                os.close(self._pidfd)

    def _kill_group(self) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL, None, _GROUP)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._hear()  # a kernel before 6.9: of the group there is only the number
            if self._held() or not self._gone():
                os.killpg(self.pid, signal.SIGKILL)

    def _gone(self, seconds: float = 0.0) -> bool:
        watch = select.poll()
        watch.register(self._pidfd, select.POLLIN)
        return bool(watch.poll(seconds * 1000))

    def _hear(self) -> None:
        if self._code is None and not self._over and self._gone():
            self._life.settimeout(GRACE)
            with contextlib.suppress(OSError):  # it fell silent, or was killed: nobody can tell any more
                if told := self._life.recv(LIMIT):
                    self._code = parse_json(Ended, told, "nursery").code

    def _held(self) -> bool:
        """Tell whether the nursery is there, which keeps the number of a worker that ended."""
        self._life.settimeout(0)
        try:
            return bool(self._life.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False


class Nursery:
    """A process that imports once what every worker needs, and then forks them (`runtime/nursery.py`)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Begin to start it; returns at once. Raises `OSError`."""
        self._turn = threading.Lock()
        self._ready = self.hopeless = False
        self.parts = False  # whether there have been groups whose ranks hold parts of a model
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "atoll.runtime.nursery", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={**environment, **_LOADING},
                    start_new_session=True,  # Ctrl-C is the agent's to handle
                )
        except OSError:
            self._socket.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def gone(self) -> bool:
        return self._process.poll() is not None

    def fork(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        fds: Sequence[int],
        room: int | None = None,
        limits: Limits = _NONE,
    ) -> Forked:
        """Have a worker forked; ``fds`` are its stdin, its reply pipe, its log, and more that it is to have.

        It goes into the ``room``, where there is one: its life is that of who waits for it outside.
        Raises `Unavailable`, after which the nursery is gone: so is a worker that it forked too late, with its pipes.
        A nursery that can fork nobody is `hopeless`: another one would be, too.
        """
        fds = [*fds, room] if room is not None else fds
        asked = Birth(
            words=tuple(words),
            environment=dict(environment),
            parts=self.parts,
            files=len(fds) + 1,
            confined=room is not None,
            limits=limits,
        )
        with self._turn:
            life, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                with theirs:
                    passed = [*fds[:3], theirs.fileno(), *fds[3:]]
                    socket.send_fds(self._socket, [asked.model_dump_json().encode()], passed)
                if not self._ready:
                    self.hopeless = True
                    self._hear(_LOADED)
                    self._ready, self.hopeless = True, False
                born, pidfd = self._hear(_FORKED)
            except (OSError, Invalid, Unavailable) as error:
                life.close()
                self._end(0.0)
                raise Unavailable(f"nursery: it forks no worker ({error or 'it has ended'})") from None
        return Forked(born.pid, pidfd, life)

    def _hear(self, seconds: float) -> tuple[Born, int]:
        self._socket.settimeout(seconds)
        told, fds, _, _ = socket.recv_fds(self._socket, LIMIT, 1, socket.MSG_CMSG_CLOEXEC)
        if not told:
            raise Unavailable("it has ended")
        born = parse_json(Born, told, "nursery")
        if born.refused:
            self.hopeless = born.hopeless
            raise Unavailable(born.refused)
        if len(fds) != (1 if born.pid else 0):
            raise Unavailable("a file descriptor was lost; raise the limit of open files")
        return born, fds[0] if fds else -1

    def close(self) -> None:
        """End it; the workers that it forked go on, but nobody can tell any more how they end."""
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)  # who waits for a worker in `fork` is told, and ends the turn
        with self._turn:
            self._end(GRACE)

    def _end(self, seconds: float) -> None:
        self._socket.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
