"""The model in memory: the user's task, its weights, and rows in, answers out. All torch in serving is behind it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.learner import Learner, make_learner
from atoll.inner.made import make_examples
from atoll.inner.mesh import Mesh
from atoll.inner.task import load_task, task_failure
from atoll.registry import weights as safetensors
from atoll.serving.rows import Columns, Row
from atoll.spec.document import sha256
from atoll.spec.model import Model
from atoll.spec.order import TaskName
from atoll.spec.pretrained import Pretrained
from atoll.spec.task import ArraysTask, Rows, Task


class Engine:
    """One loaded model. Not for several threads at once: torch and the user's code run where it is called."""

    def __init__(self, task: Task | ArraysTask, learner: Learner, model: Model, columns: Columns, bundle: Path) -> None:
        self._task = task
        self._learner = learner
        self._model = model
        self._bundle = bundle
        self.columns = columns

    def predict(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Return one table of JSON values per row; raise `TaskFailed` when the task cannot answer them."""
        table = self.columns.table(rows)
        name = f"{self._model.file}: {self._model.task}"
        try:
            examples = make_examples(self._task, Rows(table, self._model.statistics, asked=True), seed=0)
        except Exception as error:
            raise task_failure(error, self._bundle, f"{name}.examples") from error
        for key, array in examples.items():
            if array.shape[:1] != (len(rows),):
                raise TaskFailed(
                    f"{name}.examples: {key!r} has shape {list(array.shape)} for {len(rows)} rows; "
                    "a served model needs one example per row"
                )
        try:
            answers = self._learner.predict(examples)
        except Exception as error:
            raise task_failure(error, self._bundle, f"{name}.predict") from error
        return _per_row(answers, len(rows))


def load(
    bundle: Path, model: Model, weights: bytes, columns: Mapping[str, str], pretrained: Pretrained | None = None
) -> Engine:
    """Import the task from the verified folder ``bundle`` and give its model the weights.

    Raises `Corrupt` when the bytes are not the ones the model's document names, and `TaskFailed` when the code does
    not import or makes a model of other tensors than the model's signature.
    """
    found = sha256(weights)
    if found != model.weights:
        raise Corrupt(f"weights of {model.reference}: the bytes are {found}, not {model.weights}; restore the blob")
    vector, _ = safetensors.load(weights, model.signature)
    task = load_task(bundle, TaskName.of(model), "predict", pretrained=pretrained)
    try:
        learner = make_learner(task, seed=0, mesh=Mesh())
    except Exception as error:
        raise task_failure(error, bundle, f"{model.file}: {model.task}") from error
    learner.write(model.signature, vector)
    return Engine(task, learner, model, Columns(columns), bundle)


def _per_row(answers: Mapping[str, np.ndarray], rows: int) -> list[dict[str, Any]]:
    columns = {str(name): array.tolist() for name, array in answers.items()}
    for name, entries in columns.items():
        for entry in entries:
            _check_json(name, entry)
    return [{name: entries[row] for name, entries in columns.items()} for row in range(rows)]


def _check_json(name: str, value: Any) -> None:
    if isinstance(value, list):
        for one in value:
            _check_json(name, one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise TaskFailed(
            f"predict: {name!r} is {value} for a row of the request; a model must answer with finite numbers"
        )
    elif not (value is None or isinstance(value, str | int | float)):
        raise TaskFailed(f"predict: {name!r} holds a {type(value).__name__}; return tensors, arrays, numbers or texts")
