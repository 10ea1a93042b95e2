"""Laws of whole runs: neighbouring points of the space agree, and where the sites live changes no bit of a model.

Two sites as processes of their own over the network, and once more as threads over the memory channel.
"""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import atoll
from atoll.data.batches import batch, split
from atoll.data.catalogue import Catalogue
from atoll.policy.defaults import SITE_POLICY
from atoll.registry.blobs import Blobs
from atoll.registry.weights import load
from atoll.runtime import site as sites
from atoll.runtime.hub import Hub
from atoll.spec.fleet import Site
from atoll.spec.job import parse_job
from atoll.spec.model import Bundle
from atoll.spec.user import LOCAL
from tests.laws.net import task, write_rows
from tests.undeployed import NothingDeployed

SEED, BATCH, STEPS, RATE = 5, 8, 12, 0.02
ROWS = {"ada": 90, "bob": 110}  # unequal, so that a mean over sites is none over rows


def rows_of(name):
    rng = np.random.default_rng(sum(name.encode()))
    x = rng.normal(size=(ROWS[name], 4))
    return x, np.sin(x[:, 0]) + (0.5 if name == "ada" else -0.5) * x[:, 1]


def settle(home):
    """Make a home with both sites and their rows."""
    for name in ROWS:
        folder = home / "sites" / name
        sites.create(folder, Site(name=name, owner=name), SITE_POLICY)
        path = folder / "rows.parquet"
        write_rows(path, *rows_of(name))
        Catalogue(folder).add("rows", path, purposes=("care",))
    return home


def job(sync, only=None, **fields):
    data = {"dataset": "rows", "sites": only, "evaluate": only}
    return parse_job(
        {
            "kind": "train",
            "name": "net",
            "purpose": "care",
            "task": {"file": "task.py", "name": "Net"},
            "data": {name: value for name, value in data.items() if value},
            "steps": STEPS,
            "batch": BATCH,
            "optimiser": {"kind": "adam", "rate": RATE},
            "layout": {"data": 1},
            "seed": SEED,
            "sync": sync,
            **fields,
        },
        "job",
    )


BUNDLE = Bundle(files={"task.py": task(columns=4, hidden=6)})
FEDAVG = {"preset": "fedavg", "period": 4}


def outcome(home, model, view):
    vector, _ = load(Blobs(home / "hub" / "blobs").get(model.weights), model.signature)
    return SimpleNamespace(vector=vector, digest=model.weights, view=view, model=model)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Return a function that runs a job over two site processes."""
    home = settle(tmp_path_factory.mktemp("network"))
    with atoll.connect(home) as hub:

        def run(asked):
            view = hub.run_job(asked, bundle=BUNDLE)
            assert view.state == "finished", view.words
            return outcome(home, hub.model(view.result.model), view)

        yield run


@pytest.fixture(scope="module")
def fedavg(network):
    return network(job(FEDAVG))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Return a function that runs a job over two sites in this process."""
    home = settle(tmp_path_factory.mktemp("memory"))
    hub = Hub(home, NothingDeployed())
    agents = [sites.agent(home / "sites" / name) for name in ROWS]
    threads = [threading.Thread(target=agent.serve_desk, args=(hub._desk,)) for agent in agents]
    for thread in threads:
        thread.start()

    def run(asked):
        while len(hub.fleet().sites) < len(ROWS):
            time.sleep(0.01)
        name, news = hub.submit(asked, BUNDLE, LOCAL), threading.Event()
        with hub.watch(name, news.set):
            while (view := hub.run(name)).state in ("planning", "running"):
                news.wait(5.0)
                news.clear()
        assert view.state == "finished", view.words
        return outcome(home, hub.model(view.result.model), view)

    yield run
    for agent in agents:
        agent.stop()
    for thread in threads:
        thread.join(20)
    hub.close()


# --- what one process would do: written here in plain torch, knowing nothing of sites


def net():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def batches(name):
    x, y = rows_of(name)
    train, _ = split(len(y), 0.2, SEED)
    for number in range(STEPS):
        index = train[batch(SEED, len(train), number * BATCH, BATCH)]
        yield x[index].astype(np.float32), y[index].astype(np.float32)


