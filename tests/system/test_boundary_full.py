"""A hub whose process has no room for one more connection lets nobody in for a while, and then goes on."""

import socket
import subprocess
import sys

import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.network import SocketChannel
from atoll.spec.message import Parcel

pytestmark = pytest.mark.system
WAIT = 30.0

HUB = """\
import logging, resource, sys, threading
from atoll.boundary.port import Port

class Desk:
    def admits(self, site, secret): return True
    def opened(self, site, send): pass
    def heard(self, site, message): pass
    def closed(self, site, send, words): pass
    def take(self, site, parcel, frames): list(frames(0))

logging.basicConfig(stream=sys.stdout)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
port = Port(Desk())
print(port.address, flush=True)
sys.stdin.read()
port.close()
print(sorted(thread.name for thread in threading.enumerate()), flush=True)
"""


def test_a_hub_without_a_file_descriptor_left_is_not_deaf_for_good():
    hub = subprocess.Popen([sys.executable, "-c", HUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    address = hub.stdout.readline().strip()
    here = address.removeprefix("tcp://").split(":")
    crowd = [socket.create_connection((here[0], int(here[1])), WAIT) for _ in range(60)]
    assert "nobody can be let in (Too many open files)" in hub.stdout.readline()
    for one in crowd:
        one.close()
    channel = SocketChannel(address, "lyon", ("lyon", "secret"))
    channel.put(Parcel(run="run", purpose="update", size=1), lambda offset: [Frame(0, 1, b"data")])
    channel.close()
    hub.stdin.close()
    assert hub.stdout.read().splitlines()[-1] == "['MainThread']"
    assert hub.wait(WAIT) == 0
    hub.stdout.close()
