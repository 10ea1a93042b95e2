"""Weights that come in to a site: written as they come, verified before they take the place of the ones before."""

import tracemalloc

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Corrupt, Invalid, LinkLost
from atoll.outer.wire import CHUNK, encode
from atoll.registry.weights import save
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import RunFolder
from atoll.runtime.reports import Reports
from atoll.spec.document import sha256
from atoll.spec.model import TensorSpec
from tests.unit.places import House, assign
from tests.unit.vectors import noise

SIZE = 2 * CHUNK + 9
SIGNATURE = (TensorSpec(name="w", shape=(SIZE - 9,)), TensorSpec(name="b", shape=(3, 3)))
WEIGHTS = noise(SIZE)
DIGEST = sha256(save(WEIGHTS, SIGNATURE))
NEXT = sha256(save(-WEIGHTS, SIGNATURE))


class Giving(House):
    """A site whose hub gives the frames that a test made."""

    def __init__(self, home, frames):
        super().__init__(home)
        self.frames = frames
        self.gate.attach(self)
        self.folder = RunFolder(home / "runs" / "run")
        self.folder.open(0, 2)
        self.incoming = Incoming(self.place, self.folder, Reports(self.place))

    def opened(self, site, send):
        pass

    def closed(self, site, send, words):
        pass

    def heard(self, site, message):
        pass

    def give(self, site, parcel):
        return parcel, self.frames()

    def fetch(self, digest=DIGEST):
        return self.incoming.weights(assign(weights=digest, signature=SIGNATURE))

    def files(self):
        return sorted(path.name for path in self.folder.path.glob("weights*") if path.suffix != ".spare")


@pytest.fixture
def giving(tmp_path):
    made = Giving(tmp_path, lambda: encode(WEIGHTS, ()))
    yield made
    made.journal.close()


def reused():
    """The frames of a line, which are good until the next one."""
    buffer = bytearray(4 * CHUNK)
    for chunk in encode(WEIGHTS, ()):
        view = memoryview(buffer)[: len(chunk.data)]
        view[:] = chunk.data
        yield Frame(chunk.offset, chunk.length, view)
    buffer[:] = bytes(len(buffer))


def test_weights_are_written_as_their_frames_come_and_fetched_once(giving):
    giving.frames = reused
    path = giving.fetch()
    assert np.array_equal(np.fromfile(path, np.float32), WEIGHTS)
    giving.frames = None
    assert giving.fetch() == path
    assert giving.files() == [path.name]


def wrong(kind):
    *most, last = encode(-WEIGHTS, ())
    other = -WEIGHTS
    other[7] = 5
    nan = WEIGHTS.copy()
    nan[7] = np.nan
    return {
        "other numbers": (Corrupt, encode(other, ())),
        "nothing": (Corrupt, iter(())),
        "truncated": (Corrupt, iter(most)),
        "wrong order": (Corrupt, iter([most[1], most[0], *most[2:], last])),
        "twice": (Corrupt, iter([most[0], most[0], *most[1:], last])),
        "oversized": (Invalid, iter([*most, last, Frame(SIZE, 1, bytes(4))])),
        "not finite": (Invalid, iter([Frame(0, CHUNK, nan[:CHUNK].tobytes())])),
        "short": (Invalid, iter([Frame(0, CHUNK, bytes(8))])),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["other numbers", "nothing", "truncated", "wrong order", "twice", "oversized", "not finite", "short"]
)
def test_what_is_not_the_weights_of_the_digest_never_takes_their_place(giving, kind):
    before = giving.fetch()
    error, frames = wrong(kind)
    giving.frames = lambda: frames
    with pytest.raises(error):
        giving.fetch(NEXT if error is Corrupt else sha256(b"others"))
    assert giving.files() == [before.name]
    assert giving.fetch() == before
    giving.frames = lambda: encode(-WEIGHTS, ())
    assert giving.files() == [before.name]
    path = giving.fetch(NEXT)
    assert giving.files() == [path.name]


def test_a_link_that_breaks_leaves_no_part(giving):
    def breaking():
        yield next(encode(WEIGHTS, ()))
        raise LinkLost("the link broke")

    giving.frames = breaking
    with pytest.raises(LinkLost):
        giving.fetch()
    assert giving.files() == []
    giving.frames = lambda: encode(WEIGHTS, ())
    assert giving.fetch().exists()


def test_weights_come_in_without_a_vector_in_memory(giving):
    weights, signature = noise(4 * CHUNK + 9), (TensorSpec(name="w", shape=(4 * CHUNK + 9,)),)
    giving.frames = lambda: encode(weights, ())
    asked = assign(weights=sha256(save(weights, signature)), signature=signature)
    tracemalloc.start()
    giving.incoming.weights(asked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * CHUNK < weights.nbytes / 4