def trained(*names):
    """Train with Adam on each step's batches put together; return (first, last) weights as flat vectors."""
    model = net()
    first = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    for parts in zip(*(batches(name) for name in names), strict=True):
        x, y = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x)[:, 0], y).backward()
        optimiser.step()
    return first.numpy(), nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def assert_equal_after_training(vector, first, last):
    assert np.abs(last - first).max() > 0.05  # it did learn, so that equality says something
    np.testing.assert_allclose(vector, last, atol=2e-5, rtol=0)


# --- laws


def test_exchanged_gradients_with_adam_are_centralised_adam(network):
    sync = {"preset": "data_parallel", "outer": {"kind": "adam", "rate": RATE}}
    assert_equal_after_training(network(job(sync)).vector, *trained("ada", "bob"))


@pytest.mark.parametrize("period", [3, STEPS])
def test_fedavg_of_one_site_that_keeps_its_optimiser_is_unbroken_local_training(network, period):
    sync = {"preset": "fedavg", "period": period, "keep_optimiser": True}
    assert_equal_after_training(network(job(sync, only=["ada"])).vector, *trained("ada"))


def test_period_changes_bytes_and_not_meaning_for_one_site(network):
    often, seldom = (
        network(job({"preset": "fedavg", "period": period, "keep_optimiser": True}, only=["bob"])) for period in (2, 6)
    )
    np.testing.assert_allclose(often.vector, seldom.vector, atol=2e-5, rtol=0)
    assert (often.view.rounds, seldom.view.rounds) == (6, 2)
    size = 4 * len(often.vector)
    assert often.view.bytes_up - seldom.view.bytes_up == pytest.approx(4 * size, abs=64)
    assert often.view.bytes_down > seldom.view.bytes_down


def test_fedprox_without_a_pull_is_fedavg(network, fedavg):
    assert network(job({"preset": "fedprox", "period": 4, "proximal": 0.0})).digest == fedavg.digest
    assert network(job({"preset": "fedprox", "period": 4, "proximal": 0.5})).digest != fedavg.digest


def test_a_buffer_of_everyone_is_synchronous(network, fedavg):
    buffered = network(job({**FEDAVG, "wait": {"kind": "buffer", "count": 2}}))
    assert buffered.digest == fedavg.digest


def test_a_quorum_of_everyone_is_synchronous(network, fedavg):
    assert network(job({**FEDAVG, "wait": {"kind": "quorum", "count": 2}})).digest == fedavg.digest


def test_diloco_of_rate_one_without_momentum_is_fedavg(network, fedavg):
    outer = {"rate": 1.0, "momentum": 0.0, "nesterov": False}
    sync = {"preset": "diloco", "period": 4, "merge": "weighted_mean", "outer": outer, "keep_optimiser": False}
    assert network(job(sync)).digest == fedavg.digest


def test_the_same_job_again_gives_the_same_bits_and_another_version(network, fedavg):
    again = network(job(FEDAVG))
    assert (again.digest, again.model.name) == (fedavg.digest, fedavg.model.name)
    assert again.model.version > fedavg.model.version
    assert network(job(FEDAVG, seed=6)).digest != fedavg.digest


def test_sites_in_one_process_and_sites_of_their_own_give_the_same_bits(memory, fedavg):
    here = memory(job(FEDAVG))
    assert here.digest == fedavg.digest
    assert here.view.result.metrics == fedavg.view.result.metrics
    assert (here.view.bytes_up, here.view.losses) == (fedavg.view.bytes_up, fedavg.view.losses)


@pytest.mark.parametrize("channel", ["network", "memory"])
def test_an_asynchronous_run_finishes_however_far_its_sites_drift_apart(request, channel):
    """Who is merged when depends on the machine: a buffer of one takes whoever is first, every round."""
    run = request.getfixturevalue(channel)
    made = run(job({"preset": "fedbuff", "period": 1, "wait": {"kind": "buffer", "count": 1}}))
    assert (made.view.round, len(made.view.losses)) == (STEPS, STEPS)
    assert np.isfinite(made.vector).all()
