"""Mirrors in memory and checkpoints on a disk: the newest whole one is found, and nothing else is taken for one."""

import logging
import os

import pytest
import torch

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.memory import Copy
from atoll.inner.mirror import Mirror
from atoll.inner.parts import Part
from atoll.inner.saved import DEEP, Place, Writer, complete, read, saved

LARGE = 1 << 19  # numbers that are copied beside a step


def parts(value, size=3):
    return {"x": Part(torch.full((size,), float(value)), (0,), (size,))}


@pytest.fixture
def files():
    made = [os.memfd_create("mirror") for _ in range(2)]
    yield made
    for file in made:
        os.close(file)


def test_a_mirror_keeps_the_last_two_for_whoever_comes_after(files):
    mirror = Mirror(files)
    for step in range(4):
        mirror.write({"step": step}, parts(step, size=9 - step))
    successor = Mirror(files)
    assert sorted(about["step"] for about in successor.about()) == [2, 3]
    assert successor.read({"step": 3})["x"].value.tolist() == [3.0] * 6
    assert successor.read({"step": 2})["x"].value.tolist() == [2.0] * 7
    with pytest.raises(Corrupt, match=r"^mirror: nothing is kept of step 1"):
        successor.read({"step": 1})


def test_a_mirror_that_was_being_written_is_none(files):
    mirror = Mirror(files)
    for step in range(2):
        file = mirror.write({"step": step}, parts(step))
    os.pwrite(file, bytes(8), 0)  # as it is until the last byte is there
    assert [about["step"] for about in Mirror(files).about()] == [0]
    os.pwrite(file, b"\x40" + bytes(7) + b"no words of ours", 0)
    assert [about["step"] for about in Mirror(files).about()] == [0]


def test_a_mirror_without_memory_that_lasts_is_never_due_and_can_be_written_to_a_disk(tmp_path):
    mirror, writer = Mirror(()), Writer()
    assert not mirror.due(0.03)
    writer.write(Copy(mirror, {"step": 1}, parts(1), 0.0), Place(tmp_path / "round", 1, 0, 1))
    writer.wait()
    (one,) = saved(tmp_path / "round")
    found, about = read(one)
    assert (about, found["x"].value.tolist()) == ({"step": 1}, [1.0] * 3)


def written(folder, step, part=0, parts_=1, value=0.0):
    mirror, writer = Mirror(()), Writer()
    writer.write(Copy(mirror, {"step": step}, parts(value), 0.0), Place(folder, step, part, parts_))
    writer.wait()
    return writer


def test_the_newest_are_kept_of_each_part(tmp_path):
    for step in (1, 2, 3):
        for part in range(2):
            assert written(tmp_path, step, part, 2).step == step
    assert DEEP == 2
    assert sorted(one.named[:2] for one in saved(tmp_path)) == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_what_is_older_goes_first_whatever_its_step(tmp_path):
    for step in (9, 1, 2):  # the first is another order's
        written(tmp_path, step)
    assert sorted(one.named.step for one in saved(tmp_path)) == [1, 2]
    written(tmp_path, 2, value=5.0)
    assert sorted(one.named.step for one in saved(tmp_path)) == [1, 2]
    newest = max(saved(tmp_path), key=lambda one: one.named.step)
    assert read(newest)[0]["x"].value.tolist() == [5.0] * 3


def test_a_step_counts_once_all_its_parts_are_there(tmp_path):
    written(tmp_path, 1, 0, 2)
    assert complete(saved(tmp_path)) == []
    written(tmp_path, 1, 1, 2)
    written(tmp_path, 2, 1, 2)
    written(tmp_path, 2, 0, 3)
    (tmp_path / "3-0-1-word.safetensors").touch()
    (tmp_path / "17-0.part").touch()
    assert [[one.named[:3] for one in files] for files in complete(saved(tmp_path))] == [[(1, 0, 2), (1, 1, 2)]]
    assert saved(tmp_path / "gone") == []


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_file_that_is_not_the_one_written_is_told(tmp_path, change):
    written(tmp_path, 1)
    (one,) = saved(tmp_path)
    one.path.write_bytes(change(one.path.read_bytes()))
    with pytest.raises(Corrupt, match=rf"^{one.path.name}: "):
        read(one)


def test_a_disk_that_takes_nothing_costs_a_line_in_the_log(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        writer = written(tmp_path / "file", 4)
    assert writer.step is None
    assert "no checkpoint after step 4 of the round: " in caplog.text


def test_what_is_copied_beside_a_step_is_what_it_was_before(tmp_path, files):
    mirror, writer, kept = Mirror(files), Writer(), parts(0, LARGE)
    for step in range(1, 6):
        writer.copied()
        kept["x"].value.fill_(step)
        writer.write(Copy(mirror, {"step": step}, kept, 0.0), Place(tmp_path, step, 0, 1))
    writer.wait()
    assert {one.named.step: set(read(one)[0]["x"].value.tolist()) for one in saved(tmp_path)} == {4: {4.0}, 5: {5.0}}
    assert set(Mirror(files).read({"step": 5})["x"].value.tolist()) == {5.0}


def test_what_is_not_copied_beside_a_step_is_there_before_the_next_begins(files):
    writer = Writer()
    writer.write(Copy(Mirror(files), {"step": 1}, parts(1, LARGE), 0.0), None, beside=False)
    assert not writer.busy
    assert set(Mirror(files).read({"step": 1})["x"].value.tolist()) == {1.0}


@pytest.mark.parametrize("size", [3, LARGE])
def test_what_changes_before_it_is_copied_is_not_kept_and_the_next_is(tmp_path, files, size):
    mirror, writer, kept = Mirror(files), Writer(), parts(1, size)
    writer.write(Copy(mirror, {"step": 1}, kept, 0.0), None)
    writer.copied()
    late = Copy(mirror, {"step": 2}, kept, 0.0)
    kept["x"].value.fill_(2)  # as a forward pass may that bounds an embedding's norms
    writer.write(late, Place(tmp_path, 2, 0, 1))
    writer.wait()
    assert [about["step"] for about in Mirror(files).about()] == [1]
    assert saved(tmp_path) == []
    writer.write(Copy(mirror, {"step": 3}, kept, 0.0), Place(tmp_path, 3, 0, 1))
    kept["x"].value.fill_(3)  # nobody waited: it had been copied in place
    writer.wait()
    ((three, found),) = [(one.named.step, read(one)[0]["x"].value) for one in saved(tmp_path)]
    assert (three, set(found.tolist())) == (3, {2.0})


@pytest.mark.parametrize("size", [3, LARGE])
def test_what_cannot_be_copied_is_told_where_it_is_waited_for(files, size):
    writer, kept = Writer(), {"x": Part(torch.zeros(size, dtype=torch.complex128), (0,), (size,))}

    def write():
        writer.write(Copy(Mirror(files), {"step": 1}, kept, 0.0), None)
        writer.copied()

    with pytest.raises(TaskFailed, match=r"^model: 'x' is of type complex128, "):
        write()
    writer.wait()


def test_no_mirror_is_due_while_one_is_written(files):
    mirror = Mirror(files)
    assert mirror.due(0.03)
    mirror.begun()
    assert not mirror.due(0.03)
    mirror.took(1.0)
    assert mirror.due(0.03), "the first tells nothing of the next"
    mirror.begun()
    mirror.took(1e6)
    assert not mirror.due(0.03)
