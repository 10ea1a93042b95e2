"""Files written over by the next ones: nothing of what they held is ever taken for what they hold now."""

import errno
import os

import numpy as np
import pytest

from atoll.errors import LinkLost, Unavailable
from atoll.outer.wire import CHUNK, encode
from atoll.runtime.disk import appearing
from atoll.runtime.files import RunFiles
from atoll.runtime.spares import Spares
from atoll.runtime.spool import Spool
from atoll.spec.model import TensorSpec
from tests.unit.uploads import CONTENT, HEADER, INT8, NAME, OTHER, PACKED, SENT, Sender, kept, names, part, take

NEXT = (2, "lyon")
FRAME = HEADER + 4 * CHUNK


def spent(folder, sent=OTHER, wire=()):
    """Return a spool with one spare file, full of the frames of another update."""
    spool = Spool(folder)
    take(spool, Sender(sent, wire), (1, "oslo"))
    spool.drop(lambda position, site: position < 2)
    assert names(folder) == ["1-oslo.update.spare"]
    return spool


@pytest.mark.parametrize("wire", [(), INT8, PACKED])
def test_the_file_of_a_spent_update_becomes_that_of_the_next_one(tmp_path, wire):
    spool = spent(tmp_path / "one", wire=wire)
    inode = (tmp_path / "one" / "1-oslo.update.spare").stat().st_ino
    found = take(spool, Sender(wire=wire), NEXT)
    (tmp_path / "two").mkdir()
    fresh = Spool(tmp_path / "two")
    assert found == take(fresh, Sender(wire=wire), NEXT)  # the same bytes, whatever was there before
    assert np.array_equal(kept(spool, NEXT, wire), kept(fresh, NEXT, wire))
    assert Spool(tmp_path / "one").holds(NEXT, found[0])
    assert names(tmp_path / "one") == ["2-lyon.update"]
    if wire != PACKED:  # whose files are smaller than what they might take
        assert (tmp_path / "one" / "2-lyon.update").stat().st_ino == inode


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("frames", [0, 1, 2, -1])
@pytest.mark.parametrize("wire", [(), INT8])
def test_an_upload_over_a_spare_goes_on_behind_its_own_last_frame(tmp_path, frames, wire, restart):
    spool = spent(tmp_path, wire=wire)
    with pytest.raises(LinkLost):
        take(spool, Sender(wire=wire, breaks=frames), NEXT)
    if restart:
        spool = Spool(tmp_path)
    digest, _ = take(spool, again := Sender(wire=wire), NEXT)
    assert again.asked == ([frames * CHUNK] if frames >= 0 else [])
    assert Spool(tmp_path).holds(NEXT, digest)
    assert np.array_equal(kept(spool, NEXT), SENT) or wire
    assert names(tmp_path) == ["2-lyon.update"]


