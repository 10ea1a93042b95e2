"""A small model, its rows, and private steps over them, for tests that need the extra `privacy`."""

import numpy as np
import torch
from torch import nn

from atoll.inner.mesh import Mesh
from atoll.inner.optimiser import make
from atoll.inner.parallelize import parallelize
from atoll.inner.private import private_steps
from atoll.inner.steps import Start
from atoll.spec.job import Optimiser
from atoll.spec.privacy import PrivateSteps

ROWS, WIDTH = 50, 3
PLAIN = PrivateSteps(clip=1.0, multiplier=1.0, sampling=0.2, rows=ROWS)


class Line:
    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])


class Own(nn.Module):
    """A parameter of its own, whose gradients Opacus has by another way."""

    def __init__(self):
        super().__init__()
        self.shift, self.line = nn.Parameter(torch.zeros(WIDTH)), nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.line(torch.tanh(x + self.shift))


def data(count=ROWS, seed=0):
    drawn = np.random.default_rng(seed)
    return {
        "x": torch.from_numpy(drawn.normal(size=(count, WIDTH)).astype(np.float32)),
        "y": torch.from_numpy(drawn.normal(size=count).astype(np.float32)),
    }


def part(rows):
    return {name: values[rows] for name, values in data().items()}


def made(model=None, seed=1):
    torch.manual_seed(seed)
    return model() if model else nn.Linear(WIDTH, 1)


def stepped(model, batches, asked=PLAIN, task=None, bends=(), compute=None):
    sgd = make(Optimiser(kind="sgd", rate=0.1), model)
    spread = parallelize(model, Mesh(), compute)
    return list(private_steps(task or Line(), spread, sgd, batches, Start(seed=0), bends, asked))


def without_noise(**fields):
    return PLAIN.model_copy(update={"multiplier": 0.0, **fields})
