"""A rank's place on a node of a Ray cluster: what is an actor there. It starts the worker process and passes lines on.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import atoll
from atoll.errors import Corrupt, Unavailable
from atoll.runtime import local
from atoll.runtime.bundle import laid_out, write_bundle
from atoll.runtime.member import GRACE
from atoll.spec.document import Digest, Document, parse_json
from atoll.spec.message import Open
from atoll.spec.model import Bundle

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
    """Which rank it is, and where the agent wants its files."""

    rank: int
    folder: str
    mark: str  # a file in `folder` that the agent made: a node that does not see it has another folder of this name
    version: str  # of Atoll
    address: str  # the node's, where the ranks are on several; else ""


class Seat:
    """One rank. Calls to `write` follow each other; `read`, `how` and `end` come beside them."""

    def __init__(self) -> None:
        self._process: local.Process | None = None
        self._writing, self._rest = threading.Lock(), b""
        self._code: dict[str, Path] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="atoll-code-"))

    def start(self, berth: Berth, more: Mapping[str, str]) -> None:
        """Start the worker, with ``more`` in its environment. Raises `Unavailable` on a node where it cannot work."""
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
        if berth.address:
            more["GLOO_SOCKET_IFNAME"] = interface(berth.address)
        log = folder / f"worker-{berth.rank}.log"
        try:
            self._process = local.start((), log, more)
        except OSError as error:
            raise Unavailable(f"{here}: no worker can be started ({error}); free memory or processes") from None

    def write(self, data: bytes) -> None:
        """Pass on what completes lines; of an order that opens a dataset, the code's folder is this node's."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b'{"kind":"code"'):
                self._lay_out(parse_json(Code, line, "code"))
                continue
            if line.startswith(b'{"kind":"open"'):
                opened = parse_json(Open, line, "open")
                line = opened.model_copy(update={"bundle": str(self._code[opened.bundle])}).model_dump_json().encode()
            self._tell(memoryview(line + b"\n"))

    def _lay_out(self, code: Code) -> None:
        folder = write_bundle(code.bundle, self._scratch / code.digest.replace(":", "-"))
        if not laid_out(folder, code.digest):
            raise Corrupt(f"code: what reached a node is not {code.digest[:19]}...; submit the job again")
        self._code[code.path] = folder

    def _tell(self, rest: memoryview) -> None:
        """Write to the worker as it reads. One that was stopped reads nothing: until it ends, as `end` sees to."""
        process = self._worker
        with self._writing:
            while rest and process.orders >= 0 and not process.ended():
                if select.select([], [process.orders], [], _LOOK)[1]:
                    try:
                        rest = rest[os.write(process.orders, rest) :]
                    except BrokenPipeError:
                        return  # `read` tells that it ended

    def read(self) -> bytes:
        """Return the next bytes that the worker says; none when it says nothing any more."""
        process = self._worker
        while not select.select([process.replies], [], [], _LOOK)[0]:
            if process.ended() and not select.select([process.replies], [], [], 0)[0]:
                return b""  # and something that it started holds the pipe
        return os.read(process.replies, _PIECE)

    def how(self) -> str:
        return self._worker.how()

    def end(self) -> None:
        """End the worker with all that it started, and drop the code."""
        process = self._process
        if process is not None:
            if self._writing.acquire(blocking=False):  # otherwise it does not read, and is ended by force
                if process.orders >= 0:
                    os.close(process.orders)
                    process.orders = -1
                self._writing.release()
            process.end(time.monotonic() + GRACE)
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _worker(self) -> local.Process:
        assert self._process is not None, "it was not started"
        return self._process


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
