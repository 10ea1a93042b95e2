"""The ring in which updates are masked, the masks, and the shares of their keys."""

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from atoll.errors import Corrupt, Invalid, TaskFailed
from atoll.outer import shares
from atoll.outer.masks import Masks
from atoll.outer.neighbours import neighbours
from atoll.outer.ring import Ring

rng = np.random.default_rng(3)


@pytest.mark.parametrize("terms", [1, 8, 100, 5000])
def test_sums_in_the_ring_are_those_of_the_numbers_to_its_step(terms):
    ring = Ring(terms, 2.0, 100.0)
    values = rng.uniform(-2, 2, (terms, 50)).astype(np.float32)
    values[:, 0], values[:, 1] = 2.0, -2.0  # the most that there may be
    weights = rng.integers(1, 101, terms).astype(float)
    weights[0] = 100.0
    sums = sum((ring.lifted(row, weight) for row, weight in zip(values, weights, strict=True)), np.zeros(50, np.uint32))
    expected = (values.astype(np.float64) * weights[:, None]).sum(0) / 100
    step = 2.0 * terms / (2**31 - 1 - terms)
    assert np.abs(ring.lowered(sums) - expected).max() <= terms * step / 2 + 1e-12


def test_full_weight_of_everybody_stays_within_the_ring():
    ring = Ring(5000, 1.0, 7.0)
    most = ring.lifted(np.ones(1, np.float32), 7.0).astype(np.int64) * 5000
    assert most[0] < 2**31


@pytest.mark.parametrize(
    ("window", "weight", "words"),
    [
        ([3.0], 1.0, "beyond 2"),
        ([-2.1], 1.0, "beyond 2"),
        ([np.nan], 1.0, "beyond 2"),
        ([np.inf], 1.0, "beyond 2"),
        ([0.5], 5.0, "examples: 5 in a round"),
        ([0.5], -1.0, "examples: -1 in a round"),
    ],
)
def test_what_would_not_fit_is_refused(window, weight, words):
    with pytest.raises(TaskFailed, match=words):
        Ring(3, 2.0, 4.0).lifted(np.array(window, np.float32), weight)


def test_more_sites_than_sums_have_bits_for_are_refused():
    with pytest.raises(Invalid, match=r"^sync.wire: mask: 50000 sites are too many"):
        Ring(50_000, 1.0, 1.0)


def test_a_mask_is_the_keystream_of_chacha20_wherever_it_begins():
    key, words = bytes(range(32)), np.zeros(1 << 17, np.uint32)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(words.nbytes))
    Masks([key]).apply(0, words)
    assert words.tobytes() == stream
    apart = np.zeros_like(words)
    for first, last in itertools.pairwise([0, 16, 160, 70_000 // 16 * 16, words.size]):
        Masks([key]).apply(first, apart[first:last])
    assert np.array_equal(words, apart)


def test_what_is_added_is_taken_off_again():
    keys = [bytes([number]) * 32 for number in range(5)]
    words = rng.integers(0, 2**32, 1001, dtype=np.uint32)
    masked = words.copy()
    Masks(keys[:3], keys[3:]).apply(64, masked)
    assert (masked != words).mean() > 0.99
    Masks(keys[3:], keys[:3]).apply(64, masked)
    assert np.array_equal(masked, words)


@pytest.mark.parametrize("offset", [1, 8, 1 << 36, -16])
def test_places_that_no_window_begins_at_are_refused(offset):
    with pytest.raises(Invalid, match=r"^offset: "):
        Masks([bytes(32)]).apply(offset, np.zeros(16, np.uint32))


def test_any_shares_that_are_enough_give_the_secret_and_fewer_none():
    secret = bytes(range(32))
    dealt = shares.split(secret, 3, [1, 2, 5, 9])
    for some in itertools.combinations(dealt, 3):
        assert shares.joined({place: dealt[place] for place in some}, 3) == secret
    with pytest.raises(Corrupt, match=r"^shares: 2 are there, and 3 give a secret back"):
        shares.joined({place: dealt[place] for place in (1, 2)}, 3)
    # Two tell nothing: with another third share they would be of any secret that one likes.
    other = shares.split(bytes(32), 3, [1, 2, 5, 9])
    mixed = {1: dealt[1], 2: dealt[2], 5: other[5]}
    with pytest.raises(Corrupt, match="not of one secret"):  # but once in 2^265 times
        shares.joined(mixed, 3)
    assert shares.split(secret, 3, [1, 2, 5]) != shares.split(secret, 3, [1, 2, 5])


@pytest.mark.parametrize(
    ("secret", "threshold", "places"), [(31, 2, [1, 2]), (32, 3, [1, 2]), (32, 1, [0]), (32, 0, [1])]
)
def test_shares_that_cannot_be_are_refused(secret, threshold, places):
    with pytest.raises(Invalid, match=r"^shares: "):
        shares.split(bytes(secret), threshold, places)


def test_neighbours_are_mutual_as_many_each_and_drawn_by_the_seed():
    sites = [f"s{number}" for number in range(100)]
    near = neighbours(sites, b"seed", 42)
    assert {len(others) for others in near.values()} == {42}
    assert all(site in near[other] and other != site for site in near for other in near[site])
    assert neighbours(list(reversed(sites)), b"seed", 42) == near
    assert neighbours(sites, b"another", 42) != near
    assert neighbours(sites[:4], b"seed", 42)["s0"] == ("s1", "s2", "s3")
