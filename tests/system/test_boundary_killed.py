"""A peer killed in the middle of something is noticed at the other end, and half a stream is never a whole one."""

import os
import queue
import signal
import subprocess
import sys

import pytest

from atoll.boundary.network import SocketChannel
from atoll.boundary.port import Port
from atoll.errors import LinkLost
from atoll.spec.message import Parcel

pytestmark = pytest.mark.system
SECRET = "s" * 32
WAIT = 30.0

SITE = """\
import sys, time
from atoll.boundary.channel import Frame
from atoll.boundary.network import SocketChannel
from atoll.spec.message import Parcel

channel = SocketChannel(sys.argv[1], "lyon", ("lyon", sys.argv[2]))

def endless():
    while True:
        yield Frame(0, 1, bytes(1 << 20))
        time.sleep(0.01)

if sys.argv[3] == "sending":
    channel.put(Parcel(run="run", purpose="update", size=1), lambda offset: endless())
time.sleep(60)
"""
HUB = """\
import sys, time
from atoll.boundary.channel import Frame
from atoll.boundary.port import Port

class Desk:
    def admits(self, site, secret): return True
    def opened(self, site, send): pass
    def heard(self, site, message): pass
    def closed(self, site, send, words): pass
    def give(self, site, parcel):
        return parcel, self.frames(parcel)
    def frames(self, parcel):
        while parcel.purpose == "weights":
            yield Frame(0, 1, bytes(1 << 20))
            time.sleep(0.01)

server = Port(Desk())
print(server.address, flush=True)
time.sleep(60)
"""


class Desk:
    def __init__(self):
        self.events = queue.SimpleQueue()
        self.frames = queue.SimpleQueue()

    def admits(self, site, secret):
        return secret == SECRET

    def opened(self, site, send):
        self.events.put("opened")

    def heard(self, site, message):
        pass

    def closed(self, site, send, words):
        self.events.put("closed")

    def give(self, site, parcel):
        return parcel, iter(())

    def take(self, site, parcel, frames):
        try:
            for frame in frames(0):
                self.frames.put(len(frame.data))
        except LinkLost:
            self.frames.put("lost")
            raise
        self.frames.put("whole")


@pytest.fixture
def start():
    processes = []

    def run(program, *arguments):
        process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("doing", ["waiting", "sending"])
def test_a_killed_site_is_noticed_and_its_half_stream_is_none(start, doing):
    desk = Desk()
    server = Port(desk)
    site = start(SITE, server.address, SECRET, doing)
    assert desk.events.get(timeout=WAIT) == "opened"
    if doing == "sending":
        assert desk.frames.get(timeout=WAIT) == 1 << 20
    os.kill(site.pid, signal.SIGKILL)
    assert desk.events.get(timeout=WAIT) == "closed"
    if doing == "sending":
        while (last := desk.frames.get(timeout=WAIT)) == 1 << 20:
            pass
        assert last == "lost"
    server.close()


@pytest.mark.parametrize("doing", ["listening", "fetching"])
def test_a_killed_hub_is_noticed_by_who_listens_and_who_fetches(start, doing):
    hub = start(HUB)
    channel = SocketChannel(hub.stdout.readline().strip(), "lyon", ("lyon", SECRET))
    if doing == "fetching":
        _, frames = channel.get(Parcel(run="run", purpose="weights", size=0, digest="sha256:" + 64 * "0"))
        next(frames)
    os.kill(hub.pid, signal.SIGKILL)
    with pytest.raises(LinkLost):
        list(frames) if doing == "fetching" else channel.receive(WAIT)
    with pytest.raises(LinkLost):
        channel.receive(WAIT)
    channel.close()
