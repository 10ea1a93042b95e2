"""The order that opens a task at workers, as the tests that need no agent give it."""

from pathlib import Path
from typing import Any

from atoll.spec.job import Data
from atoll.spec.order import Open, TaskName


def opening(folder: Path, name: str = "Task", code: str = "bundle", holdout: float = 0.0, **more: Any) -> Open:
    """Return the order for the task ``name`` of ``folder/code/task.py`` with the rows of ``folder/rows.parquet``."""
    return Open.model_validate(
        {
            "fingerprint": "sha256:" + 64 * "0",
            "bundle": str(folder / code),
            "task": TaskName(file="task.py", name=name, params=more.pop("params", {})),
            "path": str(folder / "rows.parquet"),
            "format": "parquet",
            "data": Data(dataset="rows", holdout=holdout),
            "seed": 3,
            **more,
        }
    )
