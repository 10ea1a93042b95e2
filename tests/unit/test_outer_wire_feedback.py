"""Error feedback: what an update loses on the wire is what the next one brings."""

import math

import numpy as np
import pytest

from atoll.errors import Invalid, TaskFailed
from atoll.outer.wire import CHUNK, decode, encode, feedback, recalls
from atoll.spec.wire import Transform
from tests.unit import vectors

SIZE = CHUNK + 2_049
CLIP = Transform(kind="clip", value=3.0)
TOPK = Transform(kind="topk", share=0.01)
INT8, INT4 = Transform(kind="int8"), Transform(kind="int4")
ZSTD = Transform(kind="zstd")
NONE = np.zeros(SIZE, np.float32)


def noise(seed, scale=1.0):
    return vectors.noise(SIZE, seed, scale, tails=4)


def sent_and_lost(update, residual, *transforms):
    sent, lost = np.empty(update.size, np.float32), np.empty(update.size, np.float32)
    for chunk, window in feedback(update, residual, transforms):
        place = slice(chunk.offset, chunk.offset + chunk.length)
        sent[place], lost[place] = decode(chunk, transforms, update.size), window
    return sent, lost


def without(transform):
    return transform.model_copy(update={"feedback": False})


LOSSY = [(TOPK,), (INT8,), (INT4,), (Transform(kind="bfloat16"),), (TOPK, INT4), (INT4, ZSTD), (TOPK, INT8, ZSTD)]


@pytest.mark.parametrize("transforms", LOSSY)
def test_what_was_sent_and_what_was_lost_are_the_corrected_update(transforms):
    update, residual = noise(1), noise(2, 0.1)
    sent, lost = sent_and_lost(update, residual, *transforms)
    np.testing.assert_allclose(sent + lost, update + residual, rtol=0, atol=1e-6)
    assert lost.any()


def test_over_rounds_nothing_is_lost_for_good():
    """The sum of what arrived is the sum of what was computed, less one residual: also where each round drops 99 %."""
    residual, computed, arrived = NONE, np.zeros(SIZE), np.zeros(SIZE)
    for seed in range(8):
        update = noise(seed)
        sent, residual = sent_and_lost(update, residual, TOPK, INT4)
        computed += update
        arrived += sent
    np.testing.assert_allclose(arrived + residual, computed, atol=1e-3)
    assert not np.allclose(arrived, computed, atol=1e-3)


def test_the_first_round_is_as_without_feedback():
    chunks = [bytes(chunk.data) for chunk, _ in feedback(noise(1), NONE, (TOPK, INT8))]
    assert chunks == [bytes(chunk.data) for chunk in encode(noise(1), (TOPK, INT8))]


def test_the_same_update_is_encoded_to_the_same_bytes_and_leaves_its_arguments_alone():
    update, residual = noise(1).copy(), noise(2).copy()
    first = [(bytes(chunk.data), bytes(lost)) for chunk, lost in feedback(update, residual, (CLIP, TOPK, INT4, ZSTD))]
    again = [(bytes(chunk.data), bytes(lost)) for chunk, lost in feedback(update, residual, (CLIP, TOPK, INT4, ZSTD))]
    assert first == again
    np.testing.assert_array_equal(update, noise(1))
    np.testing.assert_array_equal(residual, noise(2))


def test_clip_bounds_what_leaves_and_what_it_cuts_off_is_not_fed_back():
    update, residual = noise(1), noise(2, 10)
    sent, lost = sent_and_lost(update, residual, CLIP, TOPK)
    assert np.linalg.norm(sent.astype(np.float64)) <= 3.0
    corrected = (update + residual).astype(np.float64)
    clipped = corrected * 3.0 / np.linalg.norm(corrected)
    np.testing.assert_allclose(sent + lost, clipped, atol=1e-5)


def test_only_transforms_with_feedback_are_recalled():
    update = noise(1)
    kept, _ = sent_and_lost(update, NONE, TOPK)
    sent, rounding = sent_and_lost(update, NONE, without(TOPK), INT4)
    np.testing.assert_array_equal(rounding, np.where(kept != 0, update - sent, 0))
    _, dropped = sent_and_lost(update, NONE, TOPK, without(INT4))
    np.testing.assert_array_equal(dropped, np.where(kept != 0, 0, update))


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ((), False),
        ((CLIP, ZSTD), False),
        ((INT8,), True),
        ((without(INT8),), False),
        ((TOPK, without(INT8)), True),
        ((without(TOPK), INT8), True),
    ],
)
def test_a_site_remembers_only_where_something_is_lost_and_fed_back(transforms, expected):
    assert recalls(transforms) is expected


def test_an_empty_update_has_no_chunks():
    assert not list(feedback(NONE[:0], NONE[:0], (INT8,)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_refused_before_its_chunk(bad):
    residual = noise(1).copy()
    residual[CHUNK + 4] = bad
    chunks = feedback(noise(2), residual, (INT8,))
    assert next(chunks)[0].offset == 0
    with pytest.raises(TaskFailed, match=f"at element {CHUNK + 4}: the update is not finite"):
        next(chunks)
    with pytest.raises(TaskFailed, match=f"at element {CHUNK + 4}: the update is not finite"):
        feedback(noise(2), residual, (CLIP, INT8))
    huge = np.full(SIZE, 3e38, np.float32)
    with pytest.raises(TaskFailed, match="inf at element 0"):
        next(feedback(huge, huge, (INT8,)))


def test_a_residual_of_another_model_is_refused():
    with pytest.raises(Invalid, match="residual: 3 elements"):
        feedback(noise(1), NONE[:3], (INT8,))
    with pytest.raises(Invalid, match="residual: float64"):
        feedback(noise(1), np.zeros(SIZE), (INT8,))
