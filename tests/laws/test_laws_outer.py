"""The laws of the outer space: named algorithms are points of it, and neighbouring points agree.

The task is least squares over four shards; `train` is the smallest round loop that the outer plane allows.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.outer.merge import Sum, Update, merge, stale
from atoll.outer.optimiser import State, pseudo_gradient, step
from atoll.outer.robust import judged
from atoll.outer.wire import CHUNK, decode, encode
from atoll.spec.presets import PRESETS
from atoll.spec.sync import Outer, Sync, Wait
from atoll.spec.wire import Transform

RATE = 0.05
STEPS = 24
WIDTH = 8


class Sgd:
    def step(self, weights, gradient):
        return weights - RATE * gradient


class Adam:
    def __init__(self):
        self.first, self.second, self.number = 0.0, 0.0, 0

    def step(self, weights, gradient):
        self.number += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        size = np.sqrt(self.second / (1 - 0.999**self.number)) + 1e-8
        return weights - RATE * self.first / (1 - 0.9**self.number) / size


def shards(sizes):
    """One (x, y) per site, from the same truth but shifted, so that the sites disagree."""
    rng = np.random.default_rng(7)
    truth = rng.normal(size=WIDTH)
    for site, size in enumerate(sizes):
        x = rng.normal(size=(size, WIDTH))
        yield x, x @ (truth + 0.2 * rng.normal(size=WIDTH) * (site + 1)) + 0.1 * rng.normal(size=size)


EQUAL = list(shards([16, 16, 16, 16]))
UNEQUAL = list(shards([12, 31, 7, 20]))
FIVE = list(shards([12, 31, 7, 20, 9]))


def gradient(weights, shard):
    x, y = shard
    return 2 * x.T @ (x @ weights - y) / len(y)


def pooled(data):
    return np.concatenate([x for x, _ in data]), np.concatenate([y for _, y in data])


def loss(weights, data):
    x, y = pooled(data)
    return float(np.mean((x @ weights - y) ** 2))


def local(sync, start, shard, optimiser):
    """What a site's workers give: the mean gradient at `start`, or new - start after `period` steps."""
    if sync.exchange == "gradient":
        return gradient(start, shard).astype(np.float32)
    weights = start.astype(np.float64)
    for _ in range(sync.period):
        weights = optimiser.step(weights, gradient(weights, shard) + sync.proximal * (weights - start))
    return (weights - start).astype(np.float32)


def update(sync, site, vector, examples, behind):
    """What the hub keeps of a site's update: encoded there, decoded here."""
    windows = {chunk.offset: decode(chunk, sync.wire, vector.size) for chunk in encode(vector, sync.wire)}
    return Update(site, examples, windows.__getitem__, stale(1.0, behind, sync.wait.staleness))


