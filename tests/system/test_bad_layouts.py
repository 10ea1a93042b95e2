"""Layouts that cannot be, models that do not fit, ranks that disagree or are lost as they start, told to their user."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.catalogue import Catalogue
from atoll.errors import Denied, TaskFailed, Unavailable
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.local import LocalExecutor
from atoll.runtime.site import create
from atoll.spec import order as orders
from atoll.spec.fleet import Device, Executor, Node, SiteFile
from atoll.spec.job import Optimiser
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync
from tests.opening import opening
from tests.system.conftest import PURPOSE

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]
TASK = """\
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atoll import Mean
from atoll.tasks.gpt import GPT, Shape


class Words:
    def __init__(self, width=16, odd="", deaths=""):
        self.width, self.odd, self.deaths, self.calls = width, odd, deaths, 0

    @property
    def rank(self):
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def model(self):
        model = GPT(Shape(vocabulary=32, width=self.width, layers=2, heads=4, length=8))
        if self.odd == "weights":
            model.head.weight.data += self.rank
        return model

    def examples(self, rows):
        death = next(Path(self.deaths).glob("death-*"), None) if self.deaths and self.rank == 1 else None
        if death is not None:
            death.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"tokens": (rows.table["x"].to_numpy()[:, None] * 3 + np.arange(9)) % 32}

    def loss(self, model, batch):
        self.calls += 1
        time.sleep(0.1 if self.odd == "loss" else 0.0)  # a checkpoint is written while steps go on
        answers = model(batch["tokens"][:, :-1])
        loss = nn.functional.cross_entropy(answers.flatten(0, 1), batch["tokens"][:, 1:].flatten())
        return loss * float("nan") if self.odd == "loss" and self.rank == 1 and self.calls == 5 else loss

    def metrics(self, model, batch):
        return {"one": Mean(1.0, 1)}
"""


def rows(path):
    pq.write_table(pa.table({"x": np.arange(64)}), path)
    return path


@pytest.fixture(scope="module")
def place(make_home, tmp_path_factory):
    """A hub with two sites: berlin's machine has four devices, bonn's has one of 64 MB."""
    home = make_home(tmp_path_factory.mktemp("layouts"))
    for name, devices, dataset in (("berlin", 4 * (Device(memory_bytes=8 << 30),), "rows"), ("bonn", (), "few")):
        folder = home.path / "sites" / name
        devices = devices or (Device(memory_bytes=64 << 20),)
        site = SiteFile(name=name, nodes=(Node(devices=devices),), executor=Executor(sandbox="off"))  # for `deaths`
        create(folder, site, SITE_POLICY)
        Catalogue(folder).add(dataset, rows(folder / "rows.parquet"), (PURPOSE,), 5)
    service = home.start("hub", "start")
    for name in ("berlin", "bonn"):
        home.seen("site.connected", site__name=name)
    yield home
    service.end()
    assert home.empty()


def refused(place, code, dataset="rows", **changes):
    """Run a job that cannot be; return what its user is told, in one line."""
    data, before = {"dataset": dataset}, len(place.journal("run.merged"))
    said = place.atoll("run", place.job(task=TASK, task__name="Words", data=data, **changes), code=code)
    assert len(place.journal("run.merged")) == before, "nothing was trained"
    return " ".join(said.split())


@pytest.mark.parametrize(
    ("layout", "error", "words"),
    [
        ({"tensor": 3}, TaskFailed, "layout.tensor: 3 does not divide the model's 4 heads; set it to 2"),
        ({"pipeline": 3}, TaskFailed, "layout.pipeline: 3 ranks for the model's 2 layers, .* set it to 2"),
        ({"context": 3}, TaskFailed, "layout.context: 3 does not divide the 8 positions of a sequence; set it to"),
        ({"data": 17}, Denied, "layout: 17 ranks, and its machines take 16 at most; set smaller degrees"),
    ],
)
def test_a_layout_that_does_not_divide_is_told_with_the_nearest_that_does(place, layout, error, words):
    said = refused(place, error.exit_code, layout=layout, batch=24)
    assert re.search(rf"berlin( refuses)?: {words}", said), said


def test_a_model_that_does_not_fit_is_told_in_bytes_before_it_starts(place):
    said = refused(place, Unavailable.exit_code, dataset="few", task__params={"width": 512})
    found = re.search(r"bonn does not train: a rank needs (\d+) MB and its device has 67\.1 MB; (.*)", said)
    assert found, said
    assert int(found[1]) > 67


def test_ranks_with_other_weights_are_told_before_they_train_apart(place):
    said = refused(place, TaskFailed.exit_code, layout={"data": 2}, task__params={"odd": "weights"})
    assert "berlin: model: rank 1 has other weights before step 1 of the run than rank 0; " in said


def test_a_rank_that_is_lost_while_it_starts_is_replaced_and_one_that_always_is_ends_the_run(place, tmp_path):
    asked = {"task": TASK, "task__name": "Words", "layout": {"data": 2}, "data": {"dataset": "rows"}}
    runs = []
    for number, deaths in enumerate((0, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for death in range(deaths):
            (folder / f"death-{death}").touch()
        runs.append(place.asked("run", place.job(**asked, task__params={"deaths": str(folder)}))["run"])
        assert not list(folder.iterdir())
    assert place.weights(runs[0]) == place.weights(runs[1]) == place.weights(runs[2])
    for death in range(20):
        (tmp_path / f"death-{death}").touch()
    job = place.job(**asked, task__params={"deaths": str(tmp_path)})
    said = " ".join(place.atoll("run", job, code=Unavailable.exit_code).split())
    assert "berlin: worker: a rank ended by signal SIGKILL" in said


@pytest.mark.parametrize("kept", [True, False])
def test_a_loss_that_is_no_number_is_told_with_its_step_its_rank_and_the_last_good_checkpoint(tmp_path, kept):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "task.py").write_text(TASK)
    rows(tmp_path / "rows.parquet")
    executor = LocalExecutor()
    group = executor.start(Layout(data=2), tmp_path / "group")
    try:
        layout, params = Layout(data=2), {"odd": "loss"}
        group.order(opening(tmp_path, "Words", "code", params=params, layout=layout), 120)
        weights = str(tmp_path / "weights.f32")
        made = group.order(orders.Initialise(seed=0, output=weights), 120)
        order = orders.Train(
            seed=0,
            weights=weights,
            signature=made.signature,
            output=str(tmp_path / "update.f32"),
            done=40,
            steps=8,
            batch=8,
            optimiser=Optimiser(),
            sync=Sync(period=8),
            checkpoint=str(tmp_path / "checkpoint") if kept else None,
            checkpoint_steps=3,
        )
        said = "loss is nan at step 45 of the run at rank 1"
        said += ", and the last good checkpoint is of step 43; lower" if kept else "; lower"
        with pytest.raises(TaskFailed, match=f"^{said} the optimiser's rate"):
            group.order(order, 120)
    finally:
        group.close()
        executor.close()
