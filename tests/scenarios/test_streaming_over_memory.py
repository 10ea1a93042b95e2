"""Whole streaming runs over the memory channel with real workers: beginning ahead changes no bit, nor does who dies."""

import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.catalogue import Catalogue
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.runtime.hub import Hub
from atoll.runtime.local import LocalExecutor
from atoll.spec.fleet import Site
from atoll.spec.model import Bundle
from atoll.spec.order import Reply
from atoll.spec.user import LOCAL
from tests.memory import job
from tests.undeployed import NothingDeployed

WAIT, STRIDE, STEPS = 90.0, 4, 26
TASK = """\
import os
import signal

import numpy as np
import torch
from torch import nn


class Fit:
    def __init__(self, fault=""):
        self.fault, self.calls = fault, 0

    def model(self):
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def examples(self, rows):
        return {name: np.stack(rows.table[name].to_numpy()).astype(np.float32) for name in ("x", "y")}

    def loss(self, model, batch):
        self.calls += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = f"{self.fault}-{rank}-{self.calls}"
        if self.fault:
            try:
                os.remove(path)  # both sites come here; one of them dies
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])

    def predict(self, model, batch):
        return {"y": model(batch["x"])[:, 0]}

    def metrics(self, model, batch):
        return {}
"""
SYNC = {"preset": "streaming_diloco", "period": 3 * STRIDE, "fragments": 3, "delay": 2}


class Heard:
    """An executor whose groups note what they are ordered, and begin nothing ahead where that is wanted."""

    confined, refuses = False, ""

    def __init__(self, ahead=True):
        self.real, self.ahead, self.orders = LocalExecutor(), ahead, []

    def warm(self):
        self.real.warm()

    def start(self, layout, folder, grant=None):
        return HeardGroup(self, self.real.start(layout, folder))

    def close(self):
        self.real.close()


class HeardGroup:
    def __init__(self, heard, group):
        self.heard, self.group, self.close, self.rest = heard, group, group.close, group.rest

    @property
    def whole(self):
        return self.group.whole

    def order(self, order, timeout, on_step=None):
        self.heard.orders.append(order)
        if order.kind == "ahead" and not self.heard.ahead:
            return Reply()  # the round's own order finds nothing that it could go on from
        return self.group.order(order, timeout, on_step)


class Place:
    """A hub and two sites; ``agents`` can be begun anew."""

    def __init__(self, home, ahead=True):
        self.home, self.hub = home, Hub(home, NothingDeployed())
        self.executors, self.agents, self.threads = {}, {}, []
        for number, name in enumerate(("ada", "bob")):
            folder = home / "sites" / name
            sites.create(folder, Site(name=name, owner=name), SITE_POLICY)
            rng = np.random.default_rng(number)
            x = rng.normal(size=(60, 3))
            table = pa.table({"x": list(x), "y": np.sin(x[:, 0]) + number * x[:, 1]})
            pq.write_table(table, folder / "rows.parquet")
            Catalogue(folder).add("rows", folder / "rows.parquet", purposes=("care",))
            self.executors[name] = Heard(ahead)
            self.start(name)

    def start(self, name):
        folder = self.home / "sites" / name
        agent = Agent(sites.read(folder), folder, self.executors[name])
        thread = threading.Thread(target=agent.serve_desk, args=(self.hub._desk,), daemon=True)
        self.agents[name] = agent
        self.threads.append(thread)
        thread.start()

    def submit(self, ranks=1, sync=SYNC):
        until = time.monotonic() + WAIT
        while len(self.hub.fleet().sites) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        fields = {"steps": STEPS, "batch": 8, "optimiser": {"kind": "adamw", "rate": 0.02}, "layout": {"shard": ranks}}
        task = {"file": "task.py", "name": "Fit", "params": {"fault": str(self.home / "fault")}}
        return self.hub.submit(job(task=task, sync=sync, **fields), Bundle(files={"task.py": TASK}), LOCAL)

    def weights(self, run):
        """Return the digests of the weights after each stage of a run once it has finished."""
        until = time.monotonic() + WAIT
        while not (view := self.hub.run(run)).over:
            assert time.monotonic() < until, view
            time.sleep(0.02)
        assert view.state == "finished", view.words
        merged = [entry.event for entry in self.hub._journal.entries(kinds=("run.merged",), run=run)]
        return [event.weights for event in merged if event.weights]

    def ordered(self, name, kind):
        return [order for order in self.executors[name].orders if order.kind == kind]

    def seen(self, holds):
        until = time.monotonic() + WAIT
        while not holds():
            assert time.monotonic() < until
            time.sleep(0.005)

    def close(self):
        for agent in self.agents.values():
            agent.stop()
        for thread in self.threads:
            thread.join(WAIT)
        self.hub.close()
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["1 rank", "2 ranks"])
def undisturbed(request, tmp_path_factory):
    """Ranks a site, and the weights after each round when nothing is begun ahead."""
    place = Place(tmp_path_factory.mktemp("undisturbed") / "home", ahead=False)
    try:
        yield request.param, place.weights(place.submit(request.param))
    finally:
        place.close()


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path / "home")
    yield made
    made.close()


def test_a_run_begun_ahead_is_the_run_that_waits_for_each_round(place, undisturbed):
    ranks, expected = undisturbed
    assert place.weights(place.submit(ranks)) == expected
    assert len(expected) == 1 + 7, "26 steps are 7 rounds of 4, the last of them shorter"
    for name in ("ada", "bob"):
        assert [order.round.version for order in place.ordered(name, "ahead")] == [1, 2, 3, 4, 5, 6]
        assert [order.goes_on for order in place.ordered(name, "train")] == [False] + 6 * [True]


@pytest.mark.parametrize("call", [11, 13])  # of the loss in the worker
def test_a_worker_killed_ahead_or_not_changes_no_bit(place, undisturbed, call):
    ranks, expected = undisturbed
    fault = place.home / f"fault-{ranks - 1}-{call}"
    fault.touch()
    assert place.weights(place.submit(ranks)) == expected
    assert not fault.exists()


def test_an_agent_ended_in_the_middle_goes_on_to_the_same_bits(place, undisturbed):
    ranks, expected = undisturbed
    run = place.submit(ranks)
    for version in (2, 4):
        place.seen(lambda version=version: any(o.round.version == version for o in place.ordered("bob", "ahead")))
        place.agents["bob"].stop()
        place.threads[-1].join(WAIT)
        place.start("bob")
    assert place.weights(run) == expected


def test_a_quorum_goes_on_without_a_site_that_then_begins_again_from_the_weights(place):
    wait = {"kind": "quorum", "count": 1, "deadline": 4.0}
    run = place.submit(sync={**SYNC, "wait": wait})
    place.seen(lambda: len(place.ordered("bob", "train")) >= 2)
    place.agents["bob"].stop()
    place.threads[-1].join(WAIT)
    until = place.hub.run(run).round + 1
    place.seen(lambda: place.hub.run(run).over or place.hub.run(run).round >= until)
    before = len(place.ordered("bob", "train"))
    place.start("bob")
    place.weights(run)
    after = place.ordered("bob", "train")[before:]
    assert after, "bob came back while the run went on"
    assert not after[0].goes_on
    assert after[0].version > 2
    assert after[0].state_in is not None, "its optimiser's state goes on"
