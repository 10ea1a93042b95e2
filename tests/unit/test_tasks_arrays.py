"""A task of named arrays in its worker and its replica: what travels, what comes back, and how each slip is told."""

import re

import numpy as np
import pyarrow as pa
import pytest

from atoll import Fitted, Mean
from atoll.errors import TaskFailed
from atoll.inner.arrays import ArraysLearner
from atoll.inner.checkpoint import read_tensors
from atoll.inner.learner import ModuleLearner, make_learner
from atoll.inner.made import make_examples
from atoll.inner.mesh import Mesh
from atoll.inner.task import load_task
from atoll.planner.points import points
from atoll.registry.weights import save
from atoll.serving.engine import load
from atoll.spec.document import sha256
from atoll.spec.job import Optimiser, TrainJob
from atoll.spec.model import Lineage, Model, TensorSpec
from atoll.spec.order import Probe, TaskName, Train
from atoll.spec.sync import Sync
from atoll.spec.task import Rows

EXAMPLES = {"x": np.arange(20, dtype=np.float32).reshape(10, 2)}
STEPS, BATCH = 3, 4


class Given:
    """A task whose arrays, and whose fit, are what it was given."""

    def __init__(self, arrays, fit=None):
        self.made, self.fitted, self.budgets = arrays, fit, []

    def arrays(self):
        return self.made() if callable(self.made) else self.made

    def examples(self, rows):
        return {"x": np.array(rows.table["x"].to_pylist())}

    def fit(self, arrays, examples, budget):
        self.budgets.append(budget)
        return self.fitted(arrays, examples, budget)

    def metrics(self, arrays, examples):
        return {"mean": Mean(float(arrays["w"].sum()) * len(examples["x"]), len(examples["x"]))}

    def predict(self, arrays, examples):
        return {"y": examples["x"].sum(axis=1) + arrays["w"].sum()}


def three():
    return {"w": np.array([[0.1, 0.2]]), "n": np.int64(7), "half": np.ones(3, np.float16)}


def batches(first):
    return ({"x": EXAMPLES["x"][:BATCH] + number} for number in range(first, STEPS))


def train(task, folder, **changes):
    """Do one round as a worker does; return the round and the arrays' learner."""
    learner = ArraysLearner(task, 3, Mesh())
    learner.vector().tofile(folder / "weights.f32")
    fields = {
        "seed": 3,
        "weights": str(folder / "weights.f32"),
        "signature": learner.signature,
        "output": str(folder / "update.f32"),
        "done": 6,
        "steps": STEPS,
        "batch": BATCH,
        "optimiser": Optimiser(),
        "sync": Sync(period=STEPS),
    }
    work = learner.round(None, Train(**{**fields, **changes}), EXAMPLES)
    assert [step.number for step in work.steps(batches)] == [STEPS - 1]
    return work, learner


def step_by(amount):
    def fit(arrays, examples, budget):
        for _ in budget.batches:
            for name in ("w", "half"):
                arrays[name] += np.array(amount, arrays[name].dtype)
        return Fitted(arrays, 0.5)

    return fit


# --- what travels


def test_floating_arrays_travel_as_float32_and_the_others_stay():
    learner = ArraysLearner(Given(three), 0, Mesh())
    assert [(spec.name, spec.shape) for spec in learner.signature] == [("w", (1, 2)), ("half", (3,))]
    assert learner.vector().dtype == np.float32
    np.testing.assert_array_equal(learner.vector(), np.array([0.1, 0.2, 1, 1, 1], np.float32))


def test_arrays_come_back_in_their_own_types_and_as_copies():
    learner = ArraysLearner(Given(three), 0, Mesh())
    learner.write(learner.signature, np.array([5, 6, 7, 8, 9], np.float32))
    arrays = learner.arrays()
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "w": "float64",
        "n": "int64",
        "half": "float16",
    }
    assert (arrays["w"].tolist(), arrays["n"].tolist(), arrays["half"].tolist()) == ([[5, 6]], 7, [7, 8, 9])
    arrays["w"] += 1
    arrays["n"] += 1
    assert learner.arrays()["w"].tolist() == [[5, 6]]
    assert learner.arrays()["n"] == 7


