"""Noise: it is normal, of the deviation asked for, never the same twice, and on a clipped update before all else."""

import math

import numpy as np
import pytest

from atoll.errors import Invalid
from atoll.noise import Chance, Noise
from atoll.outer.wire import CHUNK, afterwards, encode, private, reach
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform

COUNT = 400_000
CLIP, NOISE, MASK = Transform(kind="clip", value=2.0), Transform(kind="noise", value=0.5), Transform(kind="mask")
INT8 = Transform(kind="int8")


def phi(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("deviation", [1.0, 1e-4, 300.0])
def test_noise_is_normal_with_the_deviation_asked_for(deviation):
    found = Noise(deviation).take(COUNT) / deviation
    assert abs(found.mean()) < 5 / math.sqrt(COUNT)
    assert abs(found.std() - 1) < 5 / math.sqrt(2 * COUNT)
    for x in (-3.0, -1.0, 0.0, 0.5, 2.0, 3.5):  # at each place within five deviations of what chance does
        share, expected = (found <= x).mean(), phi(x)
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / COUNT)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / math.sqrt(COUNT)
    assert np.abs(found).max() < 8


def test_no_two_have_the_same_noise_and_none_repeats_itself():
    first, second = Noise(1.0), Noise(1.0)
    taken = [first.take(100_003), first.take(7), first.take(100_003), second.take(100_003)]
    assert len(np.unique(np.concatenate(taken))) == 3 * 100_003 + 7


def test_uniform_numbers_fill_the_interval_evenly_and_are_secret():
    found, other = Chance().take(COUNT), Chance().take(COUNT)
    assert found.min() >= 0
    assert found.max() < 1
    shares = np.histogram(found, 20, (0, 1))[0] / COUNT
    assert np.abs(shares - 0.05).max() < 6 * math.sqrt(0.05 * 0.95 / COUNT)
    assert not np.isin(found, other).any()


def windows(vector, wire, parts=1):
    return np.concatenate(list(private(vector, wire, parts)))


def test_a_private_update_is_clipped_and_then_has_noise_on_it():
    vector = np.zeros(3 * CHUNK // 2, np.float32)
    vector[7] = 100.0
    found = windows(vector, (CLIP, NOISE))
    assert found.dtype == np.float32
    assert abs(found[7] - 2.0) < 8 * 0.5 * 2.0
    rest = np.delete(found, 7)
    assert rest.std() == pytest.approx(0.5 * 2.0, rel=0.01)
    assert abs(rest.mean()) < 0.01
    assert not np.array_equal(found, windows(vector, (CLIP, NOISE)))
    assert np.abs(found).max() <= reach((CLIP, NOISE))


@pytest.mark.parametrize("parts", [2, 9])
def test_parts_of_noise_add_up_to_all_of_it(parts):
    vector = np.zeros(CHUNK // 2, np.float32)
    total = sum(windows(vector, (CLIP, NOISE, MASK), parts).astype(np.float64) for _ in range(parts))
    assert total.std() == pytest.approx(0.5 * 2.0, rel=0.01)
    assert reach((CLIP, NOISE, MASK), parts) == pytest.approx(2.0 * (1 + 8 * 0.5 / math.sqrt(parts)))


def test_what_is_left_to_do_to_a_private_update_is_neither_clip_nor_noise():
    assert afterwards((CLIP, NOISE, INT8)) == (INT8,)
    assert afterwards((CLIP, NOISE, MASK)) == (MASK,)
    assert afterwards((CLIP, INT8)) == (CLIP, INT8)
    vector = windows(np.ones(1000, np.float32), (CLIP, NOISE))
    (chunk,) = encode(vector, afterwards((CLIP, NOISE)))
    assert np.array_equal(np.frombuffer(chunk.data, np.float32), vector)


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        ([{"kind": "noise", "value": 1.0}], "noise is a multiple of a clip's bound; put clip before it"),
        ([{"kind": "clip", "value": 1.0}, {"kind": "noise"}], "noise needs a multiple of the clip's bound; set value"),
        ([{"kind": "noise", "value": 1.0}, {"kind": "clip", "value": 1.0}], "clip cannot follow noise"),
        (
            [{"kind": "clip", "value": 1.0}, {"kind": "noise", "value": 1.0}, {"kind": "noise", "value": 1.0}],
            "noise",
        ),
        ([{"kind": "clip", "value": 1.0}, {"kind": "noise", "value": 1.0, "share": 0.5}], "noise takes no share"),
    ],
)
def test_noise_that_cannot_be_is_refused_with_its_mend(wire, words):
    with pytest.raises((ValueError, Invalid), match=words):
        Sync.model_validate({"merge": "mean", "wire": wire})


@pytest.mark.parametrize(
    ("sync", "words"),
    [
        ({"merge": "weighted_mean"}, "noise is for sites that count alike"),
        ({"merge": "mean", "control": True, "keep_optimiser": True}, "control"),
        ({"merge": "mean", "down": [{"kind": "noise", "value": 1.0}]}, "down: noise|noise is a multiple"),
    ],
)
def test_what_noise_does_not_go_with_is_refused(sync, words):
    wire = [CLIP.model_dump(), NOISE.model_dump()]
    with pytest.raises(ValueError, match=words):
        Sync.model_validate({"wire": wire, **sync})


def test_the_noise_of_a_masked_round_is_cut_into_as_many_parts_as_its_sum_has_at_least():
    masked = {"merge": "mean", "wire": [CLIP.model_dump(), NOISE.model_dump(), MASK.model_dump()]}
    assert Sync.model_validate(masked).parts(7) == 7
    assert Sync.model_validate({**masked, "wait": {"kind": "quorum", "count": 4}}).parts(7) == 4
    assert Sync.model_validate({"merge": "mean", "wire": [CLIP.model_dump(), NOISE.model_dump()]}).parts(7) == 1
