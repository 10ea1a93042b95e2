"""A round of a small GPT at one site, with faults that its ranks come to, for any executor."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.spec import order as orders
from atoll.spec.job import Optimiser
from atoll.spec.sync import Sync
from tests.opening import opening

TASK = """\
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from atoll import Mean
from atoll.tasks.gpt import GPT, Shape

HERE = Path({folder!r})
SHAPE = Shape(vocabulary=32, width=16, layers=4, heads=4, length=8)


class Words:
    def model(self):
        return GPT(SHAPE)

    def examples(self, rows):
        first = rows.table["x"].to_numpy()
        return {"tokens": (first[:, None] * 3 + np.arange(9)) % 32, "number": first}

    def loss(self, model, batch):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        with open(HERE / "seen.jsonl", "a") as file:
            file.write(json.dumps([os.getpid(), rank, batch["number"].tolist()]) + "\\n")
        for fault in HERE.glob(f"*-{rank}-*"):
            kind, _, count = fault.name.split("-")
            fault.unlink(missing_ok=True)
            if int(count):
                fault.with_name(f"{kind}-{rank}-{int(count) - 1}").touch()
            else:
                os.kill(*((os.getppid(), signal.SIGKILL) if kind == "ABOVE" else (os.getpid(), getattr(signal, kind))))
        doom = HERE / f"doomed-{rank}"  # from so many losses on, whoever it is
        if doom.exists() and len((HERE / "seen.jsonl").read_text().splitlines()) > int(doom.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5 if (HERE / "slow").exists() else 0.02)
        answer = model(batch["tokens"][:, :-1])
        return torch.nn.functional.cross_entropy(answer.flatten(0, 1).float(), batch["tokens"][:, 1:].flatten())

    def metrics(self, model, batch):
        return {"one": Mean(1.0, 1)}
"""
STEPS = 12


class Site:
    """A group at one round of a small GPT, with faults that its ranks come to."""

    def __init__(self, folder, layout, compute, executor):
        self.folder = folder
        (folder / "code").mkdir()
        (folder / "code" / "task.py").write_text(TASK.replace("{folder!r}", repr(str(folder))))
        pq.write_table(pa.table({"x": np.arange(64)}), folder / "rows.parquet")
        self.executor = executor
        self.begin(layout, compute)
        self.weights = str(folder / "weights.f32")
        self.signature = self.group.order(orders.Initialise(seed=0, output=self.weights), 120).signature
        self.reply = None

    def begin(self, layout, compute):
        """Start a group, the first or another."""
        self.group = self.executor.start(layout, self.folder / "group")
        opened = opening(self.folder, "Words", "code", 0.25, seed=0, layout=layout, compute=compute)
        self.group.order(opened, 120)

    def fault(self, kind, rank, after):
        """Have a rank meet a signal at the loss after so many others; ABOVE kills the process that started it."""
        (self.folder / f"{kind}-{rank}-{after}").touch()

    def train(self, steps=STEPS, seed=0, **more):
        order = orders.Train(
            seed=seed,
            weights=self.weights,
            signature=self.signature,
            output=str(self.folder / "update.f32"),
            done=0,
            steps=steps,
            batch=8,
            optimiser=Optimiser(kind="adamw", rate=0.01),
            sync=Sync(period=steps),
            **more,
        )
        self.reply = self.group.order(order, 60)
        return np.fromfile(self.folder / "update.f32", dtype=np.float32)

    def seen(self):
        """Return [pid, rank, examples] of each loss, in the order of their writing."""
        return [json.loads(line) for line in (self.folder / "seen.jsonl").read_text().splitlines()]

    def pids(self):
        """Return the ranks' processes that have trained."""
        return {pid for pid, _, _ in self.seen()} if (self.folder / "seen.jsonl").exists() else set()


def check_same(site, undisturbed):
    """The same steps were taken: the loss and the weights are those of a round that lost nobody, but for rounding."""
    expected = undisturbed.train()
    found = site.train()
    assert site.reply.steps == STEPS
    assert site.reply.examples == undisturbed.reply.examples == STEPS * 8
    assert site.reply.loss == pytest.approx(undisturbed.reply.loss, abs=1e-5)
    # AdamW divides by a gradient's size, so that rounding of one near zero shows.
    assert np.median(np.abs(found - expected)) < 1e-5
    return found, expected
