"""The engine: a verified bundle and verified weights in, rows to answers, every failure a sentence."""

from pathlib import Path

import numpy as np
import pytest

from atoll.errors import Corrupt, Invalid, TaskFailed
from atoll.registry.weights import save
from atoll.serving.engine import Engine, load
from atoll.spec.document import sha256
from atoll.spec.model import Lineage, Model, Moments, TensorSpec

TASK = """\
import numpy as np
import torch
from torch import nn

from scale import scaled


class Risk:
    def __init__(self, outputs=1):
        self.outputs = outputs

    def model(self):
        return nn.Sequential(nn.Linear(2, self.outputs), nn.Dropout(0.9), nn.BatchNorm1d(self.outputs, affine=False))

    def examples(self, rows):
        if "explode" in rows.table["note"].to_pylist():
            raise ValueError("boom")
        age = np.array(rows.table["age"].to_pylist(), dtype=float)
        return {"x": np.stack([scaled(age, rows.statistics["age"]), np.isnan(age)], 1).astype(np.float32)}

    def predict(self, model, batch):
        return {"risk": model(batch["x"])[:, 0], "word": np.array(["low"] * len(batch["x"]))}
"""
SCALE = """\
import numpy as np


def scaled(values, moments):
    return np.nan_to_num((values - moments.mean) / moments.std)
"""
SIGNATURE = (
    TensorSpec(name="0.weight", shape=(1, 2)),
    TensorSpec(name="0.bias", shape=(1,)),
    TensorSpec(name="2.running_mean", shape=(1,)),
    TensorSpec(name="2.running_var", shape=(1,)),
)
# risk = 2 * scaled + 3 * missing + 0.5, shifted by the running mean 0.5 and divided by sqrt(1)
WEIGHTS = save(np.array([2, 3, 0.5, 0.5, 1 - 1e-5], np.float32), SIGNATURE)
COLUMNS = {"age": "double", "note": "string"}


def model(**changes) -> Model:
    fields = {
        "name": "heart",
        "version": 1,
        "weights": sha256(WEIGHTS),
        "code": sha256(b""),
        "task": "Risk",
        "file": "task.py",
        "signature": SIGNATURE,
        "statistics": {"age": Moments(count=9, mean=50, std=10)},
        "lineage": Lineage(run="r", job=sha256(b""), plan=sha256(b""), code=sha256(b"")),
    }
    return Model(**{**fields, **changes})


@pytest.fixture
def bundle(tmp_path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "scale.py").write_text(SCALE)
    return tmp_path


@pytest.fixture
def engine(bundle) -> Engine:
    return load(bundle, model(), WEIGHTS, COLUMNS)


def test_rows_become_answers_with_loaded_weights_and_buffers_in_eval_mode(engine):
    answers = engine.predict([{"age": 60}, {"age": 50.0, "note": None}, {}])
    np.testing.assert_allclose([answer["risk"] for answer in answers], [2, 0, 3], atol=1e-6)
    assert answers[0]["word"] == "low"


def test_an_answer_does_not_depend_on_its_neighbours(engine):
    rows = [{"age": age} for age in (31, None, 77.5)]
    together = [answer["risk"] for answer in engine.predict(rows)]
    alone = [engine.predict([row])[0]["risk"] for row in rows]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_rows_are_checked_by_the_columns_of_the_training_data(engine):
    with pytest.raises(Invalid, match=r"unknown field 'agee'; did you mean 'age'"):
        engine.columns.check({"agee": 3})


def test_a_task_that_raises_is_told_with_its_line(engine):
    with pytest.raises(TaskFailed, match=r"^task\.py: line 17: ValueError: boom$"):
        engine.predict([{"note": "explode"}])


def test_weights_that_are_not_the_models_are_corrupt(bundle):
    with pytest.raises(Corrupt, match=r"heart@1.*restore"):
        load(bundle, model(), WEIGHTS[:-1] + b"\0", COLUMNS)


def test_a_task_that_makes_another_model_is_told(bundle):
    with pytest.raises(TaskFailed, match=r"tensor 0.weight \[5, 2\] where the weights have 0.weight \[1, 2\]"):
        load(bundle, model(params={"outputs": 5}), WEIGHTS, COLUMNS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    def predict", "    def forecast", "Risk has no method 'predict'"),
        ("return nn.Sequential(", "return print, (", r"model\(\) returned a tuple; return a torch.nn.Module"),
        ("return nn.Sequential(", "return nn.Sequentail(", r"^task\.py: line 13: AttributeError: "),
        ("import numpy as np", "import nunpy as np", r"^task\.py: line 1: ModuleNotFoundError: "),
    ],
)
def test_a_task_that_cannot_be_served_is_told_when_it_is_loaded(bundle, old, new, words):
    (bundle / "task.py").write_text(TASK.replace(old, new, 1))
    with pytest.raises(TaskFailed, match=words):
        load(bundle, model(), WEIGHTS, COLUMNS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (".astype(np.float32)}", ".astype(np.float32)[:1]}", r"'x' has shape \[1, 2\] for 2 rows"),
        ("[:, 0]", "[:, 0] / 0", "'risk' is (inf|nan|-inf) for a row"),
        ("[:, 0]", "[:1, 0]", "'risk' has shape"),
        ('["low"]', "[{}]", "'word' holds a dict"),
        ("model(batch", "model(bacth", r"^task\.py: line 22: NameError"),
    ],
)
def test_answers_that_cannot_be_given_are_told(bundle, old, new, words):
    (bundle / "task.py").write_text(TASK.replace(old, new, 1))
    engine = load(bundle, model(), WEIGHTS, COLUMNS)
    with pytest.raises(TaskFailed, match=words):
        engine.predict([{"age": 60}, {"age": 70}])
