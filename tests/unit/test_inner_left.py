"""A round that is left when its group is lost goes on in the model that is there, as one that lost nobody does."""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.inner.learner import ModuleLearner
from atoll.inner.memory import Memory
from atoll.inner.mesh import Mesh
from atoll.inner.personal import chosen, shared, shared_part
from atoll.inner.vector import save_vector
from atoll.spec.job import Optimiser
from atoll.spec.model import with_control
from atoll.spec.order import Train
from atoll.spec.sync import Sync
from tests.opening import opening

STEPS, BATCH = 6, 4
X = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
EXAMPLES = {"x": X, "y": X.sum(axis=1)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.layers(x)[:, 0]


class Task:
    """Its group is lost in the middle of its loss number ``breaks``, after the model has computed."""

    def __init__(self, breaks=None):
        self.breaks = breaks

    def model(self):
        return Net()

    def loss(self, model, batch):
        loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
        if self.breaks is not None:
            self.breaks -= 1
            if self.breaks < 0:
                self.breaks = None
                raise ConnectionError("a peer is gone")
        return loss


def batches(first):
    for step in range(first, STEPS):
        yield {name: array[step * BATCH : (step + 1) * BATCH] for name, array in EXAMPLES.items()}


def ordered(learner, folder, **sync):
    sync = Sync.model_validate({"period": STEPS, **sync})
    personal = chosen(learner.signature, sync.keep_local)
    signature, path = shared(learner.signature, personal), folder / "weights.f32"
    vector = shared_part(learner.vector(), learner.signature, personal)
    if sync.control:
        signature, vector = with_control(signature), np.concatenate([vector, np.zeros_like(vector)])
    save_vector(vector, path)
    return Train(
        seed=1,
        weights=str(path),
        signature=signature,
        output="",
        done=0,
        steps=STEPS,
        batch=BATCH,
        optimiser=Optimiser(kind="sgd" if sync.control else "adamw", rate=0.05),
        sync=sync,
    )


def done(work):
    for _ in work.steps(batches):
        pass
    state = {name: value.clone() for name, value in work._model.state_dict().items()}
    return work.update(), state, work.loss, work.examples


@pytest.mark.parametrize(
    "sync",
    [
        {},
        {"exchange": "gradient"},
        {"proximal": 0.1},
        {"keep_local": ["layers.1.*"]},
        {"control": True, "merge": "mean"},
    ],
)
def test_a_round_goes_on_in_the_model_that_is_there(tmp_path, sync):
    whole = ModuleLearner(Task(), 3, Mesh())
    order = ordered(whole, tmp_path, **sync)
    opened = opening(tmp_path)
    expected = done(whole.round(opened, order, EXAMPLES, Memory()))
    learner, memory = ModuleLearner(Task(breaks=3), 3, Mesh()), Memory()
    model = learner._module
    work = learner.round(opened, order, EXAMPLES, memory)
    with pytest.raises(ConnectionError):
        done(work)
    assert work.step == 3
    memory.carried, memory.again = work.carried(), True
    assert learner.among(Mesh())
    left = learner.round(opened, order.model_copy(update={"shares": (2, 2)}), EXAMPLES, memory, work)
    assert left is work
    assert left.step == 3
    found = done(left)
    assert learner._module is model
    assert np.array_equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(value, expected[1][name]) for name, value in found[1].items())
    assert found[2:] == expected[2:]


def test_another_round_begins_anew_and_forgets_what_was_carried(tmp_path):
    learner, memory, opened = ModuleLearner(Task(breaks=3), 3, Mesh()), Memory(), opening(tmp_path)
    order = ordered(learner, tmp_path)
    work = learner.round(opened, order, EXAMPLES, memory)
    with pytest.raises(ConnectionError):
        done(work)
    memory.carried, memory.again = work.carried(), True
    another = learner.round(opened, order.model_copy(update={"seed": 2}), EXAMPLES, memory, work)
    assert (another is work, another.step, memory.carried) == (False, 0, None)
    expected = done(ModuleLearner(Task(), 3, Mesh()).round(opened, order.model_copy(update={"seed": 2}), EXAMPLES))
    assert np.array_equal(done(another)[0], expected[0])


def test_what_nobody_can_go_on_from_is_told_as_a_broken_group(tmp_path):
    learner, memory, opened = ModuleLearner(Task(breaks=3), 3, Mesh()), Memory(), opening(tmp_path)
    order = ordered(learner, tmp_path)
    work = learner.round(opened, order, EXAMPLES, memory)
    with pytest.raises(ConnectionError, match="a peer"):
        done(work)
    memory.again = True
    with pytest.raises(ConnectionError, match="nothing in common"):
        learner.round(opened, order, EXAMPLES, memory, work)
