"""Weights: safetensors that any reader understands, and a reader that believes nothing."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from atoll.errors import Corrupt, Invalid
from atoll.registry.weights import load, save
from atoll.spec.model import TensorSpec, elements

SIGNATURE = (
    TensorSpec(name="z.weight", shape=(2, 3)),
    TensorSpec(name="a.bias", shape=(2,)),
    TensorSpec(name="empty", shape=(0, 4)),
    TensorSpec(name="scale", shape=()),
)
VECTOR = np.arange(9, dtype=np.float32)


def file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def test_what_was_saved_is_loaded_in_signature_order():
    vector, signature = load(save(VECTOR, SIGNATURE))
    assert signature == SIGNATURE
    np.testing.assert_array_equal(vector, VECTOR)


def test_equal_weights_are_equal_bytes_with_the_vector_as_data():
    data = save(VECTOR, SIGNATURE)
    assert data == save(VECTOR.copy(), SIGNATURE)
    assert data.endswith(VECTOR.tobytes())


def test_the_reference_implementation_reads_it():
    tensors = safetensors.numpy.load(save(VECTOR, SIGNATURE))
    np.testing.assert_array_equal(tensors["z.weight"], VECTOR[:6].reshape(2, 3))
    np.testing.assert_array_equal(tensors["a.bias"], VECTOR[6:8])
    assert tensors["empty"].shape == (0, 4)
    assert tensors["scale"] == 8


def test_the_reference_implementations_file_is_read_and_put_in_our_order():
    tensors = {"a.bias": VECTOR[6:8], "z.weight": VECTOR[:6].reshape(2, 3), "empty": np.zeros((0, 4), np.float32)}
    data = safetensors.numpy.save({**tensors, "scale": np.array(8, np.float32)}, metadata={"format": "pt"})
    vector, signature = load(data, SIGNATURE)
    assert signature == SIGNATURE
    np.testing.assert_array_equal(vector, VECTOR)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ((*SIGNATURE[:3], TensorSpec(name="scale", shape=(1,))), "'scale' is \\[\\] where \\[1\\]"),
        ((*SIGNATURE[:3], TensorSpec(name="shift", shape=())), "'shift' is missing"),
        (SIGNATURE[:3], "4 tensors where 3"),
    ],
)
def test_another_models_weights_are_refused(wanted, words):
    with pytest.raises(Invalid, match=words):
        load(save(VECTOR, SIGNATURE), wanted)


@pytest.mark.parametrize("vector", [VECTOR[:8], VECTOR.astype(np.float64), VECTOR.reshape(3, 3)])
def test_a_vector_that_is_not_the_signatures_is_not_saved(vector):
    with pytest.raises(Invalid, match="9 float32 numbers"):
        save(vector, SIGNATURE)


def test_a_name_twice_in_a_signature_is_not_saved():
    with pytest.raises(Invalid, match="'a'"):
        save(np.zeros(2, np.float32), (TensorSpec(name="a", shape=(1,)),) * 2)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (1 << 40).to_bytes(8, "little") + b"{}",
        file(b"{not json"),
        file(b"[" * 100_000),
        file([1]),
        file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8)),
        file({"a": entry()}, bytes(4)),
        file({"a": entry()}, bytes(12)),
        file({"a": entry(data_offsets=[4, 12])}, bytes(12)),
        file({"a": entry(), "b": entry()}, bytes(8)),
        file({"a": entry(shape=[-2])}, bytes(8)),
        file({"a": entry(shape=[2.0])}, bytes(8)),
        file({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)),
        file({"a": entry(shape=None)}, bytes(8)),
        file({"a": entry(data_offsets=[0])}, bytes(8)),
        file({"a": entry(data_offsets=["0", "8"])}, bytes(8)),
        file({"a": {"dtype": "F32"}}, bytes(8)),
        file({"a\n": entry()}, bytes(8)),
    ],
)
def test_a_file_that_lies_is_corrupt(data):
    with pytest.raises(Corrupt, match=r"^weights: "):
        load(data)


def test_other_numbers_than_float32_are_refused():
    with pytest.raises(Invalid, match="'F16'"):
        load(safetensors.numpy.save({"a": np.zeros(2, np.float16)}))


def test_a_file_above_the_limit_is_refused():
    with pytest.raises(Invalid, match="more than the 16 allowed"):
        load(save(VECTOR, SIGNATURE), limit=16)


@given(position=st.integers(0, len(save(VECTOR, SIGNATURE)) - 1), byte=st.integers(0, 255))
@example(position=194, byte=ord(":"))  # a name that is printable, and none that a signature has
def test_no_single_byte_makes_anything_but_an_answer_or_a_sentence(position, byte):
    data = bytearray(save(VECTOR, SIGNATURE))
    data[position] = byte
    try:
        vector, signature = load(bytes(data))
    except (Corrupt, Invalid):
        return
    assert len(vector) == elements(signature) == 9
