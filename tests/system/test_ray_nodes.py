"""A site with several nodes of a Ray cluster: a killed worker, a killed actor, and nodes that vanish."""

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from atoll.errors import Unavailable
from atoll.runtime.actors import RayExecutor
from atoll.runtime.local import LocalExecutor
from atoll.spec.compute import Compute
from atoll.spec.fleet import Executor
from atoll.spec.plan import Layout
from tests.system.processes import alive, descendants
from tests.system.rounds import STEPS, Site

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
STARTS = 60  # seconds that a node has to start
SILENCE = 1.0
# Every process of the cluster, and who joins it: it is at 127.0.0.1, and soon notices a node that says nothing more.
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # elsewhere, too: what Ray calls this is the address of the loopback
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}


class Nodes:
    """A cluster of one node at first, which has room for one rank; the site's driver is there."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="atoll-", dir="/tmp")  # the path of a socket is 107 bytes at most
        (Path(self.folder) / "ray").mkdir()  # where Ray writes which cluster was the last one
        with (Path(self.folder) / "raylets.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.raylets", self.folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TMPDIR": self.folder},  # what a killed actor leaves behind goes with it
                start_new_session=True,
                text=True,
                bufsize=1,
            )
        self.address, head = self._heard().split()
        self.head = int(head)
        self.alive = [self.head]  # by their raylets

    def _heard(self):
        assert select.select([self.process.stdout], [], [], STARTS)[0], "no answer"
        return self.process.stdout.readline().strip()

    def rooms(self):
        """Return how many groups have room for all their ranks."""
        return self._ask("rooms")

    def add(self, late=False):
        """Add a node with room for one rank, which takes its time to start that if it is ``late``."""
        self.alive.append(self._ask("late 1" if late else "add 1"))
        return self.alive[-1]

    def _ask(self, words):
        self.process.stdin.write(words + "\n")
        return int(self._heard())

    def kill(self, raylet):
        """Have a node vanish, with all that runs there."""
        self.alive.remove(raylet)
        for pid in [raylet, *descendants(raylet)]:
            os.kill(pid, signal.SIGKILL)

    def close(self):
        """End it, and return what was left of it and had to be killed."""
        below = descendants(self.process.pid)
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return below


@pytest.fixture(scope="module")
def nodes(with_ray):
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**SETTINGS, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
            environment.setenv(name, value)
        made = Nodes()
        yield made
        left = [pid for pid in made.close() if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.fixture(scope="module")
def executor(nodes, tmp_path_factory):
    choice = Executor(kind="ray", address=nodes.address, silence=SILENCE)
    made = RayExecutor(choice, 1, tmp_path_factory.mktemp("ray"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def sites(nodes, executor, tmp_path_factory, eventually):
    """Make groups at a round on the cluster; in the end nothing is left of them."""
    made = []

    def make(**degrees):
        made.append(Site(tmp_path_factory.mktemp("site"), Layout(**degrees), Compute(), executor))
        return made[-1]

    yield make
    for site in made:
        close(site, eventually)
    assert eventually(lambda: nodes.rooms() == 0), "their room is given back"


def close(site, eventually):
    """End a group and see that none of its processes is left."""
    site.group.close()
    assert eventually(lambda: not any(alive(pid) for pid in site.pids()), 10)


@pytest.fixture(scope="module")
def pair(nodes, sites, eventually):
    """A group of parts on two nodes, of which one vanished while the group started, and another came."""
    late, made = nodes.add(late=True), []
    starting = threading.Thread(target=lambda: made.append(sites(shard=2)), daemon=True)
    starting.start()
    assert eventually(lambda: nodes.rooms() == 1), "a place on each node"
    assert not seats(late)
    nodes.kill(late)
    nodes.add()
    starting.join(90)
    assert made, "it has opened its dataset"
    return made[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the weights of a round, and its loss, of two processes here that lose nobody."""
    executor, made = LocalExecutor(), {}

    def trained(kind, steps=STEPS, seed=0):
        if kind not in made:
            made[kind] = Site(tmp_path_factory.mktemp(kind), Layout(**{kind: 2}), Compute(), executor)
        return made[kind].train(steps, seed), made[kind].reply.loss

    yield trained
    for site in made.values():
        site.group.close()
    executor.close()


