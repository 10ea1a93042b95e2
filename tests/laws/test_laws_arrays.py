"""Laws of tasks in other frameworks: whoever takes a site's steps, sites that agree alike come to the same weights.

Two unequal sites over the memory channel, a real worker each. Each law is held against a loop written here, in float64.
"""

import numpy as np
import pyarrow as pa
import pytest

from atoll.data.batches import batch, split
from atoll.errors import Invalid
from atoll.registry.blobs import Blobs
from atoll.registry.weights import load
from atoll.spec.model import Bundle
from atoll.spec.user import LOCAL
from tests.memory import finished, job, world
from tests.undeployed import NothingDeployed

SEED, BATCH, STEPS, PERIOD, RATE = 4, 16, 12, 4, 0.5
ROWS = {"ada": 70, "bob": 110}
TASKS = """\
import numpy as np
import torch
from torch import nn

from atoll import Fitted, Mean
from atoll.tasks.flower import FlowerTask


class Common:
    def __init__(self, rate=0.1):
        self.rate = rate

    def examples(self, rows):
        x = np.stack([rows.table[f"x{i}"].to_numpy() for i in range(3)], axis=1).astype(np.float32)
        return {"x": x, "y": rows.table["y"].to_numpy().astype(np.float32)}


class Torch(Common):
    def model(self):
        model = nn.Linear(3, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def loss(self, model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["y"])

    def metrics(self, model, batch):
        right = (model(batch["x"])[:, 0] > 0) == (batch["y"] > 0.5)
        return {"accuracy": Mean(right.sum().item(), len(right))}


def slope(weight, bias, x, y):
    risk = 1 / (1 + np.exp(-(x @ weight[0] + bias[0])))
    loss = -np.mean(np.log(np.where(y > 0.5, risk, 1 - risk)))
    return loss, ((risk - y) @ x / len(y))[None], np.mean(risk - y)[None]


class NumPy(Common):
    def arrays(self):
        return {"weight": np.zeros((1, 3)), "bias": np.zeros(1), "calls": np.zeros(1, np.int64)}

    def fit(self, arrays, examples, budget):
        weight, bias, losses = arrays["weight"], arrays["bias"], []
        assert weight.dtype == np.float64 and arrays["calls"] == 0
        for batch in budget.batches:
            loss, of_weight, of_bias = slope(weight, bias, batch["x"].astype(float), batch["y"])
            weight, bias = weight - self.rate * of_weight, bias - self.rate * of_bias
            losses.append(loss)
        assert len(losses) == budget.steps
        return Fitted({"weight": weight, "bias": bias, "calls": arrays["calls"] + 1}, np.mean(losses))

    def metrics(self, arrays, examples):
        right = (examples["x"] @ arrays["weight"][0] + arrays["bias"] > 0) == (examples["y"] > 0.5)
        return {"accuracy": Mean(right.sum(), len(right))}


class Client:
    \"\"\"As Flower's pages show one: it knows its data and nothing of Atoll.\"\"\"

    def __init__(self, x, y, rate):
        self.x, self.y, self.rate = x, y, rate
        self.weight, self.bias = np.zeros((1, 3)), np.zeros(1)

    def get_parameters(self, config):
        return [self.weight, self.bias]

    def set_parameters(self, parameters):
        self.weight, self.bias = parameters

    def fit(self, parameters, config):
        self.set_parameters(parameters)
        for _ in range(config["local_epochs"]):
            _, of_weight, of_bias = slope(self.weight, self.bias, self.x, self.y)
            self.weight, self.bias = self.weight - self.rate * of_weight, self.bias - self.rate * of_bias
        return self.get_parameters(config={}), len(self.x), {}

    def evaluate(self, parameters, config):
        self.set_parameters(parameters)
        right = (self.x @ self.weight[0] + self.bias > 0) == (self.y > 0.5)
        return float(slope(self.weight, self.bias, self.x, self.y)[0]), len(self.x), {"accuracy": float(right.mean())}


class Flower(Common, FlowerTask):
    def client(self, examples):
        x, y = (examples["x"].astype(float), examples["y"]) if examples else (None, None)
        return Client(x, y, self.rate)
"""
BUNDLE = Bundle(files={"task.py": TASKS})


def rows_of(name):
    rng = np.random.default_rng(len(name) + ord(name[0]))
    x = rng.normal(size=(ROWS[name], 3))
    tilt = {"ada": [2.0, -1.0, 0.0], "bob": [0.5, 1.0, -1.0]}[name]
    return x, (x @ tilt + 0.4 + rng.normal(size=len(x)) > 0).astype(float)


def table(name):
    x, y = rows_of(name)
    return pa.table({**{f"x{i}": column for i, column in enumerate(x.T)}, "y": y})


