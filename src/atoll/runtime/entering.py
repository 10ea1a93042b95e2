"""How a worker process goes into a sandbox (`atoll.runtime.sandbox`), before it runs anybody's code.

    python -P -m atoll.runtime.entering LIMITS ROOM_FD|- dials|listens MODULE ARGUMENT...

limits itself, goes in where there is a room, and becomes this module with these arguments. Who comes with a socket of
another network only `listens` (`atoll.runtime.undialled`). A nursery's child calls `enter` itself. Nobody comes out
again: once inside, a process has no capability, cannot gain one, and makes no namespaces.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from atoll.runtime import undialled
from atoll.spec.document import parse_json
from atoll.spec.sandbox import Limits

_USER = 0x10000000  # setns(2), sched.h: a user namespace; then mounts, cgroup, host name, IPC, processes, network
_REST = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_DEATH_SIGNAL, _BOUNDING_DROP, _NO_NEW_PRIVILEGES, _AMBIENT, _AMBIENT_CLEAR = 1, 24, 38, 47, 4  # prctl(2)
_CAPABILITIES = 64  # more than there are
_CAPSET = (ctypes.c_uint32 * 2)(0x20080522, 0)  # capset(2): version 3, this thread
_NESTED = "/proc/sys/user/max_user_namespaces"


def limit(limits: Limits) -> None:
    """Limit this process and all that it will start."""
    for what, most in (
        (resource.RLIMIT_DATA, limits.memory_bytes),  # of address space torch takes far more than it uses
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CORE, 0),  # the memory of a process that had rows in it belongs in no file
    ):
        if most is not None:
            hard = resource.getrlimit(what)[1]
            least = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (least, least))
    if limits.nice:
        os.nice(limits.nice)


def enter(room: int) -> None:
    """Go into the room of this pidfd, which is closed: returns in a child of this process, inside.

    This process stays outside, without a file, and ends as the child does, which is ended with it. It must have one
    thread. Raises `OSError`.
    """
    libc, here = ctypes.CDLL(None, use_errno=True), os.getcwd()
    _check(libc.setns(room, _USER), "its user namespace")
    with suppress(OSError), open(_NESTED, "w") as most:  # less of the kernel can be reached, where this can be written
        most.write("0")
    _check(libc.setns(room, _REST), "its namespaces")
    os.close(room)
    inside = os.fork()  # the number space of processes is only the children's
    if inside:
        _end_with(inside)
    for capability in range(_CAPABILITIES):
        libc.prctl(_BOUNDING_DROP, capability, 0, 0, 0)  # fails for those that this kernel does not have
    libc.prctl(_AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    _check(libc.capset(_CAPSET, (ctypes.c_uint32 * 6)()), "no capabilities")
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    _check(libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "the end of its parent")
    os.chdir(here)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"sandbox: {what}: {os.strerror(number)}")


def _end_with(inside: int) -> NoReturn:
    """Hold the place of a process inside, whose own number means nothing out here, and end as it does."""
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a notice that the machine is to go, which the other hears, too
    code = os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1])
    if code < 0:
        with suppress(OSError, ValueError):  # of SIGKILL the handling cannot be changed
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    limits, room, how, module, *arguments = sys.argv[1:]
    limit(parse_json(Limits, limits.encode(), "limits"))
    if room != "-":
        enter(int(room))
        if how == "listens":
            undialled.forbid()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