def test_first_values_are_a_function_of_the_seed():
    made = [
        ArraysLearner(Given(lambda: {"w": np.random.normal(size=3)}), seed, Mesh()).vector().tolist()
        for seed in (1, 1, 2)
    ]
    assert made[0] == made[1]
    assert made[0] != made[2]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([np.zeros(2)], "arrays() returned a list; return a table of name -> numpy array"),
        ({}, "arrays() has no number of a floating type to train"),
        ({"n": np.arange(3)}, "arrays() has no number of a floating type to train"),
        ({"w": np.zeros((0, 3))}, "arrays() has no number of a floating type to train"),
        ({"größe": np.zeros(2)}, "arrays(): 'größe' cannot travel under that name"),
        ({3: np.zeros(2)}, "arrays(): '3' cannot travel under that name"),
        ({"w": np.zeros(2, np.complex64)}, "arrays(): 'w' is an array of complex64; give floating numbers"),
        ({"w": np.array(["a"])}, "arrays(): 'w' is an array of str32; give floating numbers"),
        ({"w": np.zeros(2, np.longdouble)}, "give floating numbers of at most 64 bits"),
        ({"w": [[1.0], [1.0, 2.0]]}, "arrays(): 'w' is no array of one shape"),
        ({"w": np.zeros([1] * 17)}, "arrays(): 'w' has 17 dimensions; reshape it to 16 at most"),
    ],
)
def test_arrays_that_cannot_travel_are_told(arrays, words):
    with pytest.raises(TaskFailed) as caught:
        ArraysLearner(Given(arrays), 0, Mesh())
    assert words in str(caught.value)


def test_other_weights_and_more_ranks_are_told():
    learner = ArraysLearner(Given(three), 0, Mesh())
    with pytest.raises(TaskFailed, match=r"tensor w \[1, 2\] where the weights have w \[2\]"):
        learner.write((TensorSpec(name="w", shape=(2,)), learner.signature[1]), np.zeros(5, np.float32))
    with pytest.raises(TaskFailed, match=r"layout\.data: 2 ranks share gradients"):
        ArraysLearner(Given(three), 0, Mesh(rank=0, ranks=2))


# --- a round


def test_the_update_is_what_fit_changed_and_the_batches_taken_are_its_weight(tmp_path):
    task = Given(three, step_by(0.5))
    work, _ = train(task, tmp_path)
    np.testing.assert_allclose(work.update(), [1.5] * 5, rtol=1e-6)
    assert (work.examples, work.loss) == (STEPS * BATCH, 0.5)
    (budget,) = task.budgets
    assert (budget.steps, budget.batch, budget.done, budget.round) == (STEPS, BATCH, 6, 3)
    assert (budget.place, budget.places) == (0, 1)


def test_a_task_is_told_its_sites_place(tmp_path):
    task = Given(three, step_by(1.0))
    train(task, tmp_path, place=2, places=5)
    (budget,) = task.budgets
    assert (budget.place, budget.places) == (2, 5)


def test_a_task_may_say_how_many_examples_it_used(tmp_path):
    task = Given(three, lambda arrays, examples, budget: Fitted(arrays, np.float32(0.25), np.int32(len(examples["x"]))))
    work, _ = train(task, tmp_path)
    assert (work.examples, work.loss, work.update().tolist()) == (10, 0.25, [0] * 5)


def test_a_round_done_again_draws_the_same(tmp_path):
    def fit(arrays, examples, budget):
        return Fitted({**arrays, "w": arrays["w"] + np.random.normal(size=(1, 2))}, 1.0, 1)

    first, again, other = (train(Given(three, fit), tmp_path, done=done)[0].update().tolist() for done in (6, 6, 9))
    assert first == again
    assert first != other


