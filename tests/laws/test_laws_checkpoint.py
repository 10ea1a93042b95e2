"""The law of checkpoints: a round interrupted at any step and gone on with is the undisturbed one, bit for bit."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from atoll.errors import Unavailable
from atoll.inner.checkpoint import write_tensors
from atoll.inner.made import make_model
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import parallelize
from atoll.inner.round import Round
from atoll.inner.task import load_task
from atoll.inner.vector import read_vector, save_vector, signature_of
from atoll.runtime.local import LocalExecutor
from atoll.spec import order as orders
from atoll.spec.job import Optimiser
from atoll.spec.model import with_control
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.opening import opening

TASK = """\
import os
import random
import signal

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 1)
        self.head.bias.requires_grad_(False)
        self.idle = nn.Linear(2, 2)  # no part of the loss
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.head(self.body(x))[:, 0] * (1 + 0.01 * float(self.calls))


class Fit:
    def __init__(self, fault=""):
        self.fault = fault

    def model(self):
        return Net()

    def examples(self, rows):
        x = np.stack([rows.table[f"x{i}"].to_numpy() for i in range(4)], axis=1)
        return {"x": x + 0.01 * np.random.normal(size=x.shape), "y": rows.table["y"].to_numpy()}

    def loss(self, model, batch):
        self.fail(model)
        noise = 0.1 * np.random.normal() + 0.1 * random.random()
        return nn.functional.mse_loss(model(batch["x"]), batch["y"]) + noise * model.head.weight.square().sum()

    def fail(self, model):
        ranks = torch.distributed.is_initialized() and torch.distributed.get_rank()
        if os.path.exists(f"{self.fault}-{ranks}-{int(model.calls)}"):
            os.remove(f"{self.fault}-{ranks}-{int(model.calls)}")
            os.kill(os.getpid(), signal.SIGKILL)
"""
STEPS, BATCH, DONE = 6, 8, 12
KINDS = {
    "adam": {"kind": "adam"},
    "adamw, from a state": {"kind": "adamw", "state": True},
    "sgd": {"kind": "sgd"},
    "sgd with momentum and a proximal term": {"kind": "sgd", "momentum": 0.9, "proximal": 0.1},
    "gradient": {"kind": "sgd", "exchange": "gradient"},
    "sgd with control variates": {"kind": "sgd", "control": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "bundle").mkdir()
    (folder / "bundle" / "task.py").write_text(TASK)
    x = np.random.default_rng(1).normal(size=(41, 4))
    columns = {f"x{i}": x[:, i] for i in range(4)}
    pq.write_table(pa.table({**columns, "y": np.sin(x[:, 0])}), folder / "rows.parquet")
    return folder


def opened(folder):
    return opening(folder, "Fit", params={"fault": str(folder / "fault")})


class Site:
    """A site's worker in this very process, new for each round: nothing but files outlives it."""

    def __init__(self, folder, home, kind="adam", state=False, momentum=0.0, **sync):
        self.opened, self.home = opened(folder), home
        model = self.model()
        signature = signature_of(model)
        vector = read_vector(model, signature)
        if sync.get("control"):
            rng, sync = np.random.default_rng(5), {**sync, "merge": "mean"}
            common, own = (0.1 * rng.normal(size=(2, vector.size))).astype(np.float32)
            signature, vector = with_control(signature), np.concatenate([vector, common])
            write_tensors(home / "control.safetensors", {"control": torch.from_numpy(own)}, {})
        save_vector(vector, home / "weights.f32")
        self.order = orders.Train(
            seed=3,
            weights=str(home / "weights.f32"),
            signature=signature,
            output=str(home / "update.f32"),
            done=DONE,
            steps=STEPS,
            batch=BATCH,
            optimiser=Optimiser(kind=kind, rate=0.01, momentum=momentum),
            sync=Sync(period=STEPS, **sync),
            state_out=str(home / "state.safetensors"),
            control_in=str(home / "control.safetensors") if sync.get("control") else None,
            checkpoint=str(home / "checkpoint-1"),
            checkpoint_steps=1,
        )
        if state:
            self.train()
            self.order = self.order.model_copy(update={"state_in": self.order.state_out, "state_out": None})
            shutil.rmtree(home / "checkpoint-1")

    def model(self):
        return make_model(load_task(Path(self.opened.bundle), self.opened.task), seed=3)

    def batches(self, first):
        rng = np.random.default_rng(7)
        made = [rng.normal(size=(BATCH, 5)).astype(np.float32) for _ in range(STEPS)]
        return [{"x": torch.from_numpy(rows[:, :4]), "y": torch.from_numpy(rows[:, 4])} for rows in made[first:]]

    def train(self, until=STEPS, **changes):
        """Take steps until ``until``; return the steps taken, and the update, loss and examples if that is the end."""
        order = self.order.model_copy(update=changes)
        task = load_task(Path(self.opened.bundle), self.opened.task)
        work = Round(self.opened, order, task, parallelize(self.model(), Mesh()))
        left = until - work.step
        taken = [step.number for step in itertools.islice(work.steps(self.batches), left)]
        if until < STEPS:
            return taken, None
        work.keep_state()
        return taken, (work.update().tobytes(), work.loss, work.examples)


