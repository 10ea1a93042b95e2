"""DEMO ONLY, IMPOSSIBLE IN REAL LIFE: the four hospitals' patients in one place, as the mark to compare with.

No owner would allow it and Atoll does not offer it. This file opens every hospital's Parquet itself, in plain torch,
with the same task, recipe and held-out patients as the job, and takes as many examples a step as all sites together.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from atoll.data.batches import batch, split
from atoll.data.statistics import column_sums, pool
from atoll.spec.document import read_yaml
from atoll.spec.job import TrainJob, parse_job
from atoll.spec.task import Rows, Scores, Task

JOB = Path(__file__).with_name("job.yaml")


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a sick patient scores above a healthy one, ties counting half; nan with one class."""
    sick, well = scores[labels == 1], scores[labels == 0]
    if not len(sick) or not len(well):
        return float("nan")
    wins = (sick[:, None] > well).sum() + 0.5 * (sick[:, None] == well).sum()
    return float(wins / (len(sick) * len(well)))


def measured(task: Task, model: torch.nn.Module, data: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the task's own metrics over these examples as numbers."""
    values: dict[str, float] = {}
    with torch.no_grad():
        for name, metric in task.metrics(model, data).items():
            exact = isinstance(metric, Scores)
            values[name] = auc(metric.scores, metric.labels) if exact else metric.total / metric.count
    return values


def pooled(folder: Path, seed: int, task: Task) -> dict[str, Any]:
    """Train on all hospitals' rows at once; return accuracy, auc and by_site on every hospital's held-out patients.

    `folder` is what `prepare` wrote. Raises `Invalid` or `NotFound` when the job document does not read.
    """
    job = parse_job(read_yaml(JOB), JOB.name)
    assert isinstance(job, TrainJob)
    tables = {path.parent.name: pq.read_table(path) for path in sorted(folder.glob("*/heart.parquet"))}
    parts = {site: split(table.num_rows, job.data.holdout, seed) for site, table in tables.items()}
    train = pa.concat_tables([tables[site].take(kept) for site, (kept, _) in parts.items()])
    statistics = pool([column_sums(train, job.data.statistics)])

    def tensors(table: pa.Table) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in task.examples(Rows(table, statistics)).items()}

    data = tensors(train)
    torch.manual_seed(seed)
    model = task.model()
    optimiser = torch.optim.SGD(model.parameters(), lr=job.optimiser.rate)
    size = job.batch * len(tables)
    for step in range(job.steps):
        chosen = torch.from_numpy(batch(seed, train.num_rows, step * size, size))
        optimiser.zero_grad()
        task.loss(model, {name: array[chosen] for name, array in data.items()}).backward()
        optimiser.step()

    held = {site: tensors(tables[site].take(out)) for site, (_, out) in parts.items()}
    everyone = {name: torch.cat([part[name] for part in held.values()]) for name in data}
    by_site = {site: measured(task, model, part) for site, part in held.items()}
    return {**measured(task, model, everyone), "by_site": by_site}


if __name__ == "__main__":
    from task import Heart  # beside this file

    if len(sys.argv) != 2:
        sys.exit("usage: python examples/hospitals/pooled.py FOLDER")
    print(json.dumps([pooled(Path(sys.argv[1]), seed, Heart()) for seed in range(5)], indent=1))
