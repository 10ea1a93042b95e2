"""The laws of control variates: SCAFFOLD (Karimireddy et al., 2020) as a point of the outer space.

Sites train by real rounds of torch, and the hub's step is the outer plane's own; what lies between them is left out.
"""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.inner.control import read_control
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import parallelize
from atoll.inner.round import Round
from atoll.inner.vector import read_vector, save_vector, signature_of
from atoll.outer.advance import Advance
from atoll.outer.merge import Update
from atoll.outer.optimiser import State
from atoll.outer.wire import CHUNK
from atoll.spec.job import Optimiser
from atoll.spec.model import with_control
from atoll.spec.order import Train
from atoll.spec.sync import Sync
from tests.opening import opening

WIDTH, RATE, PERIOD = 6, 0.05, 10


class LeastSquares:
    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])


def shard(seed):
    """One site's rows: each has a truth of its own, and sees mostly directions of its own, so that sites pull apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, WIDTH)) * np.geomspace(0.2, 2.0, WIDTH)[rng.permutation(WIDTH)]
    y = x @ rng.normal(size=WIDTH) * 2
    return {"x": torch.tensor(x, dtype=torch.float32), "y": torch.tensor(y, dtype=torch.float32)}


SHARDS = {f"s{seed}": shard(seed) for seed in range(4)}


def linear():
    torch.manual_seed(0)
    return nn.Linear(WIDTH, 1, bias=False)


class Federation:
    """Sites that each take ``period`` steps a round on all their rows, and what the hub holds."""

    def __init__(self, home, shards=SHARDS, **sync):
        self.home, self.shards = home, shards
        self.sync = Sync.model_validate(sync)
        model = linear()
        plain = signature_of(model)
        self.signature = with_control(plain) if self.sync.control else plain
        first = read_vector(model, plain)
        self.vector = np.concatenate([first, np.zeros_like(first)]) if self.sync.control else first
        self.state, self.version, self.counted, self.optimiser = State(), 0, {}, "sgd"

    def round(self, *absent):
        """Train a round at all sites, and merge without those that are ``absent``."""
        updates = {site: self.train(site) for site in self.shards}
        merged = [Update(s, 1.0, lambda at, v=v: v[at : at + CHUNK]) for s, v in updates.items() if s not in absent]
        step = Advance(self.sync, self.vector, merged, self.state, len(merged) / len(self.shards))
        assert sum(piece.size for piece in step.pieces()) == self.vector.size
        self.vector, self.state, self.version = step.weights, step.state, self.version + 1
        self.counted |= {site: self.control(site, self.version - 1) for site in self.shards if site not in absent}

    def train(self, site):
        weights = self.home / "weights.f32"
        save_vector(self.vector, weights)
        order = Train(
            seed=3,
            weights=str(weights),
            signature=self.signature,
            output=str(self.home / "unused"),
            control_in=str(self.counted[site]) if site in self.counted else None,
            control_out=str(self.control(site, self.version)) if self.sync.control else None,
            done=self.version * self.sync.period,
            steps=self.sync.period,
            batch=40,
            optimiser=Optimiser(kind=self.optimiser, rate=RATE),
            sync=self.sync,
        )
        work = Round(opening(self.home), order, LeastSquares(), parallelize(linear(), Mesh()))
        assert len(list(work.steps(lambda first: [self.shards[site]] * self.sync.period))) == self.sync.period
        work.keep_state()
        return work.update()

    def control(self, site, version):
        return self.home / f"{site}-{version}.safetensors"

    def trained(self, rounds):
        for _ in range(rounds):
            self.round()
        return self

    @property
    def weights(self):
        return self.vector[:WIDTH]

    def excess(self):
        """How far the mean loss over the sites is above the lowest there is."""
        x, y = (torch.cat([rows[name] for rows in self.shards.values()]).double().numpy() for name in "xy")
        best = np.linalg.lstsq(x, y, rcond=None)[0]
        return float(np.mean((x @ self.weights - y) ** 2) - np.mean((x @ best - y) ** 2))


SCAFFOLD = {"preset": "scaffold", "period": PERIOD}
FEDAVG = {"preset": "fedavg", "period": PERIOD, "merge": "mean"}


def test_one_site_and_one_step_is_plain_sgd(tmp_path):
    one = {"s0": SHARDS["s0"]}
    made = Federation(tmp_path, one, **{**SCAFFOLD, "period": 1}).trained(20)
    model = linear()
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(20):
        optimiser.zero_grad()
        LeastSquares().loss(model, SHARDS["s0"]).backward()
        optimiser.step()
    np.testing.assert_allclose(made.weights, read_vector(model, signature_of(model)), rtol=1e-5, atol=1e-6)


def test_without_control_it_is_fedavg_in_the_first_round_and_not_in_the_second(tmp_path):
    """All control variates begin at nothing."""
    scaffold, fedavg = Federation(tmp_path, **SCAFFOLD).trained(1), Federation(tmp_path, **FEDAVG).trained(1)
    np.testing.assert_array_equal(scaffold.weights, fedavg.weights)
    assert np.abs(scaffold.trained(1).weights - fedavg.trained(1).weights).max() > 1e-3


def test_where_sites_differ_scaffold_comes_a_hundred_times_nearer_than_fedavg_in_as_many_rounds(tmp_path):
    """FedAvg ends where the sites' drifts balance; SCAFFOLD, with the drift taken out, at the optimum of all rows."""
    fedavg = Federation(tmp_path, **FEDAVG).trained(60).excess()
    scaffold = Federation(tmp_path, **SCAFFOLD).trained(60).excess()
    assert fedavg > 0.01  # the sites do differ
    assert scaffold < fedavg / 100


def test_with_plain_sgd_the_mean_gradient_is_the_papers_option_two(tmp_path):
    made = Federation(tmp_path, **SCAFFOLD).trained(2)
    start, common = made.vector[:WIDTH].copy(), made.vector[WIDTH:].copy()
    own = read_control(made.counted["s1"], WIDTH)
    update = made.train("s1")
    after = read_control(made.control("s1", made.version), WIDTH)
    np.testing.assert_allclose(after, own - common - update[:WIDTH] / (PERIOD * RATE), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(update[WIDTH:], after - own, rtol=1e-5, atol=1e-6)
    assert np.abs(start).max() > 0.1


@pytest.mark.parametrize("absent", [[], ["s2"], ["s0", "s3"]])
def test_the_hubs_control_is_the_mean_of_what_it_counted_whoever_was_left_out(tmp_path, absent):
    made = Federation(tmp_path, **SCAFFOLD)
    made.round()
    made.round(*absent)
    made.round("s1")
    made.round()
    own = np.mean([read_control(made.counted[site], WIDTH) for site in made.shards], axis=0)
    np.testing.assert_allclose(made.vector[WIDTH:], own, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_holds_for_an_adaptive_inner_optimiser_too(tmp_path):
    """No option of the paper's: c_i is the mean gradient, whatever the optimiser makes of it."""
    found = {}
    for name, sync in (("fedavg", FEDAVG), ("scaffold", SCAFFOLD)):
        made = Federation(tmp_path, **sync)
        made.optimiser = "adam"
        found[name] = made.trained(80).excess()
    assert found["scaffold"] < found["fedavg"] / 2
