"""Numbers that strangers send: updates in every encoding, weights, kept tensors. Right in all they say, or refused; and
never more memory than the receiver's own count of them."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError, Corrupt, Invalid
from atoll.inner.checkpoint import read_tensors, write_tensors
from atoll.outer import zstd
from atoll.outer.wire import Chunk, decode, encode
from atoll.registry.weights import load, save
from atoll.spec.model import TensorSpec
from atoll.spec.wire import Transform
from tests.unit.mutations import mutated, outcome

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZE = 300
VECTOR = np.random.default_rng(1).normal(size=SIZE).astype(np.float32)
SIGNATURE = (TensorSpec(name="layer.weight", shape=(29, 10)), TensorSpec(name="bias", shape=(10,)))
WIRES = {
    "plain": (),
    "bfloat16": (Transform(kind="bfloat16"),),
    "int8": (Transform(kind="int8"),),
    "int4": (Transform(kind="int4"),),
    "packed": (Transform(kind="zstd"),),
    "sparse": (Transform(kind="topk", share=0.1),),
    "all": (Transform(kind="topk", share=0.05), Transform(kind="int8"), Transform(kind="zstd")),
}


@pytest.mark.parametrize("name", WIRES)
@given(data=st.data())
def test_a_chunk_of_an_update(name, data):
    (good,) = encode(VECTOR, WIRES[name])
    made = Chunk(
        data.draw(st.just(good.offset) | st.integers(-1, 2**40)),
        data.draw(st.just(good.length) | st.integers(-1, 2**40)),
        data.draw(mutated(bytes(good.data))),
        data.draw(st.just(bytes(good.scales)) | mutated(bytes(good.scales) or b"x")),
    )
    found = outcome(decode, made, WIRES[name], SIZE)
    if not isinstance(found, Invalid):
        assert (found.shape, found.dtype) == ((SIZE,), np.float32)
        assert np.isfinite(found).all()


@given(mutated(save(VECTOR, SIGNATURE)))
def test_weights(data):
    found = outcome(load, data)
    if not isinstance(found, AtollError):
        vector, signature = found
        assert sum(spec.size for spec in signature) == len(vector) <= len(data) // 4
    assert isinstance(outcome(load, data, SIGNATURE), tuple | AtollError)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "kept.safetensors"
    write_tensors(path, {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([3])}, {"step": 3, "of": "run"})
    return path.read_bytes()


@SAME_FOLDER
@given(data=st.data())
def test_kept_tensors(kept, tmp_path, data):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(made := data.draw(mutated(kept)))
    found = outcome(read_tensors, path)
    assert isinstance(found, Corrupt) or made == kept or found[1] == {"step": 3, "of": "run"}


@pytest.mark.parametrize(
    "said", ['{"about":{"x":NaN},"digest":""}', "[" * 100_000, "[]", "3", '{"about":[],"digest":{}}']
)
def test_what_is_said_of_kept_tensors(tmp_path, said):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(safetensors.torch.save({"w": torch.zeros(2)}, {"atoll": said}))
    with pytest.raises(Corrupt, match=r"^kept\.safetensors: "):
        read_tensors(path)


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


LARGE = zstd.pack(np.zeros(1 << 24, np.uint8), 1)  # 16 MiB in half a kilobyte


@pytest.mark.parametrize("length", [2**32 - 1, 1 << 24, 4 * SIZE])
def test_a_frame_that_unpacks_to_more_than_is_due_or_than_it_says(length):
    with pytest.raises(Invalid, match=r"unpacks to|no zstd frame of 1200 bytes"):
        decode(Chunk(0, SIZE, struct.pack("<I", length) + LARGE[4:]), WIRES["packed"], SIZE)


BOMBS = {
    "weights of more numbers than there are bytes": lambda: load(
        header(w={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}) + bytes(8)
    ),
    "a header of 90 MB": lambda: load((90_000_000).to_bytes(8, "little") + b"{}"),
    "a window of a larger vector": lambda: decode(Chunk(0, 2**40, b"", b""), (), SIZE),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_claims_more_than_there_is_takes_no_memory_for_it(bomb):
    tracemalloc.start()
    try:
        with pytest.raises((Invalid, Corrupt)):
            BOMBS[bomb]()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10
