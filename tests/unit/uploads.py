"""Uploads to a spool: the vector a site sends, a sender whose stream breaks off, and what lies on the hub's disk."""

import numpy as np

from atoll.errors import LinkLost
from atoll.outer.wire import CHUNK, encode
from atoll.spec.document import sha256
from atoll.spec.wire import Transform
from tests.unit.vectors import noise

SIZE = 2 * CHUNK + 1000  # three frames
HEADER = 40
INT8 = (Transform(kind="clip", value=1.0), Transform(kind="int8"))
PACKED = (Transform(kind="topk", share=0.1), Transform(kind="zstd"))
NAME = (1, "lyon")
WAIT = 20.0


SENT, OTHER = noise(SIZE, 1), noise(SIZE, 2)
CONTENT, ANOTHER = sha256(SENT.data), sha256(OTHER.data)


class Sender:
    """A site that sends one vector; the stream breaks off after so many frames, or never."""

    def __init__(self, sent=SENT, wire=(), breaks=None):
        self.sent, self.wire, self.breaks, self.asked = sent, wire, breaks, []

    def __call__(self, offset):
        self.asked.append(offset)
        for number, frame in enumerate(encode(self.sent, self.wire)):
            if number == self.breaks:
                raise LinkLost("the stream broke off")
            if frame.offset >= offset:
                yield frame
        if self.breaks == -1:
            raise LinkLost("the stream broke off before its end")


def take(spool, sender, name=NAME, content=CONTENT):
    return spool.receive(name, sender, sender.wire, sender.sent.size, content)


def kept(spool, name=NAME, wire=(), size=SIZE):
    with spool.reading(name, wire, size) as window:
        return np.concatenate([window(offset).copy() for offset in range(0, size, CHUNK)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def part(folder):
    [path] = folder.glob("*.part")
    return path
