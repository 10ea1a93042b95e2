"""The laws of the wire: on a convex task each transform costs less than its stated share of what training gains.

The task is logistic regression over four sites that disagree, by FedAvg through encode, decode and the hub's round, and
back to the sites as the hub gives its weights out. A model of 600 weights is one chunk and ten blocks of int4.
"""

import functools

import numpy as np
import pytest
import torch

from atoll.outer.advance import Advance
from atoll.outer.down import follow
from atoll.outer.merge import Update
from atoll.outer.optimiser import State
from atoll.outer.wire import decode, encode, feedback, recalls
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform

WIDTH = 600
ROWS = 150
ROUNDS = 100
PERIOD = 5
RATE = 0.5

BFLOAT16, INT8, INT4 = (Transform(kind=kind) for kind in ("bfloat16", "int8", "int4"))
TOPK = Transform(kind="topk", share=0.05)  # 30 of 600 weights a round
ZSTD = Transform(kind="zstd")


def sites():
    """One (x, y) per site: the same truth, shifted for each; columns of very different scale."""
    rng = np.random.default_rng(3)
    truth = rng.normal(size=WIDTH) / np.sqrt(WIDTH)
    scales = rng.uniform(0.1, 2.0, WIDTH)
    for _ in range(4):
        x = rng.normal(size=(ROWS, WIDTH)) * scales
        odds = x @ (truth + 0.5 * rng.normal(size=WIDTH) / np.sqrt(WIDTH))
        yield x, (rng.random(ROWS) < 1 / (1 + np.exp(-4 * odds))).astype(float)


SITES = list(sites())


def gradient(weights, x, y):
    return x.T @ (1 / (1 + np.exp(-(x @ weights))) - y) / len(y) + 1e-2 * weights


def loss(weights):
    x, y = (np.concatenate(parts) for parts in zip(*SITES, strict=True))
    odds = x @ weights.astype(np.float64)
    return float(np.mean(np.logaddexp(0, odds) - y * odds) + 0.5e-2 * weights @ weights)


def through(vector, residual, transforms):
    """Send an update: the chunks that arrive, and the next residual, as a site does it."""
    if not recalls(transforms):
        return list(encode(vector, transforms)), residual
    pairs = list(feedback(vector, residual, transforms))
    return [chunk for chunk, _ in pairs], np.concatenate([lost for _, lost in pairs])


@functools.cache
def trained(*transforms, down=(), late=False):
    """Return the weights after all rounds, which the sites have bit for bit. ``late``: in each round one site by turns
    comes too late to be counted, and keeps the residual of its newest counted update.
    """
    weights, residuals = np.zeros(WIDTH, np.float32), [np.zeros(WIDTH, np.float32) for _ in SITES]
    sync, state = Sync(down=down), State()
    for number in range(ROUNDS):
        updates = []
        for site, (x, y) in enumerate(SITES):
            local = weights.astype(np.float64)
            for _ in range(PERIOD):
                local -= RATE * gradient(local, x, y)
            chunks, lost = through((local - weights).astype(np.float32), residuals[site], transforms)
            if not late or site != number % len(SITES):
                residuals[site] = lost
                arrived = {chunk.offset: decode(chunk, transforms, WIDTH) for chunk in chunks}
                updates.append(Update(f"s{site}", ROWS, arrived.__getitem__))
        made, change = Advance(sync, weights, updates, state), []
        for _ in made.pieces(1, change.append):
            pass
        at_sites, state = follow(weights, *change, down, WIDTH), made.state
        assert at_sites.tobytes() == made.weights.tobytes()
        weights = at_sites
    return weights


def without_feedback(*transforms):
    return tuple(step.model_copy(update={"feedback": False}) if step.lossy else step for step in transforms)


def cost(*transforms, down=(), late=False):
    """Return what the transforms cost, as a share of the loss that training without them gains."""
    start, end = loss(np.zeros(WIDTH, np.float32)), loss(trained(late=late))
    return (loss(trained(*transforms, down=down, late=late)) - end) / (start - end)


def test_training_gains_enough_to_measure_against():
    assert loss(trained()) < 0.2 * loss(np.zeros(WIDTH, np.float32))


BOUNDS = {
    (BFLOAT16,): 1e-4,
    (INT8,): 1e-4,
    (INT4,): 1e-3,
    (TOPK,): 0.03,
    (TOPK, BFLOAT16): 0.03,
    (TOPK, INT8): 0.03,
    (TOPK, INT4): 0.03,
}


@pytest.mark.parametrize("transforms", BOUNDS, ids=lambda steps: "+".join(step.kind for step in steps))
def test_a_lossy_wire_with_feedback_costs_less_than_its_bound(transforms):
    assert not np.array_equal(trained(*transforms), trained())
    assert abs(cost(*transforms)) < BOUNDS[transforms]


DOWNS = {(BFLOAT16,): 1e-4, (INT8,): 1e-4, (INT4,): 1e-3, (TOPK, INT8): 0.03}


@pytest.mark.parametrize("both", [False, True], ids=["down", "both ways"])
@pytest.mark.parametrize("down", DOWNS, ids=lambda steps: "+".join(step.kind for step in steps))
def test_a_lossy_way_down_costs_less_than_its_bound_and_less_than_twice_it_both_ways(down, both):
    up = down if both else ()
    assert not np.array_equal(trained(*up, down=down), trained(*up))
    assert abs(cost(*up, down=down)) < DOWNS[down] * (1 + both)


def test_without_feedback_a_sparse_way_down_costs_many_times_as_much():
    assert cost(down=without_feedback(TOPK, INT8)) > 10 * abs(cost(down=(TOPK, INT8)))


@pytest.mark.parametrize("down", [(INT8,), (INT4,)], ids=["int8", "int4"])
def test_rounding_on_the_way_down_needs_no_feedback_for_all_go_on_from_what_it_made(down):
    assert abs(cost(down=without_feedback(*down))) < DOWNS[down]


def test_int8_both_ways_costs_next_to_nothing_also_without_feedback():
    assert abs(cost(*without_feedback(INT8), down=without_feedback(INT8))) < 2 * BOUNDS[(INT8,)]


@pytest.mark.parametrize("before", [(), (INT8,), (TOPK, INT4)], ids=["float32", "int8", "topk+int4"])
def test_a_lossless_wire_costs_nothing_bit_for_bit(before):
    np.testing.assert_array_equal(trained(*before, ZSTD), trained(*before))


@pytest.mark.parametrize("transforms", [(INT4,), (TOPK,), (TOPK, INT4)], ids=["int4", "topk", "topk+int4"])
def test_without_feedback_a_coarse_wire_costs_many_times_as_much(transforms):
    assert cost(*without_feedback(*transforms)) > 10 * abs(cost(*transforms))


@pytest.mark.parametrize(("transforms", "bound"), [((INT4,), 1e-3), ((TOPK,), 0.05), ((TOPK, INT8), 0.05)])
def test_feedback_holds_its_bound_when_rounds_go_on_without_a_late_site(transforms, bound):
    assert not np.array_equal(trained(*transforms, late=True), trained(*transforms))
    assert abs(cost(*transforms, late=True)) < bound
    assert cost(*without_feedback(*transforms), late=True) > 5 * abs(cost(*transforms, late=True))


def test_bfloat16_on_the_wire_is_as_torch_rounds():
    values = (3 * np.random.default_rng(0).standard_t(3, 4096)).astype(np.float32)
    [chunk] = encode(values, (BFLOAT16,))
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(decode(chunk, (BFLOAT16,), values.size), expected)
