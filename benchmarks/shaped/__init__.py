"""Links with a rate and a round trip: networks of their own for a hub and its sites, joined by a relay (`relay.py`).

Whatever is started inside one reaches the others over its link alone, and nothing else. Once the context is left, or
this process dies, the relay ends; networks and devices go with the last process in them.
"""

import ctypes
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

_RELAY = Path(__file__).with_name("relay.py")
_PATIENCE = 60.0  # seconds


class CannotShape(Exception):
    """This machine has no networks to give, in the relay's words."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Megabits a second each way, and seconds of a round trip."""

    mbit: float
    round_trip: float

    def __str__(self) -> str:
        return f"{self.mbit:g} Mbit/s, {1000 * self.round_trip:g} ms"


@dataclass(frozen=True, slots=True)
class Carried:
    """What links have carried so far: bytes of IP up to the hub and down from it, over all sites, and the relay's cost.

    ``lost``: bytes that a full queue threw away; whoever sent them did so again.
    """

    up: int
    down: int
    lost: int
    processor_seconds: float

    @property
    def bytes(self) -> int:
        return self.up + self.down

    def since(self, before: "Carried") -> "Carried":
        spent = self.processor_seconds - before.processor_seconds
        return Carried(self.up - before.up, self.down - before.down, self.lost - before.lost, spent)


@dataclass(frozen=True, slots=True)
class Measured:
    """One link as a new TCP connection finds it: seconds until one byte is answered, and megabits a second.

    Both are of whoever waits for the answer: the connection's slow start and the receipt's way back count.
    """

    round_trip: float
    mbit: float


class Links:
    """Links that stand. Sites are numbered as the shapes were given."""

    def __init__(self, relay: "subprocess.Popen[str]", address: str, networks: list[int]) -> None:
        self.address = address  # of the hub, the same for every site
        self._relay = relay
        self._hub, *self._sites = (f"/proc/{relay.pid}/fd/{number}" for number in networks)

    def inside(self, site: int | None = None) -> list[str]:
        """Return what to put before a command so that it runs at a site, or at the hub, and ends with this process."""
        return ["setpriv", "--pdeathsig", "TERM", "nsenter", f"--net={self._path(site)}"]

    def carried(self) -> Carried:
        assert self._relay.stdin is not None
        self._relay.stdin.write("\n")
        self._relay.stdin.flush()
        told = json.loads(_line(self._relay))
        up, down, lost = (sum(link[name] for link in told["links"]) for name in ("up", "down", "lost"))
        return Carried(up, down, lost, told["processor_seconds"])

    def measure(self, site: int, size: int) -> Measured:
        """Send a byte and wait for the answer, then send ``size`` bytes up and wait until the hub has them."""
        with self._entered(None):
            listening = socket.create_server((self.address, 0))
        with self._entered(site):
            connection = socket.socket()
        with closing(listening), closing(connection):
            hub = threading.Thread(target=_answer, args=(listening, size))
            hub.start()
            connection.settimeout(_PATIENCE)
            connection.connect(listening.getsockname())
            began = time.monotonic()
            connection.sendall(b"?")
            connection.recv(1)
            answered = time.monotonic()
            connection.sendall(bytes(size))
            connection.recv(1)
            seconds = time.monotonic() - answered
            hub.join(_PATIENCE)
        return Measured(answered - began, 8e-6 * size / seconds)

    def _path(self, site: int | None) -> str:
        return self._hub if site is None else self._sites[site]

    @contextmanager
    def _entered(self, site: int | None) -> Iterator[None]:
        """Have this thread make its sockets there."""
        with open("/proc/thread-self/ns/net") as home, open(self._path(site)) as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())


def _enter(network: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, 0):
        raise OSError(ctypes.get_errno(), "a network cannot be entered")


def _answer(listening: socket.socket, size: int) -> None:
    listening.settimeout(_PATIENCE)
    connection, _ = listening.accept()
    with closing(connection):
        connection.settimeout(_PATIENCE)
        connection.sendall(connection.recv(1))
        left = size
        while left and (data := connection.recv(min(left, 1 << 20))):
            left -= len(data)
        connection.sendall(b"!")


@contextmanager
def links(shapes: Sequence[Shape]) -> Iterator[Links]:
    """Join a hub and a site for each shape. Raises `CannotShape` where that is not possible."""
    if absent := [tool for tool in ("ip", "nsenter", "setpriv") if shutil.which(tool) is None]:
        raise CannotShape(f"links cannot be shaped on this machine: {', '.join(absent)} is missing")
    command = [sys.executable, str(_RELAY), json.dumps([asdict(shape) for shape in shapes])]
    relay = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Links(relay, **json.loads(_line(relay)))
    finally:
        _end(relay)


def _line(relay: "subprocess.Popen[str]") -> str:
    assert relay.stdout is not None
    assert relay.stderr is not None
    told = relay.stdout.readline()
    if not told:
        relay.wait(_PATIENCE)
        raise CannotShape(relay.stderr.read().strip().splitlines()[-1])
    return told


def _end(relay: "subprocess.Popen[str]") -> None:
    for pipe in (relay.stdin, relay.stdout, relay.stderr):
        assert pipe is not None
        pipe.close()
    try:
        relay.wait(5)
    except subprocess.TimeoutExpired:
        relay.kill()
        relay.wait()
