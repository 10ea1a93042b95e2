"""Parts of tensors as bytes: any tool reads them, ranks of any layout find theirs, and another's bytes are told."""

import itertools
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.parts import Part, moves, packed, unpacked

TENSORS = {
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.5, 0.5], dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
    "turned": torch.arange(6).reshape(2, 3).T,
    "flags": torch.tensor([True, False]),
    "wave": torch.tensor([1 + 2j], dtype=torch.complex64),
}


def whole(tensor):
    return Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape))


def joined(about, parts):
    return bytearray(b"".join(packed(about, parts)))


def cut(tensor, at):
    """A matrix in four parts, as two ranks' columns of two ranks' rows are."""
    rows, columns = at
    places = itertools.product((slice(0, rows), slice(rows, None)), (slice(0, columns), slice(columns, None)))
    return [Part(tensor[r, c], (r.start, c.start), tuple(tensor.shape)) for r, c in places]


def test_what_is_packed_is_unpacked_whatever_its_type_and_any_tool_reads_it():
    about = {"step": 3, "loss": 0.1 + 0.2}
    data = joined(about, {name: whole(tensor) for name, tensor in TENSORS.items()})
    parts, said = unpacked(memoryview(data), "x")
    theirs = safetensors.torch.load(bytes(data))
    assert said == about
    assert parts.keys() == theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert parts[name].value.dtype == theirs[name].dtype == tensor.dtype
        assert torch.equal(parts[name].value, tensor)
        assert torch.equal(theirs[name], tensor)


@given(st.tuples(st.integers(0, 5), st.integers(0, 4)), st.tuples(st.integers(0, 5), st.integers(0, 4)))
def test_parts_of_one_layout_are_put_together_into_those_of_another(before, after):
    tensor = torch.arange(20.0).reshape(5, 4)
    kept = [unpacked(memoryview(joined({}, {"x": part})), "x")[0] for part in cut(tensor, before)]
    made = torch.full((5, 4), torch.nan)
    for part in cut(made, after):
        for place, value in moves({"x": part}, [*kept, kept[0]]):  # copies of a part are there several times
            place.copy_(value)
    assert torch.equal(made, tensor)


@pytest.mark.parametrize(
    "lacking",
    [
        lambda parts: parts[1:],
        lambda parts: [Part(part.value.double(), part.begins, part.whole) for part in parts],
        lambda parts: [Part(part.value, part.begins, (9, 9)) for part in parts],
        lambda parts: [],
    ],
)
def test_what_is_not_all_there_or_was_something_else_is_told(lacking):
    kept = [{"x": part} for part in lacking(cut(torch.ones(5, 4), (2, 2)))]
    with pytest.raises(Corrupt, match=r"^tensor 'x': what is kept is not this model's"):
        moves({"x": whole(torch.zeros(5, 4))}, kept)


def rewritten(change):
    """The bytes of a file whose words about its tensors were changed."""
    data = joined({"step": 1}, {"x": Part(torch.ones(2, 3), (2, 0), (4, 3))})
    size = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + size])
    inner = json.loads(said["__metadata__"]["atoll"])
    change(said, inner)
    said["__metadata__"] = {"atoll": json.dumps(inner)}
    told = json.dumps(said).encode()
    return len(told).to_bytes(8, "little") + told + bytes(data[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda said, inner: said["x"].update(dtype="F31"),
        lambda said, inner: said["x"].update(shape=[2, 4]),
        lambda said, inner: said["x"].update(shape=[-2, -3]),
        lambda said, inner: said["x"].update(shape="23"),
        lambda said, inner: said["x"].update(data_offsets=[24, 48]),
        lambda said, inner: said["x"].update(data_offsets=[-24, 0]),
        lambda said, inner: said["x"].pop("data_offsets"),
        lambda said, inner: inner["where"].update(x=[[3, 0], [4, 3]]),
        lambda said, inner: inner["where"].update(x=[[-1, 0], [4, 3]]),
        lambda said, inner: inner["where"].update(x=[[0], [4]]),
        lambda said, inner: inner["where"].update(x=7),
        lambda said, inner: inner.pop("about"),
        lambda said, inner: inner.update(where=[]),
    ],
)
def test_other_words_of_its_tensors_are_told(change):
    with pytest.raises(Corrupt, match=r"^name: "):
        unpacked(memoryview(bytearray(rewritten(change))), "name")


@given(st.binary(max_size=200))
def test_other_bytes_are_told(data):
    with pytest.raises(Corrupt, match=r"^name: "):
        unpacked(memoryview(bytearray(data)), "name")


def test_a_type_that_no_file_has_is_told():
    with pytest.raises(TaskFailed, match="'x' is of type complex128, of which nothing can be kept"):
        packed({}, {"x": whole(torch.zeros(1, dtype=torch.complex128))})
