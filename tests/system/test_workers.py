"""Worker processes that die, stop, or run code that would meddle: every order ends in its time, and nobody is left.

The same of each executor: processes of this machine, and Ray actors where Ray is installed.
"""

import os
import re
import signal
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import TaskFailed, Unavailable
from atoll.runtime.actors import RayExecutor
from atoll.runtime.local import LocalExecutor
from atoll.spec import order as orders
from atoll.spec.fleet import Executor
from atoll.spec.job import Optimiser
from atoll.spec.model import TensorSpec
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.opening import opening

pytestmark = pytest.mark.system
TASK = """\
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atoll import Mean

HERE = Path({folder!r})  # not beside this file: a node of a cluster has its own copy


def told(fault):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    path = HERE / f"{fault}-{rank}"
    if path.exists():
        path.unlink()
        return True
    return False


class Fit:
    def model(self):
        (HERE / f"pid-{os.getpid()}").touch()
        return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def examples(self, rows):
        return {"x": rows.table["x"].to_numpy()[:, None]}

    def loss(self, model, batch):
        if told("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if told("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if told("wait"):
            time.sleep(600)
        if told("leave"):  # a child holds whatever pipes it was given, out of reach of the group's end
            child = os.fork()
            (HERE / f"child-{child or os.getpid()}").touch()
            if not child:
                os.setsid()
                time.sleep(60)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        if told("read"):
            assert sys.stdin.read() == ""
        if told("raise"):
            raise ValueError("row 7: Anna")
        if told("nan"):
            return model(batch["x"]).sum() * float("nan")
        if told("parts"):
            return model[2](model[0](batch["x"])).square().mean()
        return (model(batch["x"]) - 1).square().mean()

    def metrics(self, model, batch):
        if told("many"):
            return {f"m{i}": Mean(1, 1) for i in range(33)}
        if told("name"):
            return {"Anna is ill": Mean(1, 1)}
        return {"error": Mean((model(batch["x"]) - 1).abs().sum(), len(batch["x"]))}
"""


class Site:
    """A bundle with faults to switch on, and the group that runs it."""

    def __init__(self, folder, ranks, executor):
        self.folder, self.ranks, self.executor, self.rounds = folder, ranks, executor, 0
        (folder / "code").mkdir()
        (folder / "code" / "task.py").write_text(TASK.replace("{folder!r}", repr(str(folder))))
        pq.write_table(pa.table({"x": np.arange(32, dtype=np.float32)}), folder / "rows.parquet")
        self.start()

    def start(self):
        self.closed = False
        self.group = self.executor.start(Layout(data=self.ranks), self.folder / "group")
        opened = opening(self.folder, "Fit", "code", 0.25, seed=0)
        self.group.order(opened, 120)
        self.weights = str(self.folder / "weights.f32")
        self.signature = self.group.order(orders.Initialise(seed=0, output=self.weights), 120).signature

    def fault(self, kind, rank):
        (self.folder / f"{kind}-{rank}").touch()

    def train(self, timeout=120.0, signature=None):
        self.rounds += 1  # the same round again would go on where it stands
        order = orders.Train(
            seed=self.rounds,
            weights=self.weights,
            signature=signature or self.signature,
            output=str(self.folder / "update.f32"),
            done=40,
            steps=3,
            batch=4,
            optimiser=Optimiser(),
            sync=Sync(period=3),
        )
        return self.group.order(order, timeout)

    def evaluate(self):
        return self.group.order(orders.Evaluate(weights=self.weights, signature=self.signature), 120)

    def close(self):
        """End the group and see that none of its processes is left."""
        self.group.close()
        self.closed = True
        for mark in self.folder.glob("pid-*"):
            pid = int(re.sub(r"\D", "", mark.name))
            mark.unlink()
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not list((self.folder / "group").glob("meeting-*"))


@pytest.fixture(scope="module", params=["local", "ray"])
def executor(request):
    if request.param == "ray":
        yield request.getfixturevalue("ray_cluster")
        return
    made = LocalExecutor()
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory, executor):
    site = Site(tmp_path_factory.mktemp("two"), 2, executor)
    yield site
    site.close()