@pytest.mark.parametrize("written", [0, 1, HEADER - 9, HEADER - 8, HEADER - 1])
@pytest.mark.parametrize("number", [0, 1])
def test_a_kill_within_a_frame_never_brings_the_spares_own_frames_back(tmp_path, number, written):
    """Behind the last whole frame lie the next one's numbers, ``written`` bytes of its header, and an old frame."""
    spool = spent(tmp_path)
    with pytest.raises(LinkLost):
        take(spool, Sender(breaks=number), NEXT)
    chunk = list(encode(SENT, ()))[number]
    header = b"".join(number.to_bytes(8, "little") for number in (chunk.offset, CHUNK, 4 * CHUNK, 0)) + b"atollbit"
    with part(tmp_path).open("r+b") as file:
        assert file.seek(0, 2) == 3 * FRAME - 4 * (CHUNK - 1000)  # the whole of the old one is there
        file.seek(number * FRAME)
        file.write(header[:written])
        file.seek(number * FRAME + HEADER)
        file.write(bytes(chunk.data)[: 4 * CHUNK // 2])
    digest, _ = take(Spool(tmp_path), again := Sender(), NEXT)
    assert again.asked == [number * CHUNK]
    assert np.array_equal(kept(Spool(tmp_path), NEXT), SENT)
    assert Spool(tmp_path).holds(NEXT, digest)


def test_a_spare_that_took_its_new_name_and_nothing_else_has_no_frame(tmp_path):
    spool = spent(tmp_path)

    def killed(offset):
        raise LinkLost("before the first frame")
        yield

    with pytest.raises(LinkLost):
        spool.receive(NEXT, killed, (), SENT.size, CONTENT)
    take(Spool(tmp_path), again := Sender(), NEXT)
    assert again.asked == [0]


def test_an_update_that_is_being_read_becomes_no_other_ones_file(tmp_path):
    spool = Spool(tmp_path)
    take(spool, Sender())
    with spool.reading(NAME, (), SENT.size) as window:
        spool.drop(lambda position, site: position < 2)
        take(spool, Sender(OTHER), NEXT)
        assert np.array_equal(window(CHUNK), SENT[CHUNK : 2 * CHUNK])
    assert np.array_equal(kept(spool, NEXT), OTHER)


def test_there_are_never_more_spares_than_updates_were_spent_together(tmp_path):
    spool = Spool(tmp_path)
    for position, sites in ((1, "abcd"), (2, "ab"), (3, "a")):
        for site in sites:
            take(spool, Sender(), (position, site))
        spool.drop(lambda number, site, position=position: number <= position)
        assert len(names(tmp_path)) == len(sites)
    Spool(tmp_path).drop(lambda position, site: True)
    assert len(names(tmp_path)) == 1  # an earlier process's is used, too


def test_a_disk_that_fills_up_gets_its_spares_back(tmp_path):
    spool = spent(tmp_path)
    take(spool, Sender(), NEXT)
    take(spool, Sender(), (2, "oslo"))
    spool.drop(lambda position, site: True)
    assert len(names(tmp_path)) == 2

    def full(offset):
        yield next(encode(SENT, ()))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Unavailable, match="cannot be stored"):
        spool.receive((3, "lyon"), full, (), SENT.size, CONTENT)
    assert names(tmp_path) == []
    take(spool, again := Sender(), (3, "lyon"))
    assert again.asked == [0]


def test_a_spare_is_taken_for_about_its_own_size_only(tmp_path):
    for number, size in enumerate((100, 1000)):
        (tmp_path / f"{number}.spare").write_bytes(bytes(size))
    spares = Spares(tmp_path)
    assert [spares.take(size) for size in (49, 201, 499, 2001)] == [None] * 4
    assert spares.take(900) == tmp_path / "1.spare"
    assert spares.take(900) is None
    spares.add(tmp_path / "gone")
    spares.keep(3)
    assert spares.take(200) == tmp_path / "0.spare"
    assert spares.take(200) is None


def test_a_file_that_appears_over_another_holds_nothing_of_it(tmp_path):
    (tmp_path / "old").write_bytes(bytes(100))
    with appearing(tmp_path / "new", over=tmp_path / "old") as file:
        file.write(b"12345678")
    assert (tmp_path / "new").read_bytes() == b"12345678"
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "more", over=tmp_path / "new"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_the_hubs_weights_are_written_over_those_of_the_round_before_the_last(tmp_path):
    files, signature = RunFiles(tmp_path), (TensorSpec(name="w", shape=(5000,)),)
    inodes = []
    for number in range(6):
        vector = np.full(5000, number, np.float32)
        digest = files.put_weights(vector, signature)
        files.tidy(lambda position, site: False, (digest,))
        [path] = tmp_path.glob(f"{digest.removeprefix('sha256:')}.safetensors")
        inodes.append(path.stat().st_ino)
        assert np.array_equal(RunFiles(tmp_path).vector(digest, signature), vector)
    assert inodes[5] == inodes[0]
    assert len(set(inodes)) == 5
