"""Files of named tensors: written whole, checked before use, and refused by a model or optimiser they do not fit."""

import pytest
import torch
from torch import nn

from atoll.errors import Corrupt
from atoll.inner import checkpoint, optimiser
from atoll.spec.job import Optimiser

TENSORS = {
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.5], dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
    "turned": torch.arange(6).reshape(2, 3).T,
    "flags": torch.tensor([True, False]),
}


def test_what_is_written_is_read_back_whatever_its_type(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint.write_tensors(path, {**TENSORS, "same": TENSORS["half"]}, {"loss": 0.1 + 0.2, "step": 3})
    tensors, about = checkpoint.read_tensors(path)
    assert about == {"loss": 0.1 + 0.2, "step": 3}
    assert tensors.keys() == {*TENSORS, "same"}
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert list(tmp_path.iterdir()) == [path]


def test_equal_contents_are_equal_bytes(tmp_path):
    for name in ("one", "two"):
        checkpoint.write_tensors(tmp_path / name, TENSORS, {"b": 1, "a": 2})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_changed_byte_is_told(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint.write_tensors(path, {"x": torch.arange(3.0)}, {"step": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(Corrupt, match=r"^state.safetensors: "):
            checkpoint.read_tensors(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_told(tmp_path, data):
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(Corrupt, match=r"^state: "):
        checkpoint.read_tensors(tmp_path / "state")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(Corrupt, match=r"^state: "):
        checkpoint.read_tensors(tmp_path / "state")


def test_a_place_that_takes_nothing_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="state"):
        checkpoint.write_tensors(tmp_path / "gone" / "state", TENSORS, {})


def stepped(width):
    model = nn.Linear(width, 1)
    adam = optimiser.make(Optimiser(kind="adam"), model)
    model(torch.ones(1, width)).sum().backward()
    adam.step()
    return model, adam


def test_an_optimiser_takes_its_own_state_back_and_no_others(tmp_path):
    _, adam = stepped(2)
    checkpoint.write_tensors(tmp_path / "state", {**checkpoint.optimiser_tensors(adam), **TENSORS}, {})
    kept, _ = checkpoint.read_tensors(tmp_path / "state")
    model = nn.Linear(2, 1)
    fresh = optimiser.make(Optimiser(kind="adam"), model)
    checkpoint.put_optimiser(fresh, kept, model)
    ours, theirs = optimiser.state(fresh), optimiser.state(adam)
    assert ours.keys() == theirs.keys() > {"exp_avg.weight", "step.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for other in (nn.Linear(3, 1), nn.Linear(2, 1, bias=False)):
        with pytest.raises(Corrupt, match="fits no parameter"):
            checkpoint.put_optimiser(optimiser.make(Optimiser(kind="adam"), other), kept, other)


def values(model, adam):
    return {name: part.value.clone() for name, part in checkpoint.state_of(model, adam, {}).items()}


def test_another_models_state_changes_nothing():
    model, adam = stepped(2)
    other, others = stepped(3)
    before = values(model, adam)
    with pytest.raises(Corrupt, match="fits no parameter"):
        checkpoint.Fitted([checkpoint.state_of(other, others, {})], model, adam, {})
    with pytest.raises(Corrupt, match="not this model's"):
        checkpoint.Fitted([checkpoint.state_of(other, None, {})], model, adam, {})
    with pytest.raises(Corrupt, match="not this model's"):
        checkpoint.Fitted([checkpoint.state_of(model, adam, {})], model, None, {})
    with pytest.raises(Corrupt, match="not this model's"):
        checkpoint.Fitted([], model, adam, {})
    after = values(model, adam)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_models_state_is_put_into_another_of_the_same_kind():
    model, adam = stepped(2)
    summed = {"weight": torch.arange(2.0)}
    kept = checkpoint.state_of(model, adam, summed)
    other = nn.Linear(2, 1)
    others, sums = optimiser.make(Optimiser(kind="adam"), other), {"weight": torch.zeros(2)}
    fitted = checkpoint.Fitted([kept], other, others, sums)
    assert not torch.equal(other.weight, model.weight)
    fitted.put()
    found = checkpoint.state_of(other, others, sums)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name].value, kept[name].value) for name in kept)
