"""Laws of fragments and delay: streaming rounds against rounds of the whole model, and against being interrupted.

Sites are rounds in this very process, a new one for each order, so that nothing but files outlives it; the hub is the
outer step alone.
"""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import Corrupt
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import parallelize
from atoll.inner.round import Round
from atoll.inner.vector import read_vector, save_vector, signature_of
from atoll.outer.advance import Advance
from atoll.outer.merge import Update
from atoll.outer.optimiser import State
from atoll.outer.wire import CHUNK
from atoll.spec import order as orders
from atoll.spec.job import Optimiser
from atoll.spec.sync import Sync
from tests.opening import opening

WIDTH, BATCH, SITES = 12, 8, 2
NESTEROV = {"rate": 0.7, "momentum": 0.9, "nesterov": True}
ADAM = {"kind": "adam", "rate": 0.05}


class Columns(nn.Module):
    """Fits each column by one weight, so that no weight knows of another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.linspace(-1.0, 1.0, 5))
        self.second = nn.Parameter(torch.linspace(2.0, -2.0, WIDTH - 5))

    def forward(self, x):
        return x * torch.cat([self.first, self.second])


class Fit:
    def loss(self, model, batch):
        return (model(batch["x"]) - batch["y"]).square().sum(1).mean()


def rows(site, step):
    rng = np.random.default_rng([site, step])
    x = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    goal = np.random.default_rng([7, site]).normal(size=WIDTH).astype(np.float32)
    noise = 0.1 * rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    return {"x": x, "y": x * goal + noise}


class Federation:
    """``ahead``: rounds are begun ahead where they can be. ``stops``: sites die after these steps of each round."""

    def __init__(self, home: Path, sync, kind="adam", ahead=False, stops=()):
        self.home, self.sync, self.kind, self.ahead, self.stops = home, sync, kind, ahead, stops
        self.signature = signature_of(Columns())
        self.weights, self.outer = read_vector(Columns(), self.signature), State()
        home.mkdir(parents=True, exist_ok=True)

    def train(self, steps):
        """Return the weights after each round."""
        found = []
        for version in range(math.ceil(steps / self.sync.stride)):
            done = version * self.sync.stride
            updates = [self.update(site, version, min(self.sync.stride, steps - done)) for site in range(SITES)]
            step = Advance(self.sync, self.weights, updates, self.outer)
            pieces = list(step.pieces())
            assert np.array_equal(np.concatenate(pieces), step.weights)
            self.weights, self.outer = step.weights, step.state
            found.append(self.weights)
        return found

    def update(self, site, version, steps, **changes):
        order = self.order(site, version, steps).model_copy(update=changes)
        work = self.begun(site, order)
        for stop in self.stops:
            list(itertools.islice(work.steps(self.batches(site, order)), max(0, stop - work.step)))
            work = Round(opened(), order, Fit(), parallelize(Columns(), Mesh()))
            assert work.step == stop or (self.ahead and not work.step)  # what was done ahead leaves no checkpoint
        list(work.steps(self.batches(site, order)))
        work.keep_state()
        shutil.rmtree(self.home / f"checkpoint-{site}", ignore_errors=True)
        vector = work.update()
        return Update(str(site), float(work.examples), lambda at: vector[at : at + CHUNK].copy())

    def begun(self, site, order):
        if not (self.ahead and order.goes_on):
            return Round(opened(), order, Fit(), parallelize(Columns(), Mesh()))
        early = order.model_copy(update={"weights": None, "checkpoint": None})
        work = Round(opened(), early, Fit(), parallelize(Columns(), Mesh()))
        taken = len(list(work.steps(self.batches(site, order))))
        assert taken == min(self.sync.delay, order.steps - 1)
        assert not work.ordered(order.model_copy(update={"steps": order.steps + 1}))
        assert work.ordered(order)
        return work

    def batches(self, site, order):
        return lambda first: [rows(site, order.done + step) for step in range(first, order.steps)]

    def order(self, site, version, steps):
        save_vector(self.weights, self.home / f"weights-{version}")
        state = self.home / f"state-{site}-{version - 1}"
        return orders.Train(
            seed=3,
            weights=str(self.home / f"weights-{version}"),
            signature=self.signature,
            output=str(self.home / "update"),
            state_in=str(state) if version else None,
            state_out=str(self.home / f"state-{site}-{version}"),
            version=version,
            goes_on=version > 0 and self.sync.streaming,
            done=version * self.sync.stride,
            steps=steps,
            batch=BATCH,
            optimiser=Optimiser(kind=self.kind, rate=0.02),
            sync=self.sync,
            checkpoint=str(self.home / f"checkpoint-{site}"),
            checkpoint_steps=1 if self.stops else 0,
        )


def opened():
    return opening(Path())


def whole(period, outer):
    return Sync.model_validate({"period": period, "outer": outer, "keep_optimiser": True})


def streaming(period, outer, **fields):
    return Sync.model_validate({"period": period, "outer": outer, "keep_optimiser": True, **fields})


def loss_of(weights):
    """Mean loss over the sites, without the noise: a quadratic, as x has the covariance 1."""
    goals = [np.random.default_rng([7, site]).normal(size=WIDTH).astype(np.float32) for site in range(SITES)]
    return float(np.mean([np.square(weights - goal).sum() for goal in goals]))


@pytest.mark.parametrize("outer", [NESTEROV, ADAM], ids=["nesterov", "adam"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize(("period", "fragments"), [(8, 4), (3, 3), (6, 2)])
def test_where_weights_know_nothing_of_each_other_the_last_fragment_goes_as_under_exchange_of_the_whole(
    tmp_path, kind, outer, period, fragments
):
    # Its turn comes at the end of every period, so it sees the same rounds; other fragments see them shifted.
    together = Federation(tmp_path / "whole", whole(period, outer), kind).train(4 * period)
    parts = Federation(tmp_path / "parts", streaming(period, outer, fragments=fragments), kind).train(4 * period)
    first = (fragments - 1) * WIDTH // fragments
    assert parts[-1][first:].tobytes() == together[-1][first:].tobytes()
    assert parts[-1][:first].tobytes() != together[-1][:first].tobytes()


def test_a_round_changes_the_elements_of_its_fragment_and_no_other_bit(tmp_path):
    federation = Federation(tmp_path, streaming(6, NESTEROV, fragments=3, delay=1, blend=0.5))
    before = federation.weights
    for version, after in enumerate(federation.train(12)):
        first, last = federation.sync.span(WIDTH, version)
        changed = np.zeros(WIDTH, bool)
        changed[first:last] = True
        assert np.array_equal(before != after, changed)
        before = after


@pytest.mark.parametrize(
    "sync", [{"fragments": 3, "delay": 2, "blend": 0.5}, {"delay": 11}, {"fragments": 2, "delay": 1}]
)
def test_rounds_begun_ahead_are_the_very_rounds(tmp_path, sync):
    # 32 steps are no whole number of rounds of 4: the last is shorter than others, and than a long delay.
    runs = [
        Federation(tmp_path / str(ahead), streaming(12, NESTEROV, **sync), ahead=ahead).train(31)[-1].tobytes()
        for ahead in (False, True)
    ]
    assert runs[0] == runs[1]


def test_streaming_rounds_interrupted_at_any_step_are_the_undisturbed_ones(tmp_path):
    sync = streaming(8, NESTEROV, fragments=2, delay=2, blend=0.5)
    undisturbed = Federation(tmp_path / "undisturbed", sync).train(16)[-1].tobytes()
    for stop in (1, 2, 3):
        for ahead in (False, True):
            home = tmp_path / f"{stop}-{ahead}"
            assert Federation(home, sync, ahead=ahead, stops=(stop,)).train(16)[-1].tobytes() == undisturbed


def test_a_site_that_begins_again_takes_the_weights_it_is_given_and_its_optimisers_state(tmp_path):
    federation = Federation(tmp_path, streaming(4, NESTEROV, fragments=2, blend=0.5))
    federation.train(4)
    order = federation.order(0, 2, 2)
    again = Round(opened(), order.model_copy(update={"goes_on": False}), Fit(), parallelize(Columns(), Mesh()))
    assert np.array_equal(read_vector(again._model, again._order.signature), federation.weights)
    assert again._optimiser.state_dict()["state"][0]["step"] == 4


def test_a_state_without_the_sites_own_weights_is_told_as_damage(tmp_path):
    alone = Federation(tmp_path, whole(4, NESTEROV))
    alone.train(4)
    order = alone.order(0, 1, 4).model_copy(update={"goes_on": True, "sync": streaming(4, NESTEROV, delay=1)})
    with pytest.raises(Corrupt, match="own weights are not in what it kept"):
        Round(opened(), order, Fit(), parallelize(Columns(), Mesh()))


def test_streaming_comes_within_two_percent_of_diloco_on_a_convex_task(tmp_path):
    diloco = Sync.model_validate({"preset": "diloco", "period": 12})
    parts = Sync.model_validate({"preset": "streaming_diloco", "period": 12, "delay": 1})
    start = loss_of(read_vector(Columns(), signature_of(Columns())))
    ends = [loss_of(Federation(tmp_path / str(sync.fragments), sync).train(360)[-1]) for sync in (diloco, parts)]
    assert ends[1] - ends[0] < 0.02 * (start - ends[0]), ends
