"""What a rank holds of a flat vector: its places there, any stretch of them, and files that ranks write together."""

import itertools
import math
import resource

import numpy as np
import pytest
import torch

from atoll.inner.checkpoint import read_tensors, write_tensors
from atoll.inner.held import Held, changes, held, written
from atoll.inner.joint import Joint
from atoll.inner.mesh import Mesh
from atoll.spec.model import TensorSpec

SHAPES = [(), (1,), (5,), (2, 3), (4, 1, 3), (3, 0), (2, 3, 2, 2)]


def parts(shape, at):
    """Yield every part of a tensor that is cut along one dimension, of the numbers that count up from ``at``."""
    whole = torch.arange(at, at + math.prod(shape), dtype=torch.float32).reshape(shape)
    yield Held("x", whole, (0,) * len(shape), shape, at)
    for axis, size in enumerate(shape):
        for begin, end in itertools.combinations(range(size + 1), 2):
            begins = tuple(begin if number == axis else 0 for number in range(len(shape)))
            yield Held("x", whole.narrow(axis, begin, end - begin), begins, shape, at)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_is_found_in_the_vector_and_so_is_any_stretch_of_it(shape):
    before, after = 3, 2
    size = before + math.prod(shape) + after
    vector = torch.arange(size, dtype=torch.float32)
    for part in parts(shape, before):
        assert torch.equal(part.of(vector), part.value)
        runs = [(at, run.tolist()) for at, run in part.runs()]
        assert [number for at, run in runs for number in range(at, at + len(run))] == part.value.reshape(-1).tolist()
        assert [number for _, run in runs for number in run] == part.value.reshape(-1).tolist()
        mine = part.value.reshape(-1).tolist()
        for first, last in itertools.combinations(range(size + 1), 2):
            cut = list(part.between(first, last))
            found = [number for one in cut for number in one.value.reshape(-1).tolist()]
            assert sorted(found) == [number for number in mine if first <= number < last]
            assert all(torch.equal(one.of(vector), one.value) for one in cut)
            assert len(cut) <= max(1, 2 * len(shape))


def into(vector):
    return lambda one: one.of(vector).copy_(one.value)


def test_what_is_changed_lies_where_the_stretch_has_it():
    signature = (TensorSpec(name="a", shape=(2, 3)), TensorSpec(name="b", shape=()), TensorSpec(name="c", shape=(4,)))
    own = {"a": torch.ones(2, 3), "c": torch.full((4,), 2.0)}  # b is at another rank
    start = torch.arange(11, dtype=torch.float32)
    expected = torch.cat([torch.ones(6), torch.zeros(1), torch.full((4,), 2.0)]) - start
    expected[6] = 0
    for first, last in itertools.combinations(range(12), 2):
        made = torch.zeros(last - first)
        assert written(changes(held(own, signature), start, first, last), into(made))
        assert torch.equal(made, expected[first:last])


def test_what_another_rank_writes_is_looked_at_and_left_alone():
    made = torch.zeros(2)
    assert written([Held("x", torch.ones(2), (0,), (2,), 0, first=False)], into(made))
    assert not written([Held("x", torch.tensor([1.0, math.nan]), (0,), (2,), 0, first=False)], into(made))
    assert torch.equal(made, torch.zeros(2))


def test_a_joint_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "update"
    file = Joint(Mesh(), path, 12)
    file.write(Held("x", torch.tensor([1.5]), (0,), (1,), 0), since=4)
    assert file.written()
    assert not file.written(False)
    assert file.read().view(torch.float32).tolist() == [0, 1.5, 0]
    assert not path.exists()
    file.put(bytes([0, 0, 0, 63]))
    file.drop()
    assert np.fromfile(path, np.float32).tolist() == [0.5, 1.5, 0]
    Joint(Mesh(), path, 0).drop()
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size == 12


def test_a_lack_of_room_is_told_before_anything_is_written(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Joint(Mesh(), tmp_path / "update", 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_flat_vectors_lie_beside_tensors(tmp_path):
    path = tmp_path / "state"
    own = Held("x", torch.tensor([[1.0], [2.0]]), (0, 1), (2, 3), 1)
    write_tensors(path, {"step": torch.tensor(3.0)}, {}, flat={"weights": (8, [own])})
    tensors, _ = read_tensors(path)
    assert tensors["weights"].tolist() == [0, 0, 1, 0, 0, 2, 0, 0]
    assert tensors["step"] == 3
