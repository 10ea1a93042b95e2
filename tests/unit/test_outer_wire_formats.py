"""The number formats and top-k: each within the error that it states, for any finite floats."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from atoll.errors import Invalid
from atoll.outer import sparse
from atoll.outer.formats import FORMATS, INT4_BLOCK, INT8_BLOCK
from atoll.outer.wire import CHUNK, Chunk, decode, encode
from atoll.spec.wire import Transform
from tests.unit import vectors

LARGEST = float(np.finfo(np.float32).max)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NORMAL = st.floats(-10, 10, width=32)
SIZES = [1, 2, INT4_BLOCK, INT4_BLOCK + 1, INT8_BLOCK - 1, INT8_BLOCK, INT8_BLOCK + 1, 5 * INT8_BLOCK + 33]


def noise(size, scale=1.0):
    return vectors.noise(size, size, scale, tails=3)


def back(name, values):
    data, scales = FORMATS[name].pack(values)
    assert (data.nbytes, scales.nbytes) == (
        FORMATS[name].data_bytes(values.size),
        FORMATS[name].scale_bytes(values.size),
    )
    return FORMATS[name].unpack(data.tobytes(), scales.tobytes(), values.size)


def per_block(values, block, steps, widest):
    """Half a step and what rounding adds: the stated bound of a block format, element by element."""
    tops = [np.abs(values[start : start + block]).max() for start in range(0, values.size, block)]
    step = np.maximum(np.array(tops, np.float64) / steps * widest, 2.0**-126)
    return np.repeat(step, block)[: values.size]


STATED = {
    "float32": np.zeros_like,
    "bfloat16": lambda x: np.maximum(np.abs(x.astype(np.float64)) * 2.0**-8, 2.0**-134),
    "int8": lambda x: 0.5001 * per_block(x, INT8_BLOCK, 127, 1),
    "int4": lambda x: 0.51 * per_block(x, INT4_BLOCK, 7, 1 + 2.0**-7),
}


def holds(name, values):
    decoded = back(name, values)
    assert decoded.dtype == np.float32
    assert decoded.shape == values.shape
    assert np.isfinite(decoded).all()
    return bool((np.abs(decoded.astype(np.float64) - values) <= STATED[name](values)).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_a_format_holds_its_stated_error_at_the_ends_of_blocks(name, size):
    assert holds(name, noise(size, 0.01))


@given(arrays(np.float32, st.integers(1, 140), elements=FLOATS))
def test_every_format_holds_its_stated_error_for_any_finite_floats(values):
    assert [name for name in FORMATS if not holds(name, values)] == []


@given(arrays(np.float32, st.integers(1, 140), elements=NORMAL))
def test_every_format_holds_its_stated_error_for_ordinary_floats(values):
    assert [name for name in FORMATS if not holds(name, values)] == []


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [LARGEST, LARGEST * (1 - 2.0**-8), 2.0**-126, 190 * 2.0**-149, 2.0**-149, 2.0**-134])
def test_a_format_holds_its_stated_error_at_the_ends_of_float32(name, value):
    assert holds(name, np.array([value, -value, value / 3, 0], np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_exactly(name):
    values = noise(2 * INT8_BLOCK).copy()
    values[:INT8_BLOCK] = 0
    values[INT8_BLOCK + 7] = 0
    assert not back(name, values)[:INT8_BLOCK].any()
    assert back(name, values)[INT8_BLOCK + 7] == 0


def test_steps_round_half_to_even():
    ties = [0.5, 1.5, 2.5, -0.5, -1.5]
    np.testing.assert_array_equal(back("int8", np.array([127, *ties], np.float32)), [127, 0, 2, 2, 0, -2])
    np.testing.assert_array_equal(back("int4", np.array([7, *ties], np.float32)), [7, 0, 2, 2, 0, -2])
    halfway = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8)], np.float32)
    np.testing.assert_array_equal(back("bfloat16", halfway), [1, 1 + 4 * 2.0**-8, -1])


@pytest.mark.parametrize(
    ("name", "data", "scales", "count", "words"),
    [
        ("float32", np.array([1, np.nan], "<f4"), np.array([], "<f4"), 2, "not finite"),
        ("bfloat16", np.array([0x3F80, 0x7F80], "<u2"), np.array([], "<f4"), 2, "not finite"),
        ("bfloat16", np.array([0xFFC1], "<u2"), np.array([], "<f4"), 1, "not finite"),
        ("int8", np.array([1, -128], np.int8), np.array([1], "<f4"), 2, "-128"),
        ("int8", np.array([1], np.int8), np.array([np.inf], "<f4"), 1, "outside 0"),
        ("int4", np.array([0x18, 0x08], np.uint8), np.array([0x3F80], "<u2"), 4, "half byte of 0"),
        ("int4", np.array([0x80], np.uint8), np.array([0x3F80], "<u2"), 2, "half byte of 0"),
        ("int4", np.array([0x99], np.uint8), np.array([0x3F80], "<u2"), 1, "left over must hold 8"),
        ("int4", np.array([0x88], np.uint8), np.array([0x7F80], "<u2"), 2, "outside 0"),
        ("int4", np.array([0x88], np.uint8), np.array([0x7FC0], "<u2"), 2, "outside 0"),
        ("int4", np.array([0x88], np.uint8), np.array([0xBF80], "<u2"), 2, "outside 0"),
    ],
)
def test_what_no_format_writes_is_refused(name, data, scales, count, words):
    with pytest.raises(Invalid, match=words):
        FORMATS[name].unpack(data.tobytes(), scales.tobytes(), count)


# --- top-k --------------------------------------------------------------------------------------------------------


@given(arrays(np.float32, st.integers(1, 300), elements=FLOATS), st.integers(1, 300))
def test_the_largest_are_kept_and_of_equal_ones_the_first(values, count):
    count = min(count, values.size)
    stable = np.argsort(-np.abs(values.astype(np.float64)), kind="stable")[:count]
    np.testing.assert_array_equal(sparse.largest(values, count), np.sort(stable))


@pytest.mark.parametrize("count", [1, 3_000, CHUNK - 1])
@pytest.mark.parametrize("spread", [0, 30])
def test_the_largest_of_a_whole_chunk_are_kept_however_they_lie(count, spread):
    values = noise(CHUNK) * np.exp(spread * np.linspace(-1, 1, CHUNK, dtype=np.float32) ** 3)
    values[CHUNK // 3 : CHUNK // 2] = 0
    values[::64] = np.random.default_rng(spread).choice([0, 9], size=CHUNK // 64)  # a sample that misleads
    stable = np.argsort(-np.abs(values), kind="stable")[:count]
    np.testing.assert_array_equal(sparse.largest(values, count), np.sort(stable))


@pytest.mark.parametrize(("share", "length", "count"), [(0.01, 1, 1), (0.01, 100, 1), (0.01, 101, 2), (0.3, 10, 3)])
def test_the_share_is_rounded_up(share, length, count):
    assert sparse.kept(share, length) == count


@given(st.integers(1, 40_000), st.sets(st.integers(0, 39_999), min_size=1, max_size=50))
def test_places_come_back(length, chosen):
    places = np.array(sorted({place % length for place in chosen}))
    packed = sparse.pack(places, length)
    assert packed.size <= sparse.bit_bytes(length)
    np.testing.assert_array_equal(sparse.unpack(packed.tobytes(), places.size, length), places)


@pytest.mark.parametrize(("share", "bits"), [(0.0001, 18.5), (0.001, 16), (0.01, 10.3), (0.1, 8.1), (0.5, 2)])
def test_a_place_takes_few_bits(share, bits):
    count = sparse.kept(share, CHUNK)
    packed = sparse.pack(sparse.largest(noise(CHUNK), count), CHUNK)
    assert 8 * packed.size <= bits * count


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (b"", "break off"),
        (b"\x05\x81", "break off"),
        (b"\x05\x81\x80\x80\x01", "too long"),
        (b"\x85\x00", "too long"),  # 5 in two bytes
        (b"\x05", "are not 2 below 100"),
        (b"\x05\x01\x01", "are not 2 below 100"),
        (b"\x05\x5e", "are not 2 below 100"),  # the second at 100
        (bytes(12) + b"\x30", "are not 2 below 100"),  # as bits, past the end
        (bytes(12) + b"\x01", "are not 2 below 100"),
    ],
)
def test_places_that_cannot_be_are_refused(packed, words):
    with pytest.raises(Invalid, match=words):
        sparse.unpack(packed, 2, 100)


def there_and_back(vector, *transforms):
    return np.concatenate([decode(chunk, transforms, vector.size) for chunk in encode(vector, transforms)])


@pytest.mark.parametrize("size", [1, 99, CHUNK + 1, 2 * CHUNK + 50])
def test_topk_is_exact_for_what_it_keeps_and_drops_nothing_larger(size):
    vector, topk = noise(size), Transform(kind="topk", share=0.02)
    decoded = there_and_back(vector, topk)
    for start in range(0, size, CHUNK):
        part, sent = vector[start : start + CHUNK], decoded[start : start + CHUNK]
        places = np.flatnonzero(sent)
        assert places.size == math.ceil(0.02 * part.size)
        np.testing.assert_array_equal(sent[places], part[places])
        assert np.abs(np.delete(part, places)).max(initial=0) <= np.abs(sent[places]).min()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_after_topk_a_format_rounds_what_was_kept(kind):
    vector, topk = noise(CHUNK + 999), Transform(kind="topk", share=0.02)
    kept = there_and_back(vector, topk)
    decoded = there_and_back(vector, topk, Transform(kind=kind))
    assert not decoded[kept == 0].any()
    for start in range(0, vector.size, CHUNK):
        places = start + np.flatnonzero(kept[start : start + CHUNK])
        np.testing.assert_array_equal(decoded[places], back(kind, vector[places]))


@pytest.mark.parametrize(
    "change", [lambda data: b"", lambda data: data[:20], lambda data: data[:-1], lambda data: data + b"\0"]
)
def test_a_sparse_chunk_of_another_length_is_refused(change):
    topk = (Transform(kind="topk", share=0.05),)
    good = bytes(next(encode(noise(100), topk)).data)
    with pytest.raises(Invalid, match="chunk"):
        decode(Chunk(0, 100, change(good)), topk, 100)
