"""The page on other frameworks shows a task that works: two sites average its scikit-learn model."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from atoll.inner.arrays import ArraysLearner
from atoll.inner.made import make_examples
from atoll.inner.mesh import Mesh
from atoll.inner.task import load_task
from atoll.spec.job import Optimiser
from atoll.spec.order import TaskName, Train
from atoll.spec.sync import Sync
from atoll.spec.task import Rows

PAGE = Path(__file__).parents[2] / "docs" / "other-frameworks.md"
STEPS, BATCH = 5, 20


@pytest.fixture
def task(tmp_path):
    shown = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "task.py").write_text(shown[0])
    return load_task(tmp_path, TaskName(file="task.py", name="Risk"), "train", "evaluate", "predict")


def rows(side, rng):
    """Rows of a site at one side of the others', so that neither sees what the other does."""
    x = rng.normal(loc=[side, 0], size=(200, 2))
    return pa.table({"age": x[:, 0], "pressure": x[:, 1], "sick": (x @ [1, 2] > side / 2).astype(int)})


def one_round(learner, done, examples, weights):
    order = Train(
        seed=0,
        weights=str(weights),
        signature=learner.signature,
        output="",
        done=done,
        steps=STEPS,
        batch=BATCH,
        optimiser=Optimiser(),
        sync=Sync(period=STEPS),
    )

    def batches(first):
        for number in range(done + first, done + STEPS):
            index = np.arange(number * BATCH, (number + 1) * BATCH) % len(examples["y"])
            yield {name: array[index] for name, array in examples.items()}

    work = learner.round(None, order, examples)
    assert [step.examples for step in work.steps(batches)] == [STEPS * BATCH]
    return work.update()


def test_two_sites_average_the_scikit_learn_model_of_the_page(task, tmp_path):
    rng, learner = np.random.default_rng(0), ArraysLearner(task, 0, Mesh())
    sites = [make_examples(task, Rows(rows(side, rng)), 0) for side in (-2.0, 2.0)]
    for number in range(6):
        start = learner.vector()
        start.tofile(tmp_path / "weights.f32")
        updates = [one_round(learner, STEPS * number, examples, tmp_path / "weights.f32") for examples in sites]
        learner.write(learner.signature, start + np.mean(updates, axis=0))
    accuracy = [learner.evaluate(examples)["accuracy"] for examples in sites]
    assert min(mean.total / mean.count for mean in accuracy) > 0.85
    assert learner.predict({"x": np.array([[0.0, 5.0], [0.0, -5.0]])})["risk"].round().tolist() == [1, 0]
