"""Private steps as a worker takes them: noise in each of them, and which models and losses are refused."""

import numpy as np
import pytest
import torch
from torch import nn

from atoll.errors import TaskFailed
from atoll.inner.learner import ModuleLearner
from atoll.inner.memory import Memory
from atoll.inner.mesh import Mesh
from atoll.inner.probe import measure
from atoll.inner.steps import Pull
from atoll.inner.vector import save_vector
from atoll.spec.compute import Compute
from atoll.spec.job import Optimiser
from atoll.spec.order import Probe, Train
from atoll.spec.sync import Sync
from tests.opening import opening
from tests.private import PLAIN, WIDTH, Line, Own, data, made, part, stepped


class Weighted:
    def loss(self, model, batch):  # as a mean over the tokens of a batch is
        weight = batch["y"].abs()
        return ((model(batch["x"])[:, 0] - batch["y"]).square() * weight).sum() / weight.sum()


class Decayed:
    def loss(self, model, batch):
        return Line().loss(model, batch) + 0.1 * sum(one.square().sum() for one in model.parameters())


class Summed:
    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"], reduction="sum")


class Scaled:
    def loss(self, model, batch):  # by what one expects, whatever there is
        return Summed().loss(model, batch) / 10


class Shapeless:
    def loss(self, model, batch):
        return (model(batch["x"])[:, 0] - batch["y"]).square()


