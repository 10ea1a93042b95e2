"""A Flower client as its pages show one, run unmodified, whether Flower is installed or not."""

import numpy as np
import pytest

from atoll import Budget
from atoll.errors import TaskFailed
from atoll.inner.arrays import ArraysLearner
from atoll.inner.mesh import Mesh
from atoll.tasks.flower import FlowerTask

try:
    from flwr.client import NumPyClient  # pyright: ignore[reportMissingImports]
except ImportError:
    NumPyClient = object


class FlowerClient(NumPyClient):
    def __init__(self, x, y):
        self.x, self.y = x, y
        self.weights = [np.zeros((2, 1)), np.zeros(1), np.array(5)]  # the last as torch counts BatchNorm's batches

    def get_parameters(self, config):
        return self.weights

    def fit(self, parameters, config):
        self.weights = parameters
        for _ in range(config["local_epochs"]):
            error = self.x @ self.weights[0] + self.weights[1] - self.y
            self.weights[0] = self.weights[0] - 0.1 * self.x.T @ error / len(self.x)
            self.weights[1] = self.weights[1] - 0.1 * error.mean(axis=0)
            self.weights[2] = self.weights[2] + 1
        return self.get_parameters({}), len(self.x), {"train_loss": float((error**2).mean()), "note": "done"}

    def evaluate(self, parameters, config):
        error = self.x @ parameters[0] + parameters[1] - self.y
        return float((error**2).mean()), len(self.x), {"within": float((abs(error) < 1).mean()), "note": "done"}


class Linear(FlowerTask):
    def client(self, examples):
        return FlowerClient(**examples) if examples else FlowerClient(None, None)


X = np.random.default_rng(0).normal(size=(30, 2))
EXAMPLES = {"x": X, "y": X @ [[1.0], [-2.0]] + 0.5}


def budget(steps=20, batch=30, done=40):
    return Budget(steps, batch, done, done // steps + 1, iter(()))


def test_its_parameters_are_named_by_their_place_and_its_counters_stay():
    learner = ArraysLearner(Linear(), 0, Mesh())
    assert [(spec.name, spec.shape) for spec in learner.signature] == [("0", (2, 1)), ("1", (1,))]
    assert list(learner.arrays()) == ["0", "1", "2"]
    assert learner.arrays()["2"] == 5


def test_its_fit_is_a_rounds_work_with_its_own_loss_and_examples():
    task = Linear()
    fitted = task.fit(task.arrays(), EXAMPLES, budget())
    known, used, told = FlowerClient(**EXAMPLES).fit(FlowerClient(**EXAMPLES).weights, {"local_epochs": 20})
    assert [array.tolist() for array in fitted.arrays.values()] == [array.tolist() for array in known]
    assert (fitted.examples, fitted.loss) == (used, told["train_loss"]) == (30, told["train_loss"])


def test_a_fit_that_tells_no_loss_is_evaluated():
    class Silent(FlowerClient):
        def fit(self, parameters, config):
            found, used, _ = super().fit(parameters, config)
            return found, used, {}

    class Task(Linear):
        def client(self, examples):
            return Silent(**examples)

    arrays = Linear().arrays()
    fitted = Task().fit(arrays, EXAMPLES, budget())
    assert fitted.loss == FlowerClient(**EXAMPLES).evaluate(list(fitted.arrays.values()), {})[0]


def test_what_it_evaluates_becomes_means_over_its_examples():
    task = Linear()
    found = task.metrics(task.arrays(), EXAMPLES)
    loss, _, told = FlowerClient(**EXAMPLES).evaluate(list(task.arrays().values()), {})
    assert set(found) == {"loss", "within"}  # a text is no metric
    assert (found["loss"].total / found["loss"].count, found["loss"].count) == (pytest.approx(loss), 30)
    assert found["within"].total / 30 == pytest.approx(told["within"])


def test_config_and_first_parameters_can_be_the_tasks_own():
    first = [np.ones((2, 1)), np.ones(1), np.array(0)]

    class Task(Linear):
        def parameters(self):
            return first

        def config(self, budget):
            return {"local_epochs": 2 if budget.round == 3 else 1}

    fitted = Task().fit(Task().arrays(), EXAMPLES, budget())
    known, _, _ = FlowerClient(**EXAMPLES).fit(list(first), {"local_epochs": 2})
    assert [array.tolist() for array in fitted.arrays.values()] == [array.tolist() for array in known]
    assert ArraysLearner(Task(), 0, Mesh()).vector().tolist() == [1, 1, 1]


def test_what_to_client_wraps_is_taken():
    class Wrapped:
        def __init__(self, client):
            self.numpy_client = client

    class Task(FlowerTask):
        def client(self, examples):
            return Wrapped(Linear().client(examples))

    assert Task().fit(Linear().arrays(), EXAMPLES, budget()).examples == 30


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (None, "client() returned a NoneType without get_parameters(); return a NumPyClient"),
        ({"get_parameters": []}, "get_parameters() returned no list of arrays; write the task's parameters()"),
        ({"fit": ([], 1, {})}, "fit() of the client returned 0 parameters where it was given a list of 3"),
        ({"fit": (3.0, 1, {})}, "fit() of the client returned a float where it was given a list of 3"),
        ({"fit": [1, 2]}, "fit() of the client returned a list; return (parameters, examples, metrics)"),
        ({"fit": ([], "1", {})}, "fit() of the client returned a tuple; return (parameters, examples, metrics)"),
        ({"fit": ([], 0, {})}, "fit() of the client used 0 examples; write the method, or give it examples"),
        ({"evaluate": (0.0, 0, {})}, "evaluate() of the client used 0 examples"),
        ({"evaluate": 0.5}, "evaluate() of the client returned a float; return (loss, examples, metrics)"),
    ],
)
def test_a_client_that_does_otherwise_is_told(client, words):
    class Task(FlowerTask):
        def client(self, examples):
            if client is None:
                return None
            made = FlowerClient(X, EXAMPLES["y"])
            for name, value in client.items():
                setattr(made, name, lambda *_, value=value: value)
            return made

    def all_of_it():
        task = Task()
        arrays = task.arrays()
        task.fit(arrays, EXAMPLES, budget())
        task.metrics(arrays, EXAMPLES)

    with pytest.raises(TaskFailed) as caught:
        all_of_it()
    assert words in str(caught.value)


def test_a_task_without_a_client_is_told():
    with pytest.raises(TaskFailed, match="FlowerTask has no method 'client'"):
        FlowerTask().arrays()
