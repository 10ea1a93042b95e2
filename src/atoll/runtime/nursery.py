"""A process that has imported what every worker needs, and forks one whenever the agent asks.

    python -P -m atoll.runtime.nursery SOCKET_FD

It runs no user code, opens no dataset and holds no key. What it forks leads a session of its own with the environment
that was asked for and no file but those that came with the request, and goes into a sandbox where one came with them.
It ends when the agent's end of the socket closes.
"""

import contextlib
import ctypes
import errno
import gc
import itertools
import os
import select
import selectors
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow
import torch

from atoll.runtime import entering, worker
from atoll.runtime.forked import LIMIT, MOST, Birth, Born, Ended, code_of
from atoll.spec.document import parse_json

_QUIET = 2.0  # seconds without a worker and without being asked for one, before more is imported
_ARGUMENTS = 45  # where proc_pid_stat(5) tells from where to where a command line lies, after the name


@dataclass(slots=True)
class _Child:
    pid: int
    pidfd: int
    life: socket.socket
    ended: bool = False
    wanted: bool = True  # until the agent says over the life that it is not, and hears that it is gone


class _Nursery:
    """One thread that forks, tells of ends, and keeps each that ended until the agent wants nothing more of it."""

    def __init__(self, agent: socket.socket) -> None:
        self._agent = agent
        self._watch = selectors.DefaultSelector()
        self._watch.register(agent, selectors.EVENT_READ)
        self._growing = True

    def serve(self) -> None:
        """Work until the agent is gone."""
        self._grow()
        while True:
            idle = self._growing and len(self._watch.get_map()) == 1
            found = self._watch.select(_QUIET if idle else None)
            if not found:
                self._grow()
            for key, _ in found:
                if key.data is not None:
                    self._look(key.data, key.fd)
                elif not self._answer():
                    return

    def _grow(self) -> None:
        """Import more of what workers may need, until somebody asks for one."""
        for grow in (_read_columns, _take_parts):
            if select.select([self._agent], [], [], 0)[0]:
                return
            grow()
        self._growing = False

    def _answer(self) -> bool:
        """Fork one worker, or say why not; return False when there will be no more requests."""
        told, fds, _, _ = socket.recv_fds(self._agent, LIMIT, MOST, socket.MSG_CMSG_CLOEXEC)
        if not told:
            return False
        birth = parse_json(Birth, told, "nursery")
        if birth.parts:
            _take_parts()
        born, pidfds = _fit(), list[int]()
        if not born.refused:
            try:
                born, pidfds = self._fork(birth, fds)
            except OSError as error:
                born = Born(refused=str(error))
        for fd in fds:
            os.close(fd)
        socket.send_fds(self._agent, [_line(born)], pidfds)
        return True

    def _fork(self, birth: Birth, fds: list[int]) -> tuple[Born, list[int]]:
        if len(fds) != birth.files:
            raise OSError(errno.EMFILE, "a file descriptor was lost; raise the limit of open files")
        gc.freeze()  # or a child's first collection would write to, and so copy, the memory of every object there is
        pid = os.fork()
        if not pid:
            _live(birth, *fds)
        try:
            child = _Child(pid, os.pidfd_open(pid), socket.socket(fileno=os.dup(fds[3])))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._watch.register(child.pidfd, selectors.EVENT_READ, child)
        self._watch.register(child.life, selectors.EVENT_READ, child)
        return Born(pid=pid), [child.pidfd]

    def _look(self, child: _Child, fd: int) -> None:
        if fd == child.pidfd:
            self._watch.unregister(fd)
            child.ended = True
            if child.wanted and (ended := os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)):
                with contextlib.suppress(ConnectionError):  # the agent wants nothing more of it
                    child.life.send(_line(Ended(code=code_of(ended))))
        else:
            self._watch.unregister(child.life)
            child.wanted = False
        if child.ended and not child.wanted:
            os.waitpid(child.pid, 0)  # only here its number, and that of its process group, may become another's
            os.close(child.pidfd)
            child.life.close()


def _line(message: Born | Ended) -> bytes:
    return message.model_dump_json().encode()


def _fit() -> Born:
    """Return whether this process may fork.

    Of several threads a fork copies only the one that forks: a lock that another holds at that moment, of malloc's or
    of a library's, is held for ever in the child. With one thread there is no such moment.
    """
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len(names) == 1:
        return Born()
    return Born(refused=f"a library has started a thread: {', '.join(sorted(names))}", hopeless=True)


def _live(birth: Birth, stdin: int, reply: int, out: int, _: int, *given: int) -> NoReturn:
    """Be the worker, in a process that was forked for it."""
    code, more = 1, list(given)
    try:
        os.setsid()
        os.dup2(stdin, 0)
        for said in (1, 2):
            os.dup2(out, said)
        _close_all_but(reply, *more)
        entering.limit(birth.limits)
        if birth.confined:
            *more, room = more
            entering.enter(room)
        os.environ.clear()
        os.environ.update(birth.environment)
        np.random.seed()  # as at an import, for each worker its own; Python's stream seeds itself in a child
        torch.default_generator.seed()
        words = [*birth.words, *map(str, (reply, *more))]
        sys.argv = [worker.__file__, *words]
        _show(f"{sys.executable}\0-P\0-m\0{worker.__name__}\0{chr(0).join(words)}")
        worker.main()
        code = 0
    except BaseException:  # noqa: BLE001 - the end of a process that returns to nobody: the frames above are its parent's
        traceback.print_exc()
    finally:
        os._exit(code)


def _close_all_but(*kept: int) -> None:
    """Close every file but these and the three that each process has."""
    for low, high in itertools.pairwise((2, *sorted(kept), os.sysconf("SC_OPEN_MAX"))):
        os.closerange(low + 1, high)


def _show(line: str) -> None:
    """Let `ps` show this command line, as much of it as there was room for the nursery's."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = map(int, fields[_ARGUMENTS : _ARGUMENTS + 2])
    ctypes.memmove(start, os.fsencode(line)[: end - start - 1].ljust(end - start, b"\0"), end - start)


def _read_columns() -> None:
    """Import pandas, where that is installed, as Arrow does when it makes the first array of a column."""
    pyarrow.table({"x": [0.0]})["x"].to_numpy()


def _take_parts() -> None:
    """Import what ranks need that hold parts of a model, a second of processor."""
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as agent:
        agent.set_inheritable(False)
        gc.collect()
        with contextlib.suppress(ConnectionError):  # the agent is gone
            agent.send(_line(_fit()))
            _Nursery(agent).serve()
    os._exit(0)  # nothing is left to do, and to tear torch down takes time


if __name__ == "__main__":
    main()