@pytest.fixture(params=KINDS)
def site(request, folder, tmp_path):
    return Site(folder, tmp_path, **KINDS[request.param])


def test_a_round_interrupted_at_any_step_is_the_undisturbed_round(site):
    _, undisturbed = site.train(checkpoint=None)
    for stop in range(1, STEPS):
        assert site.train(until=stop) == (list(range(stop)), None)
        assert site.train() == (list(range(stop, STEPS)), undisturbed)
        shutil.rmtree(site.home / "checkpoint-1")


def test_a_round_interrupted_at_every_step_is_the_undisturbed_round(site):
    _, undisturbed = site.train(checkpoint=None)
    for stop in range(1, STEPS):
        assert site.train(until=stop) == ([stop - 1], None)
    assert site.train() == ([STEPS - 1], undisturbed)


def test_the_state_for_the_next_round_is_the_undisturbed_rounds(folder, tmp_path):
    site = Site(folder, tmp_path)
    site.train(checkpoint=None)
    undisturbed = (tmp_path / "state.safetensors").read_bytes()
    site.train(until=3)
    site.train()
    assert (tmp_path / "state.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("change", [{"done": 18}, {"seed": 4}, {"steps": 5}, {"optimiser": Optimiser(kind="sgd")}])
def test_another_orders_checkpoint_is_left_alone(folder, tmp_path, change):
    site = Site(folder, tmp_path)
    site.train(until=3)
    assert site.train(until=1, checkpoint_steps=0, **change)[0] == [0]
    assert site.train(until=4)[0] == [3]


def test_other_weights_make_it_another_round(folder, tmp_path):
    site = Site(folder, tmp_path)
    site.train(until=3)
    np.fromfile(tmp_path / "weights.f32", np.float32)[::-1].tofile(tmp_path / "weights.f32")
    assert site.train(until=1)[0] == [0]


def test_a_checkpoint_that_is_not_whole_costs_time_only(folder, tmp_path):
    site = Site(folder, tmp_path)
    _, undisturbed = site.train(checkpoint=None)
    site.train(until=3)
    older, path = sorted((tmp_path / "checkpoint-1").iterdir())
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert json.loads(whole[8:start])["__metadata__"]
    path.write_bytes(whole[:-1])
    assert site.train(checkpoint_steps=0) == (list(range(2, STEPS)), undisturbed), "the one before it is whole"
    older.unlink()
    flipped = whole[: start + 5] + bytes([whole[start + 5] ^ 1]) + whole[start + 6 :]
    for broken in (b"", whole[:-1], whole[:start], flipped, whole[:start] + bytes(len(whole) - start)):
        path.write_bytes(broken)
        assert site.train(checkpoint_steps=0) == (list(range(STEPS)), undisturbed)


class Ranks:
    """Worker processes, replaced when one was killed, as an agent does it."""

    def __init__(self, folder, ranks):
        self.folder, self.layout, self.executor = folder, Layout(data=ranks), LocalExecutor()
        self.killed = 0
        self.group = self.started()

    def started(self):
        return self.executor.start(self.layout, self.folder / "ranks")

    def order(self, order):
        if not self.group.whole:  # the last order's end came before the rank in a lost one's place
            self.group.close()
            self.group = self.started()
        try:
            self.group.order(opened(self.folder), 120)
            return self.group.order(order, 120)
        except Unavailable:
            self.group.close()
            self.group = self.started()
            self.killed += 1
            return self.order(order) if self.killed < 3 else None


@pytest.fixture(scope="module")
def two(folder):
    ranks = Ranks(folder, 2)
    yield ranks
    ranks.group.close()
    ranks.executor.close()


@pytest.mark.parametrize("exchange", ["delta", pytest.param("gradient", marks=pytest.mark.slow)])
def test_two_ranks_of_which_one_is_killed_give_the_undisturbed_round(folder, tmp_path, two, exchange):
    weights, output, killed = str(tmp_path / "weights.f32"), tmp_path / "update.f32", two.killed
    order = orders.Train(
        seed=3,
        weights=weights,
        signature=two.order(orders.Initialise(seed=3, output=weights)).signature,
        output=str(output),
        done=DONE,
        steps=STEPS,
        batch=BATCH + 1,
        optimiser=Optimiser(kind="adam", rate=0.01),
        sync=Sync(period=STEPS, exchange=exchange),
    )
    said, undisturbed = two.order(order), output.read_bytes()
    output.unlink()
    (folder / "fault-1-4").touch()  # rank 1, before its fifth step
    order = order.model_copy(update={"checkpoint": str(tmp_path / "checkpoint-1"), "checkpoint_steps": 3})
    again = two.order(order)
    assert (again.steps, again.examples) == (said.steps, said.examples)
    assert two.killed == killed, "the group went on"
    assert not (folder / "fault-1-4").exists()
    # The other took some steps by itself: the same examples, but dropout and batch statistics are of other shares.
    found, expected = np.frombuffer(output.read_bytes(), np.float32), np.frombuffer(undisturbed, np.float32)
    assert np.corrcoef(found, expected)[0, 1] > 0.9
    assert np.ptp(np.frombuffer(undisturbed, np.float32)) > 0
