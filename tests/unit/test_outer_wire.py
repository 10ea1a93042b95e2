"""Chunks on the wire: what comes back, how far off, and what is refused from another party."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from atoll.errors import Invalid, TaskFailed
from atoll.outer.wire import BLOCK, CHUNK, Chunk, decode, encode, encoded_bytes
from atoll.spec.plan import Transform

INT8 = (Transform(kind="int8"),)
SIZES = [1, BLOCK, BLOCK + 1, CHUNK, CHUNK + BLOCK, 2 * CHUNK + 5]


def clip(value):
    return (Transform(kind="clip", value=value),)


def noise(size, scale=1.0):
    return (scale * np.random.default_rng(size).normal(size=size)).astype(np.float32)


def there_and_back(vector, transforms=()):
    names = tuple(transform.kind for transform in transforms)
    decoded = [decode(chunk, names, vector.size) for chunk in encode(vector, transforms)]
    return np.concatenate(decoded) if decoded else np.empty(0, np.float32)


def within_half_a_step(vector, decoded):
    """The bound that `encode` states, block by block."""
    for start in range(0, vector.size, BLOCK):
        block = vector[start : start + BLOCK].astype(np.float64)
        step = max(np.abs(block).max() / 127, 2.0**-126)
        if np.abs(decoded[start : start + BLOCK] - block).max() > 0.5001 * step:
            return False
    return True


@pytest.mark.parametrize("size", [0, *SIZES])
def test_float32_comes_back_bit_for_bit(size):
    vector = noise(size)
    np.testing.assert_array_equal(there_and_back(vector), vector)


def test_float32_chunks_are_views_of_the_vector():
    vector = noise(CHUNK + 3)
    chunks = list(encode(vector, ()))
    assert all(np.shares_memory(np.frombuffer(chunk.data, np.float32), vector) for chunk in chunks)
    assert np.shares_memory(decode(chunks[1], (), vector.size), vector)


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_within_half_a_step(size):
    vector = noise(size, 0.01)
    decoded = there_and_back(vector, INT8)
    assert decoded.dtype == np.float32
    assert within_half_a_step(vector, decoded)
    assert not np.array_equal(decoded, vector) or size == 1


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.integers(1, 40), elements=FLOATS))
def test_int8_is_within_half_a_step_for_any_finite_floats(vector):
    assert within_half_a_step(vector, there_and_back(vector, INT8))


@pytest.mark.parametrize("value", [np.finfo(np.float32).max, 2.0**-126, 190 * 2.0**-149, 2.0**-149])
def test_int8_is_within_half_a_step_at_the_ends_of_float32(value):
    vector = np.array([value, -value, value / 3], np.float32)
    assert within_half_a_step(vector, there_and_back(vector, INT8))


def test_int8_keeps_zero_exactly():
    vector = noise(2 * BLOCK)
    vector[:BLOCK] = 0
    vector[BLOCK + 7] = 0
    decoded = there_and_back(vector, INT8)
    assert not decoded[:BLOCK].any()
    assert decoded[BLOCK + 7] == 0


def test_int8_rounds_half_to_even():
    vector = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5], np.float32)  # step 1
    np.testing.assert_array_equal(there_and_back(vector, INT8), [127, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_about_a_quarter_of_the_bytes_as_counted(size):
    chunks = list(encode(noise(size), INT8))
    assert sum(len(chunk.data) + len(chunk.scales) for chunk in chunks) == encoded_bytes(size, ("int8",))
    assert sum(len(chunk.data) for chunk in encode(noise(size), ())) == encoded_bytes(size, ("clip",)) == 4 * size


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
@pytest.mark.parametrize("transforms", [(), clip(1.0), INT8])
def test_an_update_that_is_not_finite_is_refused_before_the_first_chunk(bad, transforms):
    vector = noise(CHUNK + 9)
    vector[CHUNK + 4] = bad
    with pytest.raises(TaskFailed, match=rf"at element {CHUNK + 4}: the update is not finite"):
        encode(vector, transforms)


def test_only_flat_float32_is_encoded():
    with pytest.raises(Invalid, match="flat float32"):
        encode(np.zeros((2, 2), np.float32), ())
    with pytest.raises(Invalid, match="float64"):
        encode(np.zeros(4), ())


def test_transforms_are_known_and_int8_comes_last():
    with pytest.raises(Invalid, match="nothing can follow int8"):
        encode(noise(4), INT8 + clip(1.0))
    with pytest.raises(Invalid, match="'zip'"):
        decode(next(encode(noise(4), ())), ("zip",), 4)


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
        ({"data": b"\x80" * (BLOCK + 1)}, "-128"),
    ],
)
def test_a_wrong_int8_chunk_is_refused_by_name_of_the_field(change, words):
    good = list(encode(noise(SIZE), INT8))[1]
    assert decode(good, ("int8",), SIZE).size == BLOCK + 1
    with pytest.raises(Invalid, match=words):
        decode(dataclasses.replace(good, **change), ("int8",), SIZE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_float32_from_another_party_must_be_finite(bad):
    with pytest.raises(Invalid, match="not finite"):
        decode(Chunk(0, 2, np.array([1, bad], "<f4").tobytes()), (), 2)


def test_float32_has_no_scales():
    with pytest.raises(Invalid, match=r"chunk\.scales: 4 bytes: must be 0"):
        decode(Chunk(0, 1, bytes(4), bytes(4)), (), 1)
