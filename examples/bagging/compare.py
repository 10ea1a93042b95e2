"""DEMO ONLY, IMPOSSIBLE IN REAL LIFE: the bagged forest beside one that has all hospitals' rows in one place.

    pip install -e '.[examples,trees]'
    python examples/bagging/compare.py .atoll/hospitals

For each of 20 splits: the forest of all sites with each merge, xgboost's trees on all rows together, and each site's
own trees alone, on the held-out patients of all hospitals.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score
from task import NUMBERS, Bagged  # beside this file

from atoll import Budget, Rows
from atoll.data.batches import split
from atoll.data.statistics import column_sums, pool

SPLITS = 20
Examples = dict[str, np.ndarray]


def forest(task: Bagged, sites: list[Examples], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays after all rounds: after each, the sites' changes are added by these weights."""
    common = task.arrays()
    for done in range(task.trees):
        copies = [{name: array.copy() for name, array in common.items()} for _ in sites]
        grown = [
            task.fit(copy, site, Budget(1, 1, done, done + 1, iter(()), place, len(sites))).arrays
            for place, (copy, site) in enumerate(zip(copies, sites, strict=True))
        ]
        for name, array in common.items():
            array += np.average([arrays[name] - array for arrays in grown], axis=0, weights=weights)
    return common


def examples(task: Bagged, folder: Path, seed: int) -> tuple[list[Examples], Examples]:
    """Return each site's training rows, and the held-out rows of all."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("*/heart.parquet"))]
    parts = [split(table.num_rows, 0.2, seed) for table in tables]
    train, held = ([t.take(part[side]) for t, part in zip(tables, parts, strict=True)] for side in (0, 1))
    statistics = pool([column_sums(table, NUMBERS) for table in train])
    return [task.examples(Rows(t, statistics)) for t in train], task.examples(Rows(pa.concat_tables(held), statistics))


def main(folder: Path) -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(SPLITS):
        task = Bagged()
        sites, held = examples(task, folder, seed)
        rows = np.array([len(site["y"]) for site in sites], dtype=float)
        pooled = {name: np.concatenate([site[name] for site in sites]) for name in sites[0]}
        forests = {
            "weighted_mean": forest(task, sites, rows),
            "mean": forest(task, sites, np.ones(len(sites))),
            "all rows in one place": forest(task, [pooled], np.ones(1)),
        }
        names = [path.parent.name for path in sorted(folder.glob("*/heart.parquet"))]
        for name, site in zip(names, sites, strict=True):
            forests[f"{name} alone"] = forest(task, [site], np.ones(1))
        for name, arrays in forests.items():
            risk, sick = task.risk(arrays, held["bins"]), held["y"] > 0.5
            found.setdefault(name, []).append((np.mean((risk > 0.5) == sick), roc_auc_score(sick, risk)))
    for name, figures in found.items():
        accuracy, area = np.mean(figures, axis=0)
        print(f"{name:22} accuracy {accuracy:.3f}  AUC {area:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/bagging/compare.py FOLDER")
    main(Path(sys.argv[1]))
