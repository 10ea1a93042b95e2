"""The hub's cache of the newest change: given from exactly the weights it is from, and gone without harm."""

import os
import resource

import numpy as np
import pytest

from atoll.outer.wire import CHUNK, encode
from atoll.runtime.changes import Changes
from atoll.runtime.files import Folders
from atoll.spec.wire import Transform
from tests.unit.runs import ONE, ZERO

INT8 = (Transform(kind="int8"),)
VECTOR = np.random.default_rng(0).normal(size=2 * CHUNK + 7).astype(np.float32)
CHUNKS = list(encode(VECTOR, INT8))
TWO = "sha256:" + 64 * "2"


def put(changes, base=ZERO, digest=ONE, chunks=CHUNKS):
    with changes.writing() as made:
        for chunk in chunks:
            made.add(chunk)
        changes.keep(made, base, digest)


def taken(change):
    return [(frame.offset, frame.length, bytes(frame.data), bytes(frame.scales)) for frame in change.frames]


SENT = [(chunk.offset, chunk.length, bytes(chunk.data), bytes(chunk.scales)) for chunk in CHUNKS]


def test_a_change_is_found_from_the_very_weights_that_it_is_from(tmp_path):
    changes = Changes(tmp_path)
    put(changes)
    found = changes.find(ZERO, ONE)
    assert (found.size, found.bytes) == (VECTOR.size, VECTOR.size + 4 * (2 * 256 + 1))
    assert taken(found) == SENT
    assert taken(changes.find(ZERO, ONE)) == SENT
    for base, digest in ((ONE, ONE), (TWO, ONE), (ZERO, TWO), (ONE, ZERO)):
        assert changes.find(base, digest) is None


def test_who_reads_one_gets_it_whole_when_another_takes_its_place(tmp_path):
    changes = Changes(tmp_path)
    put(changes)
    begun = changes.find(ZERO, ONE)
    put(changes, ONE, TWO, CHUNKS[:1])
    assert taken(begun) == SENT
    assert changes.find(ZERO, ONE) is None
    assert taken(changes.find(ONE, TWO)) == SENT[:1]
    assert len(list(tmp_path.iterdir())) == 1


def test_who_drops_one_unread_leaves_no_file_open(tmp_path):
    changes, before = Changes(tmp_path), len(os.listdir("/proc/self/fd"))
    put(changes)
    for _ in range(3):
        changes.find(ZERO, ONE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_kept_leaves_nothing(tmp_path):
    changes = Changes(tmp_path)
    with pytest.raises(AttributeError), changes.writing() as made:
        made.add(None)
    with changes.writing() as made:
        made.add(CHUNKS[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, CHUNK + 100])
def test_a_disk_without_room_for_a_change_costs_that_change_and_nothing_else(tmp_path, room):
    changes = Changes(tmp_path)
    put(changes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        put(changes, ONE, TWO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert changes.find(ONE, TWO) is None
    assert changes.find(ZERO, ONE) is None  # a site with those fetches the newest whole
    assert not list(tmp_path.iterdir())
    put(changes, ONE, TWO)
    assert taken(changes.find(ONE, TWO)) == SENT


def test_a_file_that_is_gone_is_no_change(tmp_path):
    changes = Changes(tmp_path)
    put(changes)
    for path in tmp_path.iterdir():
        path.unlink()
    assert changes.find(ZERO, ONE) is None


def test_a_hub_that_begins_anew_has_none_and_drops_what_is_left(tmp_path):
    folders = Folders(tmp_path)
    put(folders.of("run").changes)
    again = Folders(tmp_path)
    assert again.of("run").changes.find(ZERO, ONE) is None
    again.sweep({"run"})
    assert not list((tmp_path / "run").glob("*.change"))