def train(kind, **fields):
    rate = {} if kind == "Torch" else {"params": {"rate": RATE}}
    known = {"task": {"file": "task.py", "name": kind, **rate}, "optimiser": {"rate": RATE}, "seed": SEED}
    sync = {"preset": "fedavg", "period": PERIOD}
    return job(**{**known, "steps": STEPS, "batch": BATCH, "layout": {"data": 1}, "sync": sync, **fields})


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory):
    home = tmp_path_factory.mktemp("arrays")
    with world(home, {name: table(name) for name in ROWS}, NothingDeployed()) as hub:
        yield home, hub


@pytest.fixture(scope="module")
def run(two_sites):
    """Return a function that runs a job; it returns the model's vector and the run."""
    home, hub = two_sites

    def outcome(asked):
        view = finished(hub, asked, BUNDLE)
        model = hub.model(view.result.model)
        return load(Blobs(home / "hub" / "blobs").get(model.weights), model.signature)[0], view

    return outcome


@pytest.fixture(scope="module")
def in_numpy(run):
    return run(train("NumPy"))


# --- what the sites would do: written here once more, knowing nothing of tasks


def slope(vector, x, y):
    risk = 1 / (1 + np.exp(-(x @ vector[:3] + vector[3])))
    return np.append((risk - y) @ x, (risk - y).sum()) / len(y)


def training_rows(name):
    x, y = rows_of(name)
    kept, _ = split(len(y), 0.2, SEED)
    return x[kept].astype(np.float32).astype(float), y[kept]


def by_batches(name, vector, done):
    x, y = training_rows(name)
    for step in range(done, done + PERIOD):
        index = batch(SEED, len(y), step * BATCH, BATCH)
        vector = vector - RATE * slope(vector, x[index], y[index])
    return vector, PERIOD * BATCH


def by_epochs(name, vector, done):
    x, y = training_rows(name)
    for _ in range(PERIOD):
        vector = vector - RATE * slope(vector, x, y)
    return vector, len(y)


def averaged(work, weighted=True):
    """FedAvg (McMahan et al., 2017): the mean of what the sites come to, weighted by their examples."""
    vector = np.zeros(4)
    for done in range(0, STEPS, PERIOD):
        found, weights = zip(*(work(name, vector, done) for name in ROWS), strict=True)
        vector = np.average(found, axis=0, weights=weights if weighted else None)
    return vector


# --- laws


def test_fedavg_of_a_numpy_task_is_a_loop_of_weighted_means(in_numpy):
    expected = averaged(by_batches)
    assert np.abs(expected).max() > 0.3  # it did learn, so that equality says something
    np.testing.assert_allclose(in_numpy[0], expected, atol=1e-5, rtol=0)


def test_fedavg_of_a_numpy_task_is_that_of_the_same_in_torch(run, in_numpy):
    vector, view = run(train("Torch"))
    np.testing.assert_allclose(in_numpy[0], vector, atol=1e-5, rtol=0)
    assert in_numpy[1].losses == pytest.approx(view.losses, abs=1e-6)
    assert in_numpy[1].result.metrics == pytest.approx(view.result.metrics, abs=1e-6)


def test_fedavg_of_flower_clients_is_a_loop_of_means_weighted_by_their_examples(run):
    vector, view = run(train("Flower", batch=max(ROWS.values())))
    np.testing.assert_allclose(vector, averaged(by_epochs), atol=1e-5, rtol=0)
    assert np.abs(vector - averaged(by_epochs, weighted=False)).max() > 1e-3
    assert set(view.result.metrics) == {"accuracy", "loss"}


def test_the_same_job_again_gives_the_same_bits(run, in_numpy):
    assert np.array_equal(run(train("NumPy"))[0], in_numpy[0])


def test_the_planner_leaves_out_what_needs_gradients(two_sites):
    _, hub = two_sites
    plan = hub.plan(train("NumPy", sync=None, layout=None), BUNDLE, LOCAL)
    (dropped,) = [one for one in plan.considered if one.sync and one.sync.exchange == "gradient"]
    assert any("the task hands over arrays and has no gradients" in reason.words for reason in dropped.rejected)
    assert plan.sync.exchange == "delta"
    assert {layout.ranks for layout in plan.layouts.values()} == {1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sync": "data_parallel"}, "sync.exchange: gradient: the task hands over arrays"),
        ({"sync": {"preset": "fedprox", "period": 4}}, "sync.proximal: 0.01: the task takes its own steps"),
    ],
)
def test_a_pinned_sync_that_needs_gradients_is_refused_before_anything_runs(two_sites, fields, words):
    with pytest.raises(Invalid, match=words):
        two_sites[1].plan(train("NumPy", **fields), BUNDLE, LOCAL)