@pytest.fixture
def two(pair):
    if pair.closed:
        pair.start()
    return pair


@pytest.fixture
def one(tmp_path, executor):
    site = Site(tmp_path, 1, executor)
    yield site
    site.close()


def test_what_user_code_does_wrong_is_told_and_the_group_stays_fit(one):
    one.fault("read", 0)
    one.fault("raise", 0)
    with pytest.raises(TaskFailed, match=r"^task\.py: line \d+: ValueError: its words stay in the log"):
        one.train()
    one.fault("many", 0)
    with pytest.raises(TaskFailed, match="33 of them where 32 may leave"):
        one.evaluate()
    one.fault("name", 0)
    with pytest.raises(TaskFailed, match="metric …: a name is up to 128 letters"):
        one.evaluate()
    with pytest.raises(TaskFailed, match=r"^task\.py: Fit has no method 'predict'; write it"):
        one.group.order(orders.Predict(weights=one.weights, signature=one.signature, output="unused"), 60)
    assert one.train().examples == 12
    assert one.evaluate().totals["error"].count == 8
    assert not list(one.folder.glob("*-0"))


def test_of_two_ranks_the_one_with_the_loss_that_is_not_finite_is_named(two):
    for rank in (1, 0):
        two.fault("nan", rank)
        with pytest.raises(TaskFailed, match=rf"^loss is nan at step 41 of the run at rank {rank}; lower"):
            two.train()


def test_two_ranks_that_go_round_the_models_forward_are_told(two):
    two.fault("parts", 0)
    two.fault("parts", 1)
    with pytest.raises(TaskFailed, match=r"^loss does not call model\(\.\.\.\)"):
        two.train()
    assert two.train().examples == 12


def test_a_stopped_rank_ends_the_order_in_its_time(two):
    two.fault("stop", 1)
    with pytest.raises(Unavailable, match=r"no reply to 'train' in 1 s"):
        two.train(timeout=1)
    # An order longer than a pipe must not wait for the stopped rank to read it.
    long = tuple(TensorSpec(name=f"{n}." + "x" * 100, shape=(1,)) for n in range(5000))
    with pytest.raises(Unavailable, match=r"no reply to 'train' in 1 s"):
        two.train(timeout=1, signature=long)
    two.close()


def test_the_other_goes_on_without_a_killed_rank(two):
    two.fault("kill", 0)
    assert two.train(timeout=60).examples == 12
    two.close()
    with pytest.raises(Unavailable, match="its group was ended"):
        two.train()


def test_a_rank_is_missed_though_a_process_it_started_lives_on(one):
    one.fault("leave", 0)
    assert one.train().examples == 12, "another has taken its place"
    one.group.close()
    (child,) = one.folder.glob("child-*")
    os.kill(int(child.name.removeprefix("child-")), signal.SIGKILL)


def test_a_cluster_is_joined_by_its_address_and_token(ray_cluster, tmp_path, monkeypatch):
    driver = ray_cluster._running()
    monkeypatch.setenv("RAY_AUTH_TOKEN", driver.environment["RAY_AUTH_TOKEN"])
    choice = Executor(kind="ray", address=driver.ready()["address"], cpus=2)
    guest = RayExecutor(choice, 1, tmp_path / "guest")
    assert [len(node.devices) for node in guest.nodes()] == [2], "of four processors"
    site = Site(tmp_path, 1, guest)
    assert site.train().examples == 12
    site.close()
    guest.close()
    assert ray_cluster.nodes(), "who started it still has it"


def test_closing_ends_the_order_under_way(one):
    one.fault("wait", 0)
    ended = []

    def train():
        with pytest.raises(Unavailable, match="its group was ended"):
            one.train()
        ended.append(True)

    thread = threading.Thread(target=train)
    thread.start()
    while (one.folder / "wait-0").exists():
        time.sleep(0.01)
    one.group.close()
    thread.join(10)
    assert ended == [True]
