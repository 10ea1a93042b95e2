"""Error feedback in a whole run over the memory channel: an agent that ends while it sends costs no bit of a model."""

import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.catalogue import Catalogue
from atoll.errors import LinkLost
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.runtime.hub import Hub
from atoll.spec.fleet import Site
from atoll.spec.job import parse_job
from atoll.spec.message import Reply
from atoll.spec.model import Bundle
from tests.undeployed import NothingDeployed
from tests.unit.places import BATCH, SIZE, STEPS, WAIT, Workers, eventually

ROUNDS = 6
NAMES = ("ada", "bob")
BUNDLE = Bundle(files={"task.py": "class Task: pass"})
SPARSE = [{"kind": "topk", "share": 0.3}, {"kind": "int8"}]
FORGETFUL = [{**step, "feedback": False} for step in SPARSE]


class Narrow:
    """A hub's desk as a site sees it over a link that is gone from its update of stage ``position`` on.

    ``taken``: how much of that update the hub has by then.
    """

    def __init__(self, desk, position, taken):
        self._desk, self._position, self._taken = desk, position, taken
        self.reached = threading.Event()

    def __getattr__(self, name):
        return getattr(self._desk, name)

    def take(self, site, parcel, frames):
        if parcel.answer.position < self._position:
            self._desk.take(site, parcel, frames)
            return
        if self._taken == "all" and not self.reached.is_set():
            self._desk.take(site, parcel, frames)
        elif self._taken == "some":
            next(iter(frames(0)))
        self.reached.set()
        raise LinkLost("the link broke")


class World:
    """A hub and the sites ada and bob in this process, whose workers go half the way to a point of their site's own."""

    def __init__(self, home):
        self.home, self.hub = home, Hub(home, NothingDeployed())
        self.agents, self.threads, self.workers = {}, [], {name: Workers() for name in NAMES}
        for number, name in enumerate(NAMES):
            folder = home / "sites" / name
            sites.create(folder, Site(name=name, owner=name), SITE_POLICY)
            pq.write_table(pa.table({"age": [float(row) for row in range(50)]}), folder / "rows.parquet")
            Catalogue(folder).add("rows", folder / "rows.parquet", purposes=("care",))
            goal = np.random.default_rng(number).normal(size=SIZE).astype(np.float32)
            self.workers[name].answers["train"] = lambda order, group, goal=goal: half_way(order, goal)

    def start(self, name, desk=None):
        """Begin a life of a site's agent."""
        folder = self.home / "sites" / name
        self.agents[name] = Agent(sites.read(folder), folder, self.workers[name])
        self.threads.append(threading.Thread(target=self.agents[name].serve_desk, args=(desk or self.hub._desk,)))
        self.threads[-1].start()

    def submit(self, wire):
        assert eventually(lambda: len(self.hub.fleet().sites) == len(NAMES))
        fields = {"kind": "train", "name": "job", "purpose": "care", "steps": ROUNDS * STEPS, "batch": BATCH}
        fields |= {"task": {"file": "task.py", "name": "Task"}, "data": {"dataset": "rows"}, "layout": {"data": 1}}
        job = parse_job({**fields, "sync": {"preset": "fedavg", "period": STEPS, "wire": wire}}, "job")
        return self.hub.submit(job, BUNDLE, "local")

    def weights(self, run):
        """Return the digest of a run's model once it is there."""
        until = time.monotonic() + WAIT
        while (view := self.hub.run(run)).state in ("planning", "running") and time.monotonic() < until:
            time.sleep(0.01)
        assert view.state == "finished", (view.state, view.words)
        return self.hub.model(view.result.model).weights

    def trained(self, name):
        return [order.done for order in self.workers[name].did("train")]

    def close(self):
        for agent in self.agents.values():
            agent.stop()
        for thread in self.threads:
            thread.join(WAIT)
        self.hub.close()
        assert not any(thread.is_alive() for thread in self.threads)


def half_way(order, goal):
    ((goal - np.fromfile(order.weights, np.float32)) / 2).tofile(order.output)
    return Reply(examples=STEPS * BATCH, loss=0.5)


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The models of runs that nothing happens to: with feedback, and without."""
    made = World(tmp_path_factory.mktemp("undisturbed"))
    for name in NAMES:
        made.start(name)
    found = [made.weights(made.submit(wire)) for wire in (SPARSE, FORGETFUL)]
    made.close()
    return found


def test_what_is_fed_back_makes_another_model(undisturbed):
    with_feedback, without = undisturbed
    assert with_feedback != without


@pytest.mark.parametrize("taken", ["none", "some", "all"])
def test_an_agent_that_ends_between_encoding_and_receipt_changes_no_bit_of_the_model(world, undisturbed, taken):
    desk = Narrow(world.hub._desk, 3, taken)
    world.start("ada")
    world.start("bob", desk)
    run = world.submit(SPARSE)
    assert desk.reached.wait(WAIT)
    world.agents["bob"].stop()
    world.threads[-1].join(WAIT)
    world.start("bob")
    assert world.weights(run) == undisturbed[0]
    assert world.trained("bob") == world.trained("ada") == [STEPS * number for number in range(ROUNDS)]