def train(sync, data=EQUAL, make=Sgd, steps=STEPS, order=None):
    """Run rounds until each site has taken about `steps` steps; a site gets new weights when its update is merged."""
    order = list(order or range(len(data)))
    enough = sync.wait.count or len(data)
    weights, state, version = np.zeros(WIDTH, np.float32), State(), 0
    held = {site: (0, weights, make()) for site in order}
    waiting = {}
    for site in itertools.islice(itertools.cycle(order), len(order) * steps // sync.period):
        base, start, optimiser = held[site]
        vector = local(sync, start, data[site], optimiser)
        waiting[site] = update(sync, f"s{site}", vector, len(data[site][1]), version - base)
        if len(waiting) == enough:
            seen = judged(sync, WIDTH, list(waiting.values()))
            merged = merge(seen.rule, WIDTH, seen.updates, sync.trim)
            weights, state = step(sync.outer, weights, pseudo_gradient(sync.exchange, merged), state)
            version += 1
            for done in waiting:
                held[done] = (version, weights, held[done][2] if sync.keep_optimiser else make())
            waiting = {}
    return weights


def centralised(data, make_torch, steps=STEPS):
    """The same steps by one process of torch on the pooled rows."""
    x, y = (torch.tensor(array, dtype=torch.float32) for array in pooled(data))
    weights = torch.nn.Parameter(torch.zeros(WIDTH))
    optimiser = make_torch([weights])
    for _ in range(steps):
        optimiser.zero_grad()
        torch.mean((x @ weights - y) ** 2).backward()
        optimiser.step()
    return weights.detach().numpy()


def exchanging(**outer):
    return Sync(exchange="gradient", outer=Outer(rate=RATE, **outer))


def same(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


TORCHS = {
    "sgd": (Outer(rate=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (Outer(rate=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        Outer(rate=0.7, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
    ),
    "adam": (Outer(kind="adam", rate=0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
    "adam of other betas": (
        Outer(kind="adam", rate=0.05, beta1=0.5, beta2=0.9, epsilon=0.1),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), eps=0.1),
    ),
    "adagrad": (
        Outer(kind="adagrad", rate=0.1, beta1=0.0, epsilon=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3),
    ),
}


@pytest.mark.parametrize("kind", TORCHS)
def test_an_outer_optimiser_is_torchs_of_that_name_over_twenty_gradients(kind):
    outer, make = TORCHS[kind]
    start, *gradients = np.random.default_rng(0).normal(size=(21, 30)).astype(np.float32)
    weights, state = start, State()
    expected = torch.nn.Parameter(torch.tensor(start))
    optimiser = make([expected])
    for gradient in gradients:
        weights, state = step(outer, weights, gradient, state)
        expected.grad = torch.tensor(gradient)
        optimiser.step()
    np.testing.assert_allclose(weights, expected.detach().numpy(), rtol=2e-6, atol=2e-6)


def test_data_parallel_equals_centralised_sgd():
    sync = Sync.model_validate({"preset": "data_parallel", "outer": {"rate": RATE}})
    same(train(sync, UNEQUAL), centralised(UNEQUAL, lambda p: torch.optim.SGD(p, lr=RATE)))


def test_exchanged_gradients_with_adam_equal_centralised_adam():
    same(train(exchanging(kind="adam"), UNEQUAL), centralised(UNEQUAL, lambda p: torch.optim.Adam(p, lr=RATE)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_exchanged_gradients_with_momentum_equal_centralised_momentum(nesterov):
    def make(parameters):
        return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, nesterov=nesterov)

    same(train(exchanging(momentum=0.9, nesterov=nesterov), UNEQUAL), centralised(UNEQUAL, make))


@pytest.mark.parametrize("period", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("make", [Sgd, Adam])
def test_diloco_with_rate_one_and_no_momentum_equals_fedavg_bit_for_bit(period, make):
    plain = {"period": period, "outer": {"rate": 1.0, "momentum": 0.0, "nesterov": False}, "keep_optimiser": False}
    diloco = Sync.model_validate({"preset": "diloco", **plain})
    fedavg = Sync.model_validate({"preset": "fedavg", "period": period})  # weighted, and the sites are equal
    np.testing.assert_array_equal(train(diloco, make=make), train(fedavg, make=make))


def test_fedavg_averages_the_sites_weights():
    sync, start = Sync(period=STEPS), np.zeros(WIDTH, np.float32)
    new = [local(sync, start, shard, Sgd()) for shard in UNEQUAL]
    same(train(sync, UNEQUAL), np.average(new, axis=0, weights=[len(y) for _, y in UNEQUAL]))


def test_fedavg_of_period_one_equals_data_parallel_for_sgd():
    same(train(Sync(period=1), UNEQUAL), train(exchanging(), UNEQUAL))


def test_fedavg_of_period_one_is_not_data_parallel_for_adam():
    kept = Sync(period=1, keep_optimiser=True)
    assert np.abs(train(kept, UNEQUAL, Adam) - train(exchanging(kind="adam"), UNEQUAL)).max() > 1e-3


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "diloco", "data_parallel"])
def test_a_buffer_of_everyone_equals_synchronous_bit_for_bit(name):
    sync = Sync.model_validate({"preset": name, "period": 2})
    buffered = sync.model_copy(update={"wait": Wait(kind="buffer", count=4)})
    np.testing.assert_array_equal(train(buffered), train(sync))


def test_a_smaller_buffer_is_not_synchronous_and_still_learns():
    buffered = train(Sync(period=2, wait=Wait(kind="buffer", count=3)))
    assert np.abs(buffered - train(Sync(period=2))).max() > 1e-3
    assert loss(buffered, EQUAL) < 0.5 * loss(np.zeros(WIDTH), EQUAL)


def test_fedprox_with_mu_zero_equals_fedavg_bit_for_bit():
    fedprox = Sync.model_validate({"preset": "fedprox", "proximal": 0.0, "period": 6})
    np.testing.assert_array_equal(train(fedprox), train(Sync(period=6)))
    pulled = Sync.model_validate({"preset": "fedprox", "proximal": 1.0, "period": 6})
    assert np.abs(train(pulled) - train(Sync(period=6))).max() > 1e-3


def test_weighted_mean_equals_mean_for_equal_weights():
    np.testing.assert_array_equal(train(Sync(period=3, merge="weighted_mean")), train(Sync(period=3, merge="mean")))
    odd = list(shards([15, 15, 15, 15]))  # not a power of two: division may round the last bit
    same(train(Sync(period=3, merge="weighted_mean"), odd), train(Sync(period=3, merge="mean"), odd))


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
def test_robust_merges_stay_among_the_honest_whatever_one_site_sends(rule):
    honest = np.random.default_rng(1).normal(size=(4, WIDTH)).astype(np.float32)
    for wild in (-3e38, -1.0, 0.0, 1e6, 3e38):
        vectors = [*honest, np.full(WIDTH, wild, np.float32)]
        updates = [update(Sync(), f"s{i}", vector, 16, 0) for i, vector in enumerate(vectors)]
        merged = merge(rule, WIDTH, updates, trim=0.2)
        assert (honest.min(axis=0) <= merged).all()
        assert (merged <= honest.max(axis=0)).all()


ROBUST = {
    "median": {"merge": "median"},
    "trimmed_mean": {"merge": "trimmed_mean", "trim": 0.2},
    "multi_krum": {"merge": "multi_krum", "hostile": 1},
    "geometric_median": {"merge": "geometric_median"},
    "bound": {"merge": "mean", "bound": {"times": 1.0}},
}


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_training_reaches_the_loss_of_the_honest_despite_one_wild_site(rule):
    x, y = EQUAL[0]
    wild = [*EQUAL, (x, 1e4 * y)]
    sync = Sync.model_validate({"period": 4, **ROBUST[rule]})
    floor, start = loss(train(Sync(period=4)), EQUAL), loss(np.zeros(WIDTH), EQUAL)
    assert loss(train(sync, wild), EQUAL) - floor < 0.1 * (start - floor)
    assert loss(train(Sync(period=4), wild), EQUAL) > 100 * start


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedyogi", "diloco", "data_parallel"])
@pytest.mark.parametrize("rule", ["mean", "weighted_mean", *ROBUST])
def test_training_is_bit_equal_under_any_order_of_sites(name, rule):
    sync = Sync.model_validate({"preset": name, "period": 3, **ROBUST.get(rule, {"merge": rule})})
    expected = train(sync, FIVE)
    for order in ((3, 2, 4, 1, 0), (1, 3, 0, 4, 2)):
        np.testing.assert_array_equal(train(sync, FIVE, order=order), expected)


SIZE = CHUNK + 40
SENT = [(np.random.default_rng(i).normal(size=SIZE) * 10.0 ** (4.5 * i - 6)).astype(np.float32) for i in range(5)]
WEIGHTS = [0.1, 12.0, 7.0, 1e4, 1 / 3]


def summed(pieces):
    total = Sum(SIZE)
    for site, offset, length in pieces:
        total.add(offset, SENT[site][offset : offset + length], WEIGHTS[site])
    return total.mean(sum(WEIGHTS))


GRID = [(site, offset, length) for site in range(5) for offset, length in ((0, CHUNK), (CHUNK, 16), (CHUNK + 16, 24))]
IN_ORDER = summed(GRID)


@given(st.permutations(GRID))
def test_a_sum_is_bit_equal_under_any_interleaving_of_sites_and_chunks(pieces):
    np.testing.assert_array_equal(summed(pieces), IN_ORDER)


@given(st.permutations(range(5)), st.sampled_from(["mean", "weighted_mean", "median", "trimmed_mean"]))
def test_a_merge_is_bit_equal_under_any_permutation_of_sites(order, rule):
    updates = [update(Sync(), f"s{i}", SENT[i][:999], WEIGHTS[i], i) for i in range(5)]
    expected = merge(rule, 999, updates, 0.2)
    np.testing.assert_array_equal(merge(rule, 999, [updates[i] for i in order], 0.2), expected)


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "diloco", "data_parallel"])
def test_an_int8_wire_costs_less_than_a_thousandth_of_the_loss_gained(name):
    plain = Sync.model_validate({"preset": name, "period": 4, "keep_optimiser": False})
    int8 = plain.model_copy(update={"wire": (Transform(kind="int8"),)})
    gained = loss(np.zeros(WIDTH), EQUAL) - loss(train(plain), EQUAL)
    assert not np.array_equal(train(int8), train(plain))
    assert abs(loss(train(int8), EQUAL) - loss(train(plain), EQUAL)) < 1e-3 * gained


def test_a_clip_with_a_huge_bound_equals_no_clip_bit_for_bit():
    huge, small = (Sync(period=4, wire=(Transform(kind="clip", value=value),)) for value in (1e9, 0.01))
    np.testing.assert_array_equal(train(huge), train(Sync(period=4)))
    assert np.linalg.norm(train(small)) <= 0.01 * STEPS / 4 * (1 + 1e-6)


def test_runs_are_repeatable_bit_for_bit():
    sync = Sync.model_validate({"preset": "fedyogi", "period": 3, "wire": [{"kind": "int8"}]})
    np.testing.assert_array_equal(train(sync, UNEQUAL), train(sync, UNEQUAL))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_lowers_the_loss(name):
    sync = Sync.model_validate(name)
    assert loss(train(sync, UNEQUAL, steps=500), UNEQUAL) < 0.5 * loss(np.zeros(WIDTH), UNEQUAL)
