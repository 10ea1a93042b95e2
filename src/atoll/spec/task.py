"""What a user writes. Torch is named only in types, so this module is free to import anywhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from atoll.spec.model import Moments
from atoll.spec.sync import Sync

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
    import torch

# Numbers or truth values of equal first extents; row i of each belongs to example i. For torch float64 becomes float32.
Arrays = Mapping[str, "np.ndarray"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a dataset at this site, with the statistics that all sites pooled for the job."""

    table: "pa.Table"  # pyright: ignore[reportUnknownMemberType] - pyarrow ships no types
    statistics: Mapping[str, Moments] = field(default_factory=dict[str, Moments])
    asked: bool = False  # what is made of them goes to `predict`; a deployment wants one example for each


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric that is a mean over examples, or whatever it counts: their sum and how many there were."""

    total: float
    count: int
    power: bool = False  # the metric is e to the power of that mean: a perplexity, from losses in nats


@dataclass(frozen=True, slots=True)
class Scores:
    """A metric computed from scores in [0, 1] of a two-class problem: leaves the site as a histogram per class."""

    scores: "np.ndarray"  # float, shape (n,)
    labels: "np.ndarray"  # 0 or 1, shape (n,)


class Task(Protocol):
    """A learning task. The class is made with the job's `task.params` as keyword arguments, in workers only.

    A round is done again, or gone on with by another process, when a worker dies; it is the same round because what
    user code draws from the random generators of torch, numpy and Python is set anew before each of these methods is
    called: in `loss` by the seed, the step of the run and the rank. A generator, a counter or a cache of the task's
    own would not be; keep such a thing in the model, as a buffer.
    """

    def model(self) -> "torch.nn.Module":
        """Return a new model, in float32 or narrower, on the CPU; it has a parameter to train.

        Its tensors travel under their names in `state_dict()`: letters, digits, _ . -, at most 128.
        """
        ...

    def examples(self, rows: Rows) -> Arrays:
        """Turn rows into arrays, one example per entry of the first axis."""
        ...

    def loss(self, model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
        """Return the mean loss over the batch: a finite scalar tensor.

        Several ranks share gradients only by way of ``model(...)`` itself, so call that and not just its parts.
        """
        ...

    def predict(self, model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> Mapping[str, Any]:
        """Return answers for a batch: name -> tensor, array or list with one entry per example."""
        ...

    def metrics(self, model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> Mapping[str, Mean | Scores]:
        """Return metrics over these examples in a form whose sums over sites are the metric over all of them.

        At most 32, with names like those of tensors.
        """
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """What a round grants an `ArraysTask`: so many steps, or epochs, or whatever the task counts by."""

    steps: int  # of this round: the sync's period, or what is left of the job's steps
    batch: int  # the most examples that one step counts for
    done: int  # steps of the run before this round
    round: int  # of the run, from 1
    batches: Iterator[Arrays]  # one a step, the very ones a torch task would be given; good once, or not at all
    place: int = 0  # this site's among those that the run's plan trains with, from 0: the same in every round
    places: int = 1  # how many these are, also when some have no part in a round


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a round's local work came to. ``examples`` is its weight in a mean over sites."""

    arrays: Arrays  # named and shaped as they were given
    loss: float  # mean over the examples; finite
    examples: int | None = None  # from 1 to steps x batch; left out, as many as the batches that were taken held


class ArraysTask(Protocol):
    """A learning task in any framework: it hands over named arrays and steps by itself, in one process.

    The arrays are the whole model. Those of float16, float32 or float64 travel, as float32, and are given in the type
    they were first made in; integers and truth values stay at the site and are given as `arrays` made them. Each call
    gets copies of its own. Sites exchange deltas; of the job, `optimiser` and `sync.keep_optimiser` mean nothing here.

    A round is one call of `fit`, done again when a worker dies: what `Task` says of random generators and of state
    that the task keeps for itself holds here.
    """

    def arrays(self) -> Arrays:
        """Return the first values: the same names and shapes, in the same order, at every site and in every call.

        Names as those of tensors: letters, digits, _ . -, at most 128.
        """
        ...

    def examples(self, rows: Rows) -> Arrays:
        """Turn rows into arrays, one example per entry of the first axis."""
        ...

    def fit(self, arrays: Arrays, examples: Arrays, budget: Budget) -> Fitted:
        """Do one round's work from ``arrays`` on this site's ``examples``, which are not to be written to."""
        ...

    def predict(self, arrays: Arrays, examples: Arrays) -> Mapping[str, Any]:
        """Return answers: name -> array or list with one entry per example."""
        ...

    def metrics(self, arrays: Arrays, examples: Arrays) -> Mapping[str, Mean | Scores]:
        """Return metrics in a form whose sums over sites are the metric over all of them, as `Task.metrics` does."""
        ...


def beyond_arrays(sync: Sync) -> str | None:
    """Return which coordinate of a sync an `ArraysTask` cannot follow, and the mend; None where it can follow all."""
    if sync.exchange == "gradient":
        return "exchange: gradient: the task hands over arrays and has no gradients; use delta, as preset: fedavg does"
    if sync.seconds is not None:
        return f"seconds: {sync.seconds:g}: the task takes its own steps, which nobody can end; remove it"
    if sync.control:
        return "control: the task takes its own steps, which cannot be turned; set control: false"
    if sync.keep_local:
        return "keep_local: the task's arrays are one whole, of which all is exchanged; remove it"
    if sync.proximal:
        return f"proximal: {sync.proximal:g}: the task takes its own steps, which cannot be pulled; set it to 0"
    if sync.streaming:
        return "fragments, delay, blend: a round of the task is one call on all its arrays; set them to 1, 0 and 0"
    return None
