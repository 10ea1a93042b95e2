"""A rank's place on a node of a Ray cluster: what is an actor there. It starts worker processes and passes lines on.

User code never runs in the actor itself: what an actor returns is unpickled by its caller, and what a worker writes is
only bytes to both.
"""

import fcntl
import os
import select
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import atoll
from atoll.errors import Corrupt, Unavailable
from atoll.runtime import local
from atoll.runtime.bundle import laid_out, write_bundle
from atoll.runtime.member import GRACE
from atoll.spec.document import Digest, Document, parse_json
from atoll.spec.model import Bundle
from atoll.spec.order import Open

_PIECE = 1 << 16  # bytes at once: below what Ray would put into its object store
_LOOK = 0.1  # seconds between two looks at whether a worker that reads nothing has ended
_SIOCGIFADDR = 0x8915  # netdevice(7)
# Of a Ray worker's environment: which accelerators it was given.
_GIVEN = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Code(Document):
    """Comes before the first order to open a dataset: the job's code, which each node lays out for itself."""

    kind: Literal["code"] = "code"
    path: str  # where it lies at the agent, as the orders name it
    digest: Digest
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class Berth:
    """Which place of the layout it is, and where the agent wants its files."""

    place: int
    folder: str
    mark: str  # a file in `folder` that the agent made: a node that does not see it has another folder of this name
    version: str  # of Atoll


@dataclass(slots=True)
class _Life:
    """One worker process of the place, and the line that it was told in part."""

    process: local.Process
    rest: bytes = b""
    writing: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        """Let it have no more orders, unless it is at one that it does not read."""
        if self.writing.acquire(blocking=False):
            if self.process.orders >= 0:
                os.close(self.process.orders)
                self.process.orders = -1
            self.writing.release()


class Seat:
    """A place for one rank after another: who takes a lost one's finds the memory that the lost one mirrored to.

    Each worker process is a life, with a number. Calls to `write` of one follow each other; others come beside them.
    """

    def __init__(self) -> None:
        self._lives: dict[int, _Life] = {}
        self._mirrors = local.Mirrors(2)  # its own, and one of a rank on another node
        self._code: dict[str, Path] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="atoll-code-"))

    def start(self, life: int, berth: Berth, more: Mapping[str, str], address: str = "", node: str = "") -> None:
        """Start a worker, with ``more`` in its environment, which meets others at this node's ``address``, if any.

        The ``node``'s name is for ranks to know who of them shares its memory's fate.

        Raises `Unavailable` on a node where it cannot work.
        """
        folder, here = Path(berth.folder), socket.gethostname()
        if not (folder / berth.mark).exists():
            raise Unavailable(
                f"{here} does not see {folder}; put the site's home and its datasets where every node of the cluster "
                "has them under the same path"
            )
        if atoll.__version__ != berth.version:
            raise Unavailable(
                f"{here} has Atoll {atoll.__version__} and the site has {berth.version}; install the same on every node"
            )
        more = {**more, **{name: os.environ[name] for name in _GIVEN if name in os.environ}}
        if node:
            more["ATOLL_NODE"] = node
        if address:
            more["GLOO_SOCKET_IFNAME"] = interface(address)
        try:
            memory = (*self._mirrors.of(0), *self._mirrors.of(1))
            process = local.start((), folder / f"worker-{berth.place}.log", more, memory)
        except OSError as error:
            raise Unavailable(f"{here}: no worker can be started ({error}); free memory or processes") from None
        self._lives[life] = _Life(process)

    def write(self, life: int, data: bytes) -> None:
        """Pass on what completes lines; of an order that opens a dataset, the code's folder is this node's."""
        one = self._lives[life]
        *lines, one.rest = (one.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b'{"kind":"code"'):
                self._lay_out(parse_json(Code, line, "code"))
                continue
            if line.startswith(b'{"kind":"open"'):
                opened = parse_json(Open, line, "open")
                line = opened.model_copy(update={"bundle": str(self._code[opened.bundle])}).model_dump_json().encode()
            _tell(one, memoryview(line + b"\n"))

    def _lay_out(self, code: Code) -> None:
        folder = self._scratch / code.digest.replace(":", "-")
        if not laid_out(folder, code.digest):
            write_bundle(code.bundle, folder)
        if not laid_out(folder, code.digest):
            raise Corrupt(f"code: what reached a node is not {code.digest[:19]}...; submit the job again")
        self._code[code.path] = folder

    def read(self, life: int) -> bytes:
        """Return the next bytes that a worker says; none when it says nothing any more."""
        process = self._lives[life].process
        while not select.select([process.replies], [], [], _LOOK)[0]:
            if process.ended() and not select.select([process.replies], [], [], 0)[0]:
                return b""  # and something that it started holds the pipe
        return os.read(process.replies, _PIECE)

    def how(self, life: int) -> str:
        """Return how a worker ended that says nothing any more, and end what it left behind."""
        one = self._lives[life]
        words = one.process.how()
        one.close()
        os.close(one.process.replies)
        one.process.end(time.monotonic())
        return words

    def computed(self, life: int) -> float | None:
        return self._lives[life].process.computed()

    def kill(self, life: int) -> None:
        self._lives[life].process.kill()

    def rest(self) -> None:
        """Give back the memory that nobody needs while no run is under way."""
        self._mirrors.empty()

    def end(self) -> None:
        """End the workers with all that they started, and drop the code."""
        deadline = time.monotonic() + GRACE
        for one in self._lives.values():
            one.close()  # one that does not read is ended by force
        for one in self._lives.values():
            one.process.end(deadline)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _tell(one: _Life, rest: memoryview) -> None:
    """Write to a worker as it reads. One that was stopped reads nothing: until it ends, as `end` sees to."""
    process = one.process
    with one.writing:
        while rest and process.orders >= 0 and not process.ended():
            if select.select([], [process.orders], [], _LOOK)[1]:
                try:
                    rest = rest[os.write(process.orders, rest) :]
                except BrokenPipeError:
                    return  # `read` tells that it ended


def interface(address: str) -> str:
    """Return the network interface of this machine that has this IPv4 address, for gloo; raise `Unavailable`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                told = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(told[20:24]) == address:
                return name
    raise Unavailable(f"{socket.gethostname()}: no interface has {address}; start Ray with the node's IPv4 address")
