"""Chunks on the wire: what comes back, how far off, and what is refused from another party."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest

from atoll.errors import Invalid, TaskFailed
from atoll.outer.formats import INT8_BLOCK as BLOCK
from atoll.outer.wire import CHUNK, Chunk, decode, encode, encoded_bytes
from atoll.spec.wire import Transform
from tests.unit.vectors import noise

INT8 = (Transform(kind="int8"),)
ZSTD = (Transform(kind="zstd"),)
TOPK = (Transform(kind="topk", share=0.01),)
SIZES = [1, BLOCK, BLOCK + 1, CHUNK, CHUNK + BLOCK, 2 * CHUNK + 5]


def clip(value):
    return (Transform(kind="clip", value=value),)


def there_and_back(vector, transforms=()):
    decoded = [decode(chunk, transforms, vector.size) for chunk in encode(vector, transforms)]
    return np.concatenate(decoded) if decoded else np.empty(0, np.float32)


@pytest.mark.parametrize("size", [0, *SIZES])
def test_float32_comes_back_bit_for_bit(size):
    vector = noise(size)
    np.testing.assert_array_equal(there_and_back(vector), vector)


def test_float32_chunks_are_views_of_the_vector():
    vector = noise(CHUNK + 3)
    chunks = list(encode(vector, ()))
    assert all(np.shares_memory(np.frombuffer(chunk.data, np.float32), vector) for chunk in chunks)
    assert np.shares_memory(decode(chunks[1], (), vector.size), vector)


@pytest.mark.parametrize("size", [0, *SIZES])
def test_a_vector_takes_the_bytes_that_were_counted(size):
    for transforms in ((), clip(1.0), INT8, (Transform(kind="bfloat16"),), (Transform(kind="int4"),)):
        chunks = encode(noise(size), transforms)
        assert sum(len(chunk.data) + len(chunk.scales) for chunk in chunks) == encoded_bytes(size, transforms)
    assert encoded_bytes(size, ()) == 4 * size
    assert encoded_bytes(size, INT8) == size + 4 * math.ceil(size / BLOCK)


@pytest.mark.parametrize("size", [0, *SIZES])
def test_with_topk_or_zstd_it_takes_no_more_than_counted(size):
    for transforms in (TOPK, ZSTD, TOPK + INT8, INT8 + ZSTD, TOPK + INT8 + ZSTD):
        chunks = encode(noise(size), transforms)
        assert sum(len(chunk.data) + len(chunk.scales) for chunk in chunks) <= encoded_bytes(size, transforms)


@pytest.mark.parametrize("level", [None, 1, 3])
@pytest.mark.parametrize("before", [(), INT8, (Transform(kind="bfloat16"),), TOPK, TOPK + INT8])
def test_zstd_changes_no_value(before, level):
    vector = noise(CHUNK + 4097)
    packed = (*before, Transform(kind="zstd", level=level))
    np.testing.assert_array_equal(there_and_back(vector, packed), there_and_back(vector, before))


@pytest.mark.parametrize("wire", [(), INT8, TOPK])
def test_what_was_looked_through_already_is_encoded_the_same(wire):
    vector = noise(CHUNK + 4097)
    kept = [(chunk.offset, bytes(chunk.data), bytes(chunk.scales)) for chunk in encode(vector, wire)]
    assert kept == [
        (chunk.offset, bytes(chunk.data), bytes(chunk.scales)) for chunk in encode(vector, wire, finite=True)
    ]


def test_zstd_makes_what_repeats_small():
    vector = np.zeros(CHUNK, np.float32)
    vector[::64] = 1
    [chunk] = encode(vector, ZSTD)
    assert len(chunk.data) < CHUNK // 20


def test_clip_bounds_the_norm_of_the_whole_vector_and_keeps_its_direction():
    vector = noise(CHUNK + 100)
    clipped = there_and_back(vector, clip(2.0)).astype(np.float64)
    assert 2.0 * (1 - 1e-6) < np.linalg.norm(clipped) <= 2.0
    np.testing.assert_allclose(clipped / vector, clipped[0] / vector[0], rtol=1e-6)


def test_clip_leaves_a_smaller_update_alone():
    vector = noise(100)
    np.testing.assert_array_equal(there_and_back(vector, clip(1e6)), vector)


def test_clip_counts_elements_too_small_for_float32_squares():
    vector = np.full(10_000, 1e-25, np.float32)
    assert np.linalg.norm(there_and_back(vector, clip(1e-24)).astype(np.float64)) <= 1e-24


def test_the_smallest_of_two_clips_holds():
    clipped = there_and_back(noise(100), (*clip(5.0), *clip(0.5)))
    assert np.linalg.norm(clipped.astype(np.float64)) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("transforms", [(), clip(1.0), INT8, TOPK])
def test_an_update_that_is_not_finite_is_refused_before_the_first_chunk(bad, transforms):
    vector = noise(CHUNK + 9).copy()
    vector[CHUNK + 4] = bad
    with pytest.raises(TaskFailed, match=rf"at element {CHUNK + 4}: the update is not finite"):
        encode(vector, transforms)


def test_only_flat_float32_is_encoded():
    with pytest.raises(Invalid, match="flat float32"):
        encode(np.zeros((2, 2), np.float32), ())
    with pytest.raises(Invalid, match="float64"):
        encode(np.zeros(4), ())


def test_an_order_that_cannot_be_carried_out_is_refused_at_both_ends():
    with pytest.raises(Invalid, match="wire: clip cannot follow int8; put clip before int8"):
        encode(noise(4), INT8 + clip(1.0))
    with pytest.raises(Invalid, match="wire: topk cannot follow zstd"):
        decode(next(encode(noise(4), ())), ZSTD + TOPK, 4)


SIZE = CHUNK + BLOCK + 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offset": 1}, "chunk.offset: 1"),
        ({"offset": -CHUNK}, "chunk.offset"),
        ({"offset": 2 * CHUNK}, "chunk.offset"),
        ({"offset": 0.0}, "chunk.offset"),
        ({"offset": "0"}, "chunk.offset: '0'"),
        ({"length": 1}, "chunk.length: 1"),
        ({"length": 10**15}, "chunk.length"),
        ({"length": -1}, "chunk.length"),
        ({"data": b""}, "chunk.data: 0 bytes"),
        ({"data": bytes(SIZE)}, "chunk.data"),
        ({"scales": b""}, "chunk.scales: 0 bytes: must be 8"),
        ({"scales": bytes(12)}, "chunk.scales"),
        ({"scales": np.array([1, np.nan], "<f4").tobytes()}, "outside 0"),
        ({"scales": np.array([1, np.inf], "<f4").tobytes()}, "outside 0"),
        ({"scales": np.array([3e38, 1], "<f4").tobytes()}, "outside 0"),
        ({"scales": np.array([-1, 1], "<f4").tobytes()}, "outside 0"),
        ({"data": b"\x80" * (BLOCK + 1)}, f"chunk at {CHUNK}: data: -128"),
    ],
)
def test_a_wrong_int8_chunk_is_refused_by_name_of_the_field(change, words):
    good = list(encode(noise(SIZE), INT8))[1]
    assert decode(good, INT8, SIZE).size == BLOCK + 1
    with pytest.raises(Invalid, match=words):
        decode(dataclasses.replace(good, **change), INT8, SIZE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_float32_from_another_party_must_be_finite(bad):
    with pytest.raises(Invalid, match="not finite"):
        decode(Chunk(0, 2, np.array([1, bad], "<f4").tobytes()), (), 2)


def test_float32_has_no_scales():
    with pytest.raises(Invalid, match=r"chunk\.scales: 4 bytes: must be 0"):
        decode(Chunk(0, 1, bytes(4), bytes(4)), (), 1)


def framed(length, data):
    return Chunk(0, 100, length.to_bytes(4, "little") + pa.compress(data, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (Chunk(0, 100, b""), "chunk.data: 0 bytes"),
        (Chunk(0, 100, b"\x90\x01"), "unpacks to -1 bytes"),
        (Chunk(0, 100, bytes(4)), "unpacks to 0 bytes where 400 to 400"),
        (framed(1 << 31, bytes(400)), "unpacks to 2147483648 bytes"),
        (framed(400, bytes(1 << 20)), "no zstd frame of 400 bytes"),  # a mebibyte in a few bytes
        (framed(400, bytes(399)), "no zstd frame of 400 bytes"),
        (Chunk(0, 100, (400).to_bytes(4, "little") + b"no frame"), "no zstd frame"),
        (Chunk(0, 100, bytes(1 << 16)), "chunk.data: 65536 bytes"),
    ],
)
def test_a_frame_unpacks_to_the_bytes_that_are_due_or_not_at_all(chunk, words):
    good = next(encode(noise(100), ZSTD))
    assert decode(good, ZSTD, 100).size == 100
    with pytest.raises(Invalid, match=words):
        decode(chunk, ZSTD, 100)
