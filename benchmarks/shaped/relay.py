"""The process behind shaped links: holds a network for the hub and one for each site, and carries packets between them.

    python relay.py '[{"mbit": 100, "round_trip": 0.05}, ...]'        as root, on Linux

Tells in its first line under which of its file descriptors the networks are found; each further line of standard input
is answered with what was carried so far. It ends when its standard input does, and nothing outlives it: networks and
devices have no names and go with the last process in them.
"""

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

HUB = "10.77.0.1"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PI, _VNET_HDR = 0x0001, 0x1000, 0x4000
_CSUM, _TSO4 = 0x01, 0x02
# The kernel hands over up to 64 KiB of one TCP stream at a time, as to a card that cuts it up, with this before it.
_OFFLOAD = struct.Struct("=BBHHHH")  # flags, kind, length of headers, bytes of a segment, start and offset of checksum
_READ = _OFFLOAD.size + 65535
_PAUSE = 0.0005  # seconds between two looks: what came meanwhile costs one waking, and is late by that at most


@dataclass(slots=True)
class Lane:
    """One direction of a link: packets leave one after the other at ``rate``, and arrive ``delay`` later.

    Bytes a second, seconds, and the bytes that may wait to leave; what comes on top of those is lost, as in a router.
    """

    rate: float
    delay: float
    room: int
    carried: int = 0  # bytes
    lost: int = 0  # bytes
    _free: float = 0.0  # when what is before it has left
    _under_way: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, now: float, packet: bytes, size: int) -> None:
        """Take a packet that is ``size`` bytes on the wire."""
        left = max(now, self._free)
        if (left - now) * self.rate + size > self.room:
            self.lost += size
            return
        self.carried += size
        self._free = left + size / self.rate
        self._under_way.append((self._free + self.delay, packet))

    @property
    def due(self) -> float | None:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else None

    def arrived(self, now: float) -> bytes | None:
        """Return the next packet if it has arrived."""
        return self._under_way.popleft()[1] if self._under_way and self._under_way[0][0] <= now else None


def lane(mbit: float, round_trip: float) -> Lane:
    """Return half a link. Its queue holds what a round trip carries, as usual, and a few large packets at least."""
    rate = mbit * 1e6 / 8
    return Lane(rate, round_trip / 2, max(int(rate * round_trip), 256 << 10))


def on_wire(packet: bytes) -> int:
    """Return the bytes of a read from a device: a large one crosses as segments that each have IP's and TCP's header.

    What lies under IP is not counted.
    """
    _, kind, _, segment, start, _ = _OFFLOAD.unpack_from(packet)
    size = len(packet) - _OFFLOAD.size
    if not kind or not segment:
        return size
    headers = start + 4 * (packet[_OFFLOAD.size + start + 12] >> 4)
    return size + headers * (-(-(size - headers) // segment) - 1)


def separate() -> int:
    """Move this process into a network of its own; return a file descriptor of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "no network of its own can be made")
    _ip("link", "set", "lo", "up")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def device(name: str, here: str, there: str) -> int:
    """Make a point-to-point device in this process's network; return where its packets are read and written."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN | _NO_PI | _VNET_HDR))
    fcntl.ioctl(tun, _TUNSETOFFLOAD, _CSUM | _TSO4)
    _ip("link", "set", name, "addrgenmode", "none", "mtu", "1500", "txqueuelen", "1000")
    _ip("address", "add", here, "peer", there, "dev", name)
    _ip("link", "set", name, "up")
    return tun


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def carry(lanes: dict[int, tuple[Lane, int]]) -> None:
    """Carry packets from each device through its lane to another, until standard input ends."""
    poll = select.poll()
    for source in (sys.stdin.fileno(), *lanes):
        poll.register(source, select.POLLIN)
    while True:
        due = min((lane.due for lane, _ in lanes.values() if lane.due is not None), default=None)
        ready = [number for number, _ in poll.poll(None if due is None else max(0.0, due - time.monotonic()) * 1000)]
        if sys.stdin.fileno() in ready:
            if not sys.stdin.readline():
                return
            print(json.dumps(_told([lane for lane, _ in lanes.values()])), flush=True)
        now = time.monotonic()
        for number in ready:
            if number in lanes:
                _read(number, lanes[number][0], now)
        for lane, target in lanes.values():
            while (packet := lane.arrived(now)) is not None:
                os.write(target, packet)
        time.sleep(_PAUSE)


def _read(source: int, into: Lane, now: float) -> None:
    for _ in range(64):  # the other devices wait
        try:
            packet = os.read(source, _READ)
        except BlockingIOError:
            return
        into.take(now, packet, on_wire(packet))


def _told(lanes: list[Lane]) -> dict[str, object]:
    """Lanes lie in pairs: what a link carried up to the hub and down from it, and what all of it cost."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    pairs = zip(lanes[::2], lanes[1::2], strict=True)
    links = [{"up": up.carried, "down": down.carried, "lost": up.lost + down.lost} for up, down in pairs]
    return {"links": links, "processor_seconds": used.ru_utime + used.ru_stime}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this, and closes our standard input
    shapes = json.loads(sys.argv[1])
    sites = [f"10.77.0.{2 + number}" for number in range(len(shapes))]
    networks = [separate()]
    at_hub = [device(f"site{number}", HUB, site) for number, site in enumerate(sites)]
    lanes: dict[int, tuple[Lane, int]] = {}
    for shape, site, far in zip(shapes, sites, at_hub, strict=True):
        networks.append(separate())
        near = device("hub", site, HUB)
        lanes |= {near: (lane(**shape), far), far: (lane(**shape), near)}
    print(json.dumps({"address": HUB, "networks": networks}), flush=True)
    carry(lanes)


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"links cannot be shaped on this machine: {error}; it takes root, Linux, ip and /dev/net/tun")
