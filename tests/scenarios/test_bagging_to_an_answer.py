"""The bagging example over the memory channel: two sites' trees in one registered model, also through another hub."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from atoll.registry.blobs import Blobs
from atoll.registry.weights import load
from atoll.spec.model import Bundle
from tests.memory import finished, job, world
from tests.undeployed import NothingDeployed

pytest.importorskip("xgboost", reason="the extra `trees` is not installed: the bagging example was not tried")
TASK = Path(__file__).parents[2] / "examples" / "bagging" / "task.py"
TREES = 5


def table(seed, rows):
    rng = np.random.default_rng(seed)
    age, oldpeak, cp = rng.normal(54, 9, rows), rng.exponential(1.0, rows), rng.integers(0, 4, rows)
    kinds = ("typical angina", "atypical angina", "non-anginal", "asymptomatic")
    sick = (age - 54) / 9 + oldpeak - 1 + (cp == 3) + rng.normal(size=rows) > 0.5
    known = {"age": age, "oldpeak": oldpeak, "cp": [kinds[code] for code in cp], "target": sick.astype(int)}
    others = ("sex", "fbs", "restecg", "exang", "slope", "ca", "thal")
    numbers = {name: rng.normal(100, 10, rows) for name in ("trestbps", "chol", "thalch")}
    return pa.table({**known, **numbers, **dict.fromkeys(others, pa.nulls(rows))})


def test_two_sites_trees_become_one_forest(tmp_path):
    task = {"file": "task.py", "name": "Bagged", "params": {"trees": TREES, "sites": 3}}
    data = {"dataset": "rows", "holdout": 0.2, "statistics": ["age", "trestbps", "chol", "thalch", "oldpeak"]}
    asked = job(task=task, data=data, steps=TREES, batch=400, sync={"preset": "fedavg", "period": 1, "merge": "mean"})
    with world(tmp_path, {"ada": table(1, 150), "bob": table(2, 90)}, NothingDeployed()) as hub:
        view = finished(hub, asked, Bundle(files={"task.py": TASK.read_text()}))
        model = hub.model(view.result.model)
    forest, _ = load(Blobs(tmp_path / "hub" / "blobs").get(model.weights), model.signature)
    shares = forest[: TREES * 3].reshape(TREES, 3)
    assert np.array_equal(shares, np.tile(np.float32([0.5, 0.5, 0]), (TREES, 1)))
    assert view.losses[-1] < view.losses[0]
    assert view.result.metrics["accuracy"] > 0.7