class Drawing(nn.Module):
    """Draws in two layers, of which the second draws other numbers in a smaller batch."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.drop = nn.Linear(WIDTH, 12), nn.Linear(12, 1), nn.Dropout(0.5)

    def forward(self, x):
        made = self.drop(torch.tanh(self.into(self.drop(x))))
        return self.out(made + 0.1 * torch.randn_like(made))


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 4), nn.Linear(4, 1)

    def forward(self, x):
        made = self.into(x)
        return self.out(made - made.mean(0))


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.table = nn.Linear(WIDTH, 1), nn.Embedding(5, 1)

    def forward(self, x):
        return self.line(x) + self.table(torch.arange(5)).mean()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.join = nn.Linear(WIDTH, WIDTH), Join()

    def forward(self, x):
        return self.join(self.line(x), x)


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, one, other):
        return ((one + other) * self.weight).sum(1, keepdim=True)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(WIDTH, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.mean()
        return self.line(x)


def test_an_empty_batch_is_a_step_of_noise_alone():
    net = made()
    before = net.weight.detach().clone()
    (step,) = stepped(net, [part(slice(0, 0))])
    assert (step.loss, step.examples) == (0.0, 10)
    assert not torch.equal(net.weight, before)


def test_two_runs_of_one_seed_differ_and_a_step_does_not_tell_how_many_examples_it_had():
    first, second = made(), made()
    steps = stepped(first, [part(slice(0, 13)), part(slice(0, 4))])
    stepped(second, [part(slice(0, 13)), part(slice(0, 4))])
    assert not torch.equal(first.weight, second.weight)
    assert [step.examples for step in steps] == [10, 10]


def test_the_module_is_the_users_own_again_after_the_steps():
    net = made(Own)
    known = set(vars(net)), set(vars(net.line))
    stepped(net, [data()])
    assert (set(vars(net)), set(vars(net.line))) == known
    assert all(not vars(one) for one in net.parameters())
    assert not net._forward_hooks
    assert not net._backward_hooks


def test_a_proximal_pull_is_added_after_the_noise():
    net = made()
    pull = Pull.from_here(net, 1e6)
    with torch.no_grad():
        net.weight += 1.0
    stepped(net, [data()], bends=[pull])
    assert net.weight.detach().mean().item() == pytest.approx(-0.1 * 1e6, rel=1e-3)  # the pull is not clipped


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), Line, "'1' is a BatchNorm1d, in"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 1)), Line, "'0' is a BatchNorm1d, in"),
        (lambda: nn.ModuleList([nn.LSTM(3, 4), nn.Linear(3, 1)]), Line, "'0' is a LSTM, whose gradients Opacus cannot"),
        (Centred, Line, "loss: an example's gradient changes with the other examples of its batch"),
        (None, Weighted, "loss: an example's gradient changes with the other examples of its batch"),
        (None, Summed, "loss: an example's gradient changes with how many examples its batch has, so that one row"),
        (None, Scaled, "loss: an example's gradient changes with how many examples its batch has, so that one row"),
        (Drawing, Summed, "loss: an example's gradient changes with how many examples its batch has, so that one"),
        (None, Shapeless, "loss: is no number to take a gradient of"),
        (None, Decayed, "model: the gradient of 'weight' cannot be told apart by example"),
        (Places, Line, "model: the gradient of 'table.weight' cannot be told apart by example"),
        (Two, Line, "model: Opacus cannot tell its gradients apart by example"),
        (Counting, Line, "model: buffer 'seen' changes as the model learns, and would leave without noise"),
    ],
)
def test_what_mixes_examples_is_refused(model, task, words):
    with pytest.raises(TaskFailed, match=words):
        stepped(made(model), [part(slice(0, 10))], task=task())


@pytest.mark.parametrize("count", [2, 3, 5, 50])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_drawn_in_each_layer_is_no_mixing_either(count, seed):
    assert len(stepped(made(Drawing, seed), [part(slice(0, count))])) == 1


@pytest.mark.parametrize("spoilt", [[0], [1, 4], [0, 1, 2, 3, 4, 5, 6, 7]], ids=str)
def test_a_row_whose_loss_is_not_finite_counts_for_nothing_and_neither_ends_the_run_nor_hides_a_sum(spoilt):
    bad = {name: values.clone() for name, values in data().items()}
    bad["x"][spoilt] = 1e30
    steps = stepped(net := made(), [bad, data()])
    assert all(np.isfinite(step.loss) for step in steps)
    assert all(one.isfinite().all() for one in net.parameters())
    with pytest.raises(TaskFailed, match="with how many examples"):
        stepped(made(), [bad, data()], task=Summed())


def test_a_probe_of_a_private_job_goes_on_past_a_row_whose_loss_is_not_finite():
    arrays = {name: values.numpy().copy() for name, values in data().items()}
    arrays["x"][0] = 1e30
    asked = Probe(seed=1, batch=10, optimiser=Optimiser(rate=0.1))
    batches = [{name: one[:10] for name, one in arrays.items()}] * 3
    with pytest.raises(TaskFailed, match="loss is inf at step 1"):
        measure(Breaking(), asked, Mesh(), Compute(), arrays, batches)
    found = measure(Breaking(), asked.model_copy(update={"private": True}), Mesh(), Compute(), arrays, batches)
    assert found.step_seconds > 0


def test_a_loss_of_no_number_is_refused_without_its_shape_which_tells_of_the_sample():
    with pytest.raises(TaskFailed) as caught:
        stepped(made(), [part(slice(0, 7))], task=Shapeless())
    assert not any(letter.isdigit() for letter in str(caught.value))


def test_dropout_is_no_mixing():
    net = made(lambda: nn.Sequential(nn.Linear(WIDTH, 40), nn.Dropout(0.5), nn.Linear(40, 1)))
    assert len(stepped(net, [data(), data()])) == 2


class Breaking(Line):
    """A task whose worker is lost in its step number ``breaks``; three losses of the first one are a trial."""

    def __init__(self, breaks=-9):
        self.breaks = breaks + 3

    def model(self):
        return nn.Linear(WIDTH, 1)

    def loss(self, model, batch):
        self.breaks -= 1
        if self.breaks == 0:
            raise ConnectionError("a peer is gone")
        return super().loss(model, batch)


def ordered(learner, folder, **sync):
    save_vector(learner.vector(), folder / "weights.f32")
    known = {"seed": 1, "weights": str(folder / "weights.f32"), "signature": learner.signature, "output": ""}
    known |= {"done": 0, "steps": 6, "batch": 10, "optimiser": Optimiser(rate=0.1), "private": PLAIN}
    return Train(**known, sync=Sync.model_validate({"period": 6, **sync}))


def batches(first):
    arrays = {name: values.numpy() for name, values in data().items()}
    return ({name: one[7 * step : 7 * step + 7] for name, one in arrays.items()} for step in range(first, 6))


def test_a_round_that_is_gone_on_with_has_other_noise_than_any_other_that_goes_on_from_there(tmp_path):
    learner = ModuleLearner(Breaking(4), 3, Mesh())
    order, opened = ordered(learner, tmp_path), opening(tmp_path)
    work = learner.round(opened, order, batches(0), Memory())
    with pytest.raises(ConnectionError):
        list(work.steps(batches))
    assert (work.step, work.examples) == (3, 3 * PLAIN.expected)
    carried = work.carried()
    kept = {name: one.value.clone() for name, one in carried.parts[0].items()}
    updates = []
    for _ in range(2):
        other = ModuleLearner(Breaking(), 3, Mesh())
        again = other.round(opened, order, batches(0), Memory(carried=carried, again=True))
        assert again.step == 3
        found = dict(other._module.named_parameters())
        assert all(torch.equal(found[name.removeprefix("model.")], one) for name, one in kept.items())
        assert [step.number for step in again.steps(batches)] == [3, 4, 5]
        updates.append(again.update())
    assert not np.array_equal(*updates)


def test_a_round_that_no_promise_goes_with_is_refused_whoever_planned_it(tmp_path):
    learner = ModuleLearner(Breaking(), 3, Mesh())
    with pytest.raises(TaskFailed, match=r"^privacy: does not go with sync.exchange: gradient: sums what is not"):
        learner.round(opening(tmp_path), ordered(learner, tmp_path, exchange="gradient"), data(), Memory())
