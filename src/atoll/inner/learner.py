"""What a site trains, evaluates and answers with: a torch module or named arrays, and one face for both.

Whoever gives orders knows weights as one flat float32 vector under a signature, and examples as arrays.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch

from atoll.inner import evaluate
from atoll.inner.alike import digest
from atoll.inner.arrays import ArraysLearner
from atoll.inner.flops import Demand, demand
from atoll.inner.made import make_model
from atoll.inner.memory import Carried, Memory
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import parallelize
from atoll.inner.personal import chosen, put_personal
from atoll.inner.round import Round
from atoll.inner.steps import Step
from atoll.inner.task import hands_arrays
from atoll.inner.vector import at_rest, named, put_back, read_vector, signature_of, write_vector
from atoll.inner.whole import put
from atoll.spec.compute import Compute
from atoll.spec.model import Patterns, Signature
from atoll.spec.order import Open, Train
from atoll.spec.task import Arrays, ArraysTask, Mean, Scores, Task

_PLAIN = Compute()


class Work(Protocol):
    """A round under way: the caller owns the loop, ``for step in work.steps(batches)``, then takes the update.

    One that was begun ahead of its weights goes on once it was ``ordered``.
    """

    @property
    def examples(self) -> int: ...
    @property
    def step(self) -> int: ...  # how many were taken
    @property
    def loss(self) -> float: ...
    def steps(self, batches: Callable[[int], Iterable[Arrays]]) -> Iterator[Step]: ...
    def write_update(self, path: Path) -> None: ...  # all ranks together, each what it has
    def keep_state(self) -> None: ...
    def ordered(self, order: Train) -> bool: ...
    def carried(self) -> Carried | None: ...  # as its last step has left it, for who goes on with it


class Learner(Protocol):
    """A task's model in this process."""

    @property
    def gradients(self) -> bool: ...  # whether its steps are ours, so that ranks and sites can share gradients
    @property
    def signature(self) -> Signature: ...
    @property
    def demand(self) -> Demand | None: ...  # what a step computes; None where that is the task's own affair
    def vector(self) -> np.ndarray: ...
    def write(
        self, signature: Signature, vector: np.ndarray, keep_local: Patterns = (), local_in: str | None = None
    ) -> None: ...
    def among(self, mesh: Mesh) -> bool: ...  # whether it goes on as it is with these ranks; else it is built anew
    def round(
        self, opened: Open, order: Train, examples: Arrays, memory: Memory | None = None, left: Work | None = None
    ) -> Work: ...  # ``left`` is what this learner was at when its group was lost
    def evaluate(self, examples: Arrays) -> dict[str, Mean | Scores]: ...
    def predict(self, examples: Arrays) -> dict[str, np.ndarray]: ...


def make_learner(
    task: Task | ArraysTask, seed: int, mesh: Mesh, compute: Compute = _PLAIN, made: torch.nn.Module | None = None
) -> Learner:
    """Return the task's model, new, from all generators at ``seed``, spread over the mesh. It is ``made`` where it
    was `made_ahead` from that seed.

    Raises `TaskFailed` for one that cannot travel, or not be spread so.
    """
    if hands_arrays(task):
        return ArraysLearner(task, seed, mesh)
    return ModuleLearner(cast("Task", task), seed, mesh, compute, made)


def made_ahead(task: Task | ArraysTask, seed: int) -> torch.nn.Module | None:
    """Return a module while its ranks are not there yet; None of a task that has none."""
    return None if hands_arrays(task) else make_model(cast("Task", task), seed)


class ModuleLearner:
    """A torch module, on every rank of the mesh; whatever of it does not travel begins each order as it was built."""

    gradients: Literal[True] = True

    def __init__(
        self, task: Task, seed: int, mesh: Mesh, compute: Compute = _PLAIN, made: torch.nn.Module | None = None
    ) -> None:
        self._task, self._seed, self._mesh = task, seed, mesh
        made = made if made is not None else make_model(task, seed)
        self.signature = signature_of(made)
        self._spread = parallelize(made, mesh, compute, getattr(task, "parallelize", None))
        self._module = self._spread.model
        self._rest = at_rest(self._module)
        self.demand = demand(self._module)
        self._digest: tuple[float, float] | None = None

    def vector(self) -> np.ndarray:
        return read_vector(self._module, self.signature)

    def write(
        self, signature: Signature, vector: np.ndarray, keep_local: Patterns = (), local_in: str | None = None
    ) -> None:
        """Take these values, and for the tensors that stay at the site its own; raise `TaskFailed` or `Corrupt`."""
        put_back(self._module, self._rest)
        write_vector(self._module, signature, vector, self._settled(keep_local, local_in))

    def _settled(self, keep_local: Patterns, local_in: str | None) -> frozenset[str]:
        """Give the tensors that stay their values, the seed's where there are none yet, and return their names."""
        names = chosen(self.signature, keep_local)
        tensors = named(self._module, names)
        if names and local_in is not None:
            put_personal(tensors, Path(local_in))
        elif names:  # the module has other values by now, perhaps of another run
            built = named(make_model(self._task, self._seed), names)
            for name, tensor in tensors.items():
                put(tensor, built[name])
        return names

    def among(self, mesh: Mesh) -> bool:
        """Take other ranks, which hold the whole model too; False where it is in parts, or is to be."""
        spread = self._spread.among(mesh)
        if spread is not None:
            self._mesh, self._spread = mesh, spread
        return spread is not None

    def round(
        self, opened: Open, order: Train, examples: Arrays, memory: Memory | None = None, left: Work | None = None
    ) -> Round:
        """Return the round that is ordered: the one that was ``left`` when its group was lost, if it is that.

        Raises `ConnectionError` when peers are lost meanwhile; what was left can be gone on with after that, too.
        """
        if self._mesh.ranks > 1 and self._digest is None:  # all its rounds are of the same examples
            self._digest = digest(examples)
        of_examples = self._digest or (0.0, 0.0)
        if isinstance(left, Round) and left.is_of(order):
            left.among(self._spread, of_examples)
            return left
        if left is not None and memory is not None:
            memory.carried = None  # it is in this very model, which is written anew
        put_back(self._module, self._rest)
        self._settled(order.sync.keep_local, order.local_in)
        return Round(opened, order, self._task, self._spread, memory, of_examples)

    def evaluate(self, examples: Arrays) -> dict[str, Mean | Scores]:
        with self._spread.answering() as mode:
            return evaluate.evaluate(self._task, self._module, examples, mode)

    def predict(self, examples: Arrays) -> dict[str, np.ndarray]:
        with self._spread.answering() as mode:
            return evaluate.predict(self._task, self._module, examples, mode)
