"""A filter of system calls for user code that holds a socket of a network which it is not in: it may not dial.

A socket stays of the network that it was made in. One that was handed in to be listened at is ended by a `connect` to
nobody, and dials from there whatever that network reaches; so does each connection that came in by it.
"""

import ctypes
import errno
import os
import platform
import struct
from functools import cache

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # prctl(2); seccomp(2)
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # of a filter's program (linux/bpf_common.h)
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM  # seccomp(2)
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # where struct seccomp_data has them; an argument has 8 bytes, the low first
_FOREIGN = 0x40000000  # from here on x86-64 has the calls of its x32, under numbers of their own
_RINGS = 425  # io_uring_setup(2), everywhere: what a ring does, no filter sees
_FAST_OPEN = 0x20000000  # MSG_FASTOPEN of sendto(2): dials, and sends at once
# Of each machine its mark (linux/audit.h), and the numbers of connect, sendto, sendmsg and sendmmsg.
_CALLS = {"x86_64": (0xC000003E, 42, 44, 46, 307), "aarch64": (0xC00000B7, 203, 206, 211, 269)}
_Step = tuple[int, int, int, int]  # what to do, steps to skip where it is so, and where not, and with what


@cache
def missing() -> str:
    """Return why it cannot be had on this machine, or ""."""
    if platform.machine() not in _CALLS:
        return f"the numbers of this machine's system calls ({platform.machine()}) are not known here"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SECCOMP, ctypes.c_ulong(_FILTER), None, None, None)  # without a program: only where there are filters
    return (
        ""
        if ctypes.get_errno() == errno.EFAULT
        else "its kernel has no filters of system calls (CONFIG_SECCOMP_FILTER)"
    )


def forbid() -> None:
    """Keep this process, and all that it will start, from dialling. It must have one thread. Raises `OSError`."""
    program = b"".join(struct.pack("HBBI", *step) for step in _program(*_CALLS[platform.machine()]))
    held = ctypes.create_string_buffer(program, len(program))
    told = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(held)))
    libc = ctypes.CDLL(None, use_errno=True)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    for done in (
        libc.prctl(_NO_NEW_PRIVILEGES, one, none, none, none),
        libc.prctl(_SECCOMP, ctypes.c_ulong(_FILTER), told, none, none),
    ):
        if done < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"sandbox: no filter of system calls: {os.strerror(number)}")


def _program(machine: int, connect: int, sendto: int, sendmsg: int, sendmmsg: int) -> list[_Step]:
    refuse = (_RETURN, 0, 0, _REFUSE)
    steps: list[_Step] = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, machine), refuse]
    steps += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _FOREIGN), refuse]
    for number in (connect, _RINGS):
        steps += [(_EQUAL, 0, 1, number), refuse]
    for number, flags in ((sendto, 3), (sendmsg, 2), (sendmmsg, 3)):
        steps += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _ARGUMENTS + 8 * flags), (_ANY_BIT, 0, 1, _FAST_OPEN), refuse]
        steps += [(_RETURN, 0, 0, _ALLOW)]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]