def seats(raylet):
    """Return a node's actors."""
    return [pid for pid in descendants(raylet) if title(pid).startswith(b"ray::Seat")]


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Training(threading.Thread):
    """A round under way, of which each step takes half a second until it is to `end`."""

    def __init__(self, site, steps):
        super().__init__(daemon=True)
        self.site, self.steps, self.error = site, steps, ""
        (site.folder / "slow").touch()
        self.start()

    def run(self):
        try:
            self.site.train(self.steps)
        except Unavailable as error:
            self.error = str(error)

    def under_way(self):
        return len(self.site.pids()) == 2

    def end(self, seconds=60):
        (self.site.folder / "slow").unlink()
        self.join(seconds)
        assert not self.is_alive()
        return self.error


def begun(nodes, sites, eventually, steps, **degrees):
    """A site with a rank on each of two nodes, at a round of so many steps."""
    while len(nodes.alive) < 2:
        nodes.add()
    site = sites(**degrees)
    training = Training(site, steps)
    assert eventually(training.under_way)
    return site, training


def test_a_node_that_vanishes_while_a_group_starts_gives_its_place_to_another(nodes, pair):
    assert pair.group.whole
    assert [len(seats(node)) for node in nodes.alive] == [1, 1], "a rank on each node"


def test_a_killed_and_a_stopped_worker_and_a_killed_actor_are_replaced(nodes, pair, undisturbed, eventually):
    before = {node: seats(node) for node in nodes.alive}
    pair.fault("SIGKILL", 1, 5)
    pair.fault("SIGSTOP", 0, 8)
    assert np.array_equal(pair.train(), undisturbed("shard")[0])
    assert {node: seats(node) for node in nodes.alive} == before, "in the same actors"
    assert len(pair.pids()) == 4
    seen = [(pid, numbers) for pid, rank, numbers in pair.seen() if rank == 0]
    assert next(numbers for pid, numbers in seen if pid != seen[0][0]) != seen[0][1], "it went on from the mirror"
    pair.fault("ABOVE", 1, 5)
    assert np.array_equal(pair.train(seed=1), undisturbed("shard", seed=1)[0])
    assert len(pair.pids()) == 5
    assert sum(seats(node) == before[node] for node in nodes.alive) == 1, "of the other a new one"
    close(pair, eventually)


def test_copies_go_on_without_a_node_and_take_a_rank_in_on_another(nodes, sites, undisturbed, eventually):
    while len(nodes.alive) < 3:
        nodes.add()
    site = sites(data=2)
    training = Training(site, 40)
    assert eventually(training.under_way)
    nodes.kill(next(node for node in nodes.alive if node != nodes.head and seats(node)))
    assert eventually(lambda: not site.group.whole)
    assert eventually(lambda: site.group.whole), "a rank on the node that has room is in the group"
    assert training.end() == ""
    assert (site.reply.steps, site.reply.examples) == (40, 320)
    assert site.reply.loss == pytest.approx(undisturbed("data", 40)[1], abs=1e-4)
    assert len(site.pids()) == 3
    close(site, eventually)


@pytest.mark.slow
def test_without_room_copies_go_on_and_parts_end_in_a_sentence(nodes, sites, eventually):
    for degrees, words in (({"data": 2}, ""), ({"shard": 2}, "had no room in 30 s for a rank with 1 CPU; add nodes")):
        site, training = begun(nodes, sites, eventually, 90, **degrees)
        nodes.kill(next(node for node in nodes.alive if node != nodes.head))
        assert eventually(lambda site=site: not site.group.whole)
        training.join(45)
        assert words in training.end()
        assert bool(words) == bool(training.error)
        close(site, eventually)


@pytest.mark.slow
def test_copies_go_on_without_a_node_that_hangs(nodes, sites, eventually):
    site, training = begun(nodes, sites, eventually, 80, data=2)
    hung = next(node for node in nodes.alive if node != nodes.head)
    stopped = [hung, *descendants(hung)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: not site.group.whole)
    assert training.end() == ""
    nodes.kill(hung)
    close(site, eventually)


@pytest.mark.slow
def test_a_killed_driver_ends_the_order_and_the_next_group_has_another(nodes, sites, eventually):
    site, training = begun(nodes, sites, eventually, 60, data=2)
    [driver] = [pid for pid in descendants(os.getpid()) if b"atoll.runtime.ray\0" in title(pid)]
    os.kill(driver, signal.SIGKILL)
    assert "ended with the process of Ray" in training.end(20)
    close(site, eventually)
    another = sites(data=2)
    another.train()
    assert another.reply.steps == STEPS