def test_the_state_that_is_kept_for_the_next_round_is_empty(tmp_path):
    work, _ = train(Given(three, step_by(1)), tmp_path, state_out=str(tmp_path / "state.safetensors"))
    work.keep_state()
    assert read_tensors(tmp_path / "state.safetensors") == ({}, {})


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (lambda a, e, b: (a, 10, 0.5), "fit() returned a tuple; return atoll.Fitted(arrays, loss, examples)"),
        (lambda a, e, b: Fitted([1], 0.5, 1), "the arrays as a table by name"),
        (lambda a, e, b: Fitted({"w": a["w"]}, 0.5, 1), "there is no array 'half'; return every one that was given"),
        (
            lambda a, e, b: Fitted({**a, "w": np.zeros(3)}, 0.5, 1),
            "'w' is float64 of shape [3] where numbers of shape [1, 2]",
        ),
        (lambda a, e, b: Fitted({**a, "w": np.array([["a", "b"]])}, 0.5, 1), "'w' is str32 of shape [1, 2]"),
        (lambda a, e, b: Fitted({**a, "w": a["w"] / 0}, 0.5, 1), "step 9 of the run: the arrays are not finite"),
        (lambda a, e, b: Fitted({**a, "w": a["w"] + 1e300}, 0.5, 1), "the arrays are not finite"),
        (lambda a, e, b: Fitted(a, float("nan"), 1), "step 9 of the run: loss is nan; lower the rate"),
        (lambda a, e, b: Fitted(a, None, 1), "loss is a NoneType; give one number"),
        (lambda a, e, b: Fitted(a, 0.5), "no batch was taken and no number of examples is given"),
        (lambda a, e, b: Fitted(a, 0.5, 0), "no batch was taken"),
        (lambda a, e, b: Fitted(a, 0.5, -3), "no batch was taken"),
        (lambda a, e, b: Fitted(a, 0.5, 2.5), "examples is a float; give a whole number"),
        (
            lambda a, e, b: Fitted(a, 0.5, 13),
            "13 examples, where 3 steps of batch 4 count for 12; set batch to 5 or more",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_fit_that_went_wrong_is_told(tmp_path, fit, words):
    with pytest.raises(TaskFailed) as caught:
        train(Given(three, fit), tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sync", "words"),
    [
        ({"preset": "data_parallel"}, "sync.exchange: gradient: the task hands over arrays and has no gradients"),
        ({"preset": "fedprox"}, "sync.proximal: 0.01: the task takes its own steps"),
    ],
)
def test_a_sync_that_needs_gradients_is_refused(tmp_path, sync, words):
    with pytest.raises(TaskFailed, match=re.escape(words)):
        train(Given(three, step_by(1)), tmp_path, sync=Sync.model_validate(sync))


def test_the_planner_rejects_such_points_and_keeps_the_others():
    job = TrainJob.model_validate(
        {"name": "j", "purpose": "p", "task": {"file": "t.py", "name": "T"}, "data": {"dataset": "d"}}
    )
    found = points(job, 2, gradients=False)
    assert [point.sync.exchange for point in found if point.rejected] == ["gradient"]
    assert [point.name for point in points(job, 2)] == [point.name for point in found]
    assert not any(point.rejected for point in points(job, 2))


def test_a_trial_fits_one_step_at_a_time_and_keeps_nothing():
    task = Given(three, step_by(1))
    learner = ArraysLearner(task, 0, Mesh())
    before = learner.vector()
    assert len(list(learner.trial(Probe(seed=1, batch=BATCH, optimiser=Optimiser()), EXAMPLES, batches(0)))) == STEPS
    assert [(budget.steps, budget.done) for budget in task.budgets] == [(1, 0), (1, 1), (1, 2)]
    np.testing.assert_array_equal(learner.vector(), before)


def test_examples_keep_their_precision_which_torch_would_not():
    rows = Rows(pa.table({"x": [0.1, 0.2]}))
    assert make_examples(Given(three), rows, 0)["x"].tolist() == [0.1, 0.2]


# --- one place decides


def test_whoever_has_arrays_and_fit_is_a_task_of_arrays():
    assert isinstance(make_learner(Given(three), 0, Mesh()), ArraysLearner)


def test_a_torch_task_with_a_method_called_fit_stays_one():
    torch = pytest.importorskip("torch")

    class Torch:
        def model(self):
            return torch.nn.Linear(1, 1)

        def fit(self):
            raise AssertionError("is the task's own business")

    assert isinstance(make_learner(Torch(), 0, Mesh()), ModuleLearner)


TASK = """\
import numpy as np


class Line:
    def arrays(self):
        return {"w": np.zeros(2), "b": np.zeros(())}

    def examples(self, rows):
        return {"x": np.stack([rows.table[name].to_numpy() for name in ("u", "v")], axis=1)}

    def fit(self, arrays, examples, budget):
        raise AssertionError

    def predict(self, arrays, examples):
        return {"y": examples["x"] @ arrays["w"] + arrays["b"]}
"""
SIGNATURE = (TensorSpec(name="w", shape=(2,)), TensorSpec(name="b", shape=()))
WEIGHTS = save(np.array([2, 3, 0.5], np.float32), SIGNATURE)


def test_a_lacking_method_is_told_as_of_a_task_of_arrays(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    with pytest.raises(
        TaskFailed, match=r"Line has no method 'metrics'; write it as atoll\.spec\.task\.ArraysTask shows"
    ):
        load_task(tmp_path, TaskName(file="task.py", name="Line"), "evaluate")
    (tmp_path / "task.py").write_text(TASK.replace("def arrays", "def tables"))
    with pytest.raises(TaskFailed, match=r"Line has no method 'model'; write it as atoll\.spec\.task\.Task or"):
        load_task(tmp_path, TaskName(file="task.py", name="Line"))


def test_a_deployed_task_of_arrays_answers(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    made = Model(
        name="line",
        version=1,
        weights=sha256(WEIGHTS),
        code=sha256(b""),
        task="Line",
        file="task.py",
        signature=SIGNATURE,
        lineage=Lineage(run="r", job=sha256(b""), plan=sha256(b""), code=sha256(b"")),
    )
    engine = load(tmp_path, made, WEIGHTS, {"u": "double", "v": "double"})
    assert engine.predict([{"u": 1.0, "v": 10.0}, {"u": 0.0, "v": 1.0}]) == [{"y": 32.5}, {"y": 3.5}]
