"""DEMO ONLY, IMPOSSIBLE IN REAL LIFE: xgboost on all hospitals' rows in one place, as the mark to compare with.

    pip install -e '.[examples,trees]'
    python examples/trees/pooled.py .atoll/hospitals

For each of 20 splits: these trees as sites grow them together (which is as one place grows them: `tests/unit/
test_tasks_trees.py`), xgboost's own with the same bins, and how far the two are apart on any held-out patient.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score
from task import NUMBERS, Trees  # beside this file

from atoll import Budget, Rows
from atoll.data.batches import split
from atoll.data.statistics import column_sums, pool

SPLITS = 20


def ours(task: Trees, train: dict[str, np.ndarray], held: dict[str, np.ndarray]) -> np.ndarray:
    arrays = task.arrays()
    for done in range(task.trees * task.depth + 1):
        arrays = dict(task.fit(arrays, train, Budget(1, len(train["y"]), done, done + 1, iter(()))).arrays)
    return task.predict(arrays, held)["risk"]


def theirs(task: Trees, train: dict[str, np.ndarray], held: dict[str, np.ndarray]) -> np.ndarray:
    import xgboost

    rows = len(train["y"])  # their sums are over rows, ours per row
    settings = {
        "objective": "binary:logistic",
        "base_score": 0.5,
        "tree_method": "hist",
        "max_depth": task.depth,
        "eta": task.rate,
        "reg_lambda": task.l2 * rows,
        "min_child_weight": task.least * rows,
        "nthread": 1,
    }
    model = xgboost.train(settings, xgboost.DMatrix(train["bins"].astype(float), train["y"]), task.trees)
    return model.predict(xgboost.DMatrix(held["bins"].astype(float)))


def examples(task: Trees, folder: Path, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*/heart.parquet"))]
    parts = [split(table.num_rows, 0.2, seed) for table in tables]
    train, held = (
        pa.concat_tables([table.take(part[side]) for table, part in zip(tables, parts, strict=True)]) for side in (0, 1)
    )
    statistics = pool([column_sums(train, NUMBERS)])
    return task.examples(Rows(train, statistics)), task.examples(Rows(held, statistics))


def main(folder: Path) -> None:
    found: dict[str, list[tuple[float, float]]] = {"these trees": [], "xgboost": []}
    apart = 0.0
    for seed in range(SPLITS):
        task = Trees()
        train, held = examples(task, folder, seed)
        risks = {"these trees": ours(task, train, held), "xgboost": theirs(task, train, held)}
        for name, risk in risks.items():
            found[name].append((np.mean((risk > 0.5) == (held["y"] > 0.5)), roc_auc_score(held["y"], risk)))
        apart = max(apart, float(np.abs(risks["xgboost"] - risks["these trees"]).max()))
    for name, figures in found.items():
        accuracy, area = np.mean(figures, axis=0)
        print(f"{name:12} accuracy {accuracy:.3f}  AUC {area:.3f}")
    print(f"no held-out patient's risk is more than {apart:.2g} apart")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/trees/pooled.py FOLDER")
    main(Path(sys.argv[1]))
