"""Trees that sites grow together: the ones that would grow from all rows in one place."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from atoll.inner.arrays import ArraysLearner
from atoll.inner.mesh import Mesh
from atoll.inner.task import load_task
from atoll.spec.job import Optimiser
from atoll.spec.model import Moments
from atoll.spec.order import TaskName, Train
from atoll.spec.sync import Sync
from atoll.spec.task import Rows

FOLDER = Path(__file__).parents[2] / "examples" / "trees"
SIZES = (150, 60, 90)


def table(rows):
    """Patients as the four hospitals record them: some numbers and findings missing, the sick older and in pain."""
    rng = np.random.default_rng(2)
    age, oldpeak, cp = rng.normal(54, 9, rows), rng.exponential(1.0, rows), rng.integers(0, 4, rows)
    sick = (age - 54) / 9 + oldpeak - 1 + (cp == 3) + rng.normal(size=rows) > 0.5
    kinds = ("typical angina", "atypical angina", "non-anginal", "asymptomatic")
    nothing = pa.nulls(rows)
    known = {
        "age": age,
        "oldpeak": pa.array(oldpeak, mask=rng.random(rows) < 0.2),
        "cp": [kinds[code] for code in cp],
        "target": sick.astype(int),
    }
    others = ("trestbps", "chol", "thalch", "sex", "fbs", "restecg", "exang", "slope", "ca", "thal")
    return pa.table({**known, **dict.fromkeys(others, nothing)})


MOMENTS = {
    name: Moments(count=9, mean=54 if name == "age" else 1, std=9 if name == "age" else 1)
    for name in ("age", "trestbps", "chol", "thalch", "oldpeak")
}


def grown(task, sites, folder):
    """Return the arrays after all rounds, each site's update weighted by its examples."""
    learner = ArraysLearner(task, 0, Mesh())
    for done in range(task.trees * task.depth + 1):
        start = learner.vector()
        start.tofile(folder / "weights.f32")
        order = Train(
            seed=0,
            weights=str(folder / "weights.f32"),
            signature=learner.signature,
            output="",
            done=done,
            steps=1,
            batch=sum(SIZES),
            optimiser=Optimiser(),
            sync=Sync(),
        )
        rounds = [learner.round(None, order, examples) for examples in sites]
        for work in rounds:
            list(work.steps(lambda first: []))
        weights = [work.examples for work in rounds]
        mean = np.average([work.update() for work in rounds], axis=0, weights=weights)
        learner.write(learner.signature, start + mean.astype(np.float32))
    return learner


@pytest.fixture(scope="module")
def task():
    return load_task(
        FOLDER, TaskName(file="task.py", name="Trees", params={"trees": 6}), "train", "evaluate", "predict"
    )


def test_three_sites_grow_the_trees_of_all_rows_in_one_place(task, tmp_path):
    rows = table(sum(SIZES))
    starts = np.cumsum((0, *SIZES))
    sites = [task.examples(Rows(rows.slice(start, size), MOMENTS)) for start, size in zip(starts, SIZES, strict=False)]
    pooled = task.examples(Rows(rows, MOMENTS))
    together, central = grown(task, sites, tmp_path), grown(task, [pooled], tmp_path)
    ours, theirs = together.arrays(), central.arrays()
    assert np.array_equal(np.rint(ours["splits"]), theirs["splits"])
    np.testing.assert_allclose(ours["leaves"], theirs["leaves"], atol=1e-5)
    assert len(np.unique(theirs["splits"][..., 0])) >= 3
    mean = together.evaluate(pooled)["accuracy"]
    assert mean.total / mean.count > 0.75
    alone = grown(task, sites[1:2], tmp_path).arrays()
    assert not np.array_equal(alone["splits"], theirs["splits"])


def test_more_than_a_level_a_round_is_told(task):
    with pytest.raises(ValueError, match=r"set sync\.period to 1"):
        task.fit(task.arrays(), {}, type("Budget", (), {"steps": 2})())
