"""The small net that laws train, for any width, and files of rows for it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_TASK = """\
import numpy as np
from torch import nn

from atoll import Mean


class Net:
    def model(self):
        return nn.Sequential(nn.Linear({columns}, {hidden}), nn.Tanh(), nn.Linear({hidden}, 1))

    def examples(self, rows):
        table = rows.table
        x = np.stack([table[f"x{{i}}"].to_numpy() for i in range({columns})], axis=1).astype(np.float32)
        return {{"x": x, "y": table["y"].to_numpy().astype(np.float32)}}

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch["x"])[:, 0], batch["y"])

    def predict(self, model, batch):
        return {{"y": model(batch["x"])[:, 0]}}

    def metrics(self, model, batch):
        error = (model(batch["x"])[:, 0] - batch["y"]).abs()
        return {{"error": Mean(error.sum().item(), len(error))}}
"""


def task(columns: int, hidden: int) -> str:
    """Return the source of a task with a class `Net` over columns x0, x1, ... and y."""
    return _TASK.format(columns=columns, hidden=hidden)


def write_rows(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    pq.write_table(pa.table({**{f"x{i}": column for i, column in enumerate(x.T)}, "y": y}), path)
