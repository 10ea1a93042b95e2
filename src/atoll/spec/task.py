"""What a user writes. Torch is named only in types, so this module is free to import anywhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from atoll.spec.model import Moments

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
    import torch

Arrays = Mapping[str, "np.ndarray"]  # equal first extents; row i of each belongs to example i


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a dataset at this site, with the statistics that all sites pooled for the job."""

    table: "pa.Table"  # pyright: ignore[reportUnknownMemberType] - pyarrow ships no types
    statistics: Mapping[str, Moments] = field(default_factory=dict[str, Moments])


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric that is a mean over examples: their sum and how many there were."""

    total: float
    count: int


@dataclass(frozen=True, slots=True)
class Scores:
    """A metric computed from scores in [0, 1] of a two-class problem: leaves the site as a histogram per class."""

    scores: "np.ndarray"  # float, shape (n,)
    labels: "np.ndarray"  # 0 or 1, shape (n,)


class Task(Protocol):
    """A learning task. The class is made with the job's `task.params` as keyword arguments, in workers only."""

    def model(self) -> "torch.nn.Module":
        """Return a new model. Atoll seeds torch first, so the same seed gives the same weights."""
        ...

    def examples(self, rows: Rows) -> Arrays:
        """Turn rows into arrays, one example per entry of the first axis."""
        ...

    def loss(self, model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the mean loss over the batch: a finite scalar tensor."""
        ...

    def predict(self, model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> Mapping[str, Any]:
        """Return answers for a batch: name -> tensor or array with one entry per example."""
        ...

    def metrics(self, model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> Mapping[str, Mean | Scores]:
        """Return metrics over these examples in a form whose sums over sites are the metric over all of them."""
        ...
