"""A hub and its sites in one process, over the memory channel, with everything real but the workers."""

import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from atoll.data.catalogue import Catalogue
from atoll.errors import LinkLost
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.runtime.hub import Hub
from atoll.spec.fleet import Site
from atoll.spec.job import parse_job
from atoll.spec.model import Bundle
from atoll.spec.order import Reply
from atoll.spec.user import LOCAL
from tests.undeployed import NothingDeployed
from tests.unit.places import BATCH, SIZE, STEPS, WAIT, Workers, eventually

ROUNDS = 3
BUNDLE = Bundle(files={"task.py": "class Task: pass"})


def serve(end, desk):
    """Have an agent or a relay serve a desk until it is stopped."""
    with suppress(LinkLost):  # a relay's desk has no way to the hub any more
        end.serve_desk(desk)


class World:
    """Sites whose workers go half the way to a point of their site's own in every round."""

    def __init__(self, home, names, deployer=None):
        self.home, self.names, self.hub = home, names, Hub(home, deployer or NothingDeployed())
        self.agents, self.threads, self.workers = {}, [], {name: Workers() for name in names}
        self.may_train = {name: threading.Event() for name in names}
        for number, name in enumerate(names):
            folder = home / "sites" / name
            sites.create(folder, Site(name=name, owner=name), SITE_POLICY)
            pq.write_table(pa.table({"age": [float(row) for row in range(50)]}), folder / "rows.parquet")
            Catalogue(folder).add("rows", folder / "rows.parquet", purposes=("care",))
            goal = np.random.default_rng(number).normal(size=SIZE).astype(np.float32)
            self.may_train[name].set()
            self.aim(name, goal)

    def aim(self, name, goal):
        """Have a site's workers go half the way to this point from now on."""
        self.workers[name].answers["train"] = lambda order, group: self._train(name, order, goal)

    def start(self, name, desk=None):
        """Begin a life of a site's agent, which is served by this desk or by the hub's own."""
        folder = self.home / "sites" / name
        self.agents[name] = Agent(sites.read(folder), folder, self.workers[name])
        serving = (self.agents[name], desk or self.hub._desk)
        self.threads.append(threading.Thread(target=serve, args=serving, daemon=True))
        self.threads[-1].start()

    def submit(self, data=None, **sync):
        """Submit a training job once all sites are here, and return its run."""
        assert eventually(lambda: len(self.hub.fleet().sites) == len(self.names))
        fields = {"kind": "train", "name": "job", "purpose": "care", "steps": ROUNDS * STEPS, "batch": BATCH}
        fields |= {"task": {"file": "task.py", "name": "Task"}, "data": {"dataset": "rows", **(data or {})}}
        sync = {"preset": "fedavg", "period": STEPS, **sync}
        return self.hub.submit(parse_job({**fields, "layout": {"data": 1}, "sync": sync}, "job"), BUNDLE, LOCAL)

    def end(self, run):
        """Return a run's view once it is over."""
        until = time.monotonic() + WAIT
        while not (view := self.hub.run(run)).over and time.monotonic() < until:
            time.sleep(0.01)
        assert view.over, view
        return view

    def journalled(self, kind, run=None):
        return [entry.event for entry in self.hub._journal.entries(kinds=(kind,), run=run)]

    def close(self):
        for agent in self.agents.values():
            agent.stop()
        for thread in self.threads:
            thread.join(WAIT)
        self.hub.close()
        assert not any(thread.is_alive() for thread in self.threads)

    def _train(self, name, order, goal):
        assert self.may_train[name].wait(WAIT)
        return _half_way(order, goal)


@contextmanager
def started(home, names, deployer=None):
    """Yield a world whose sites all serve its hub, and end it afterwards."""
    world = World(home, names, deployer)
    try:
        for name in names:
            world.start(name)
        yield world
    finally:
        world.close()


def _half_way(order, goal):
    ((goal - np.fromfile(order.weights, np.float32)) / 2).tofile(order.output)
    return Reply(examples=STEPS * BATCH, loss=0.5)
