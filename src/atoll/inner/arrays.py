"""A task that hands over named arrays and steps by itself: for everybody else one flat float32 vector, as a module is.

Its gradients, if it has any, are its own: it runs in one process, and a round of it is one call, from the beginning.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atoll.errors import TaskFailed
from atoll.inner import chance, checkpoint, evaluate
from atoll.inner.made import DIMENSIONS, TENSORS, can_travel, count
from atoll.inner.mesh import Mesh
from atoll.inner.steps import Step
from atoll.inner.vector import check_same, load_vector, save_vector
from atoll.spec.model import Patterns, Signature, TensorSpec, elements
from atoll.spec.order import Probe, Train
from atoll.spec.task import Arrays, ArraysTask, Budget, Fitted, Mean, Scores, beyond_arrays

_WIDEST = 8  # bytes of a floating number that a machine without Intel's 80 bits has, too
_RETURN = "return atoll.Fitted(arrays, loss, examples)"


class ArraysLearner:
    """The arrays of a task and what can be done with them. The task never holds an array that is kept here."""

    gradients: Literal[False] = False
    demand = None

    def __init__(self, task: ArraysTask, seed: int, mesh: Mesh) -> None:
        """Make the arrays with all generators at ``seed``; raise `TaskFailed` for what cannot travel."""
        if mesh.ranks > 1:
            raise TaskFailed(
                f"layout.data: {mesh.ranks} ranks share gradients, and a task of arrays has none; set it to 1"
            )
        chance.seed(seed)
        self.task, self._first = task, _made(task.arrays())
        self.signature = tuple(
            TensorSpec(name=name, shape=array.shape) for name, array in self._first.items() if _travels(array)
        )
        if not elements(self.signature):
            raise TaskFailed("arrays() has no number of a floating type to train; give np.float32 or np.float64")
        if len(self._first) > TENSORS:
            raise TaskFailed(f"arrays() has {len(self._first):,} arrays where {TENSORS:,} may travel; stack small ones")
        self._vector = self.packed(self._first, "arrays()")

    def vector(self) -> np.ndarray:
        """Return a copy of the arrays that travel as one float32 vector of shape ``(sum of sizes,)``."""
        return self._vector.copy()

    def write(
        self, signature: Signature, vector: np.ndarray, keep_local: Patterns = (), local_in: str | None = None
    ) -> None:
        """Take other values. Raises `TaskFailed` when they are another model's: all arrays of a task are exchanged."""
        check_same([(spec.name, spec.shape) for spec in self.signature], signature)
        self._vector = np.array(vector, dtype=np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of all arrays, in the task's own order and types."""
        found, start = {name: array.copy() for name, array in self._first.items()}, 0
        for spec in self.signature:
            found[spec.name][...] = self._vector[start : start + spec.size].reshape(spec.shape)
            start += spec.size
        return found

    def packed(self, arrays: Arrays, whose: str) -> np.ndarray:
        """Return the values of these arrays as one vector; raise `TaskFailed` unless they are shaped as the first."""
        parts = [_values(arrays.get(spec.name), spec, whose) for spec in self.signature]
        return np.concatenate([part.reshape(-1) for part in parts])

    def trial(self, order: Probe, examples: Arrays, batches: Iterable[Arrays]) -> Iterator[object]:
        """Let the task take one step, from the first values, for each batch; nothing is kept."""
        for number, batch in enumerate(batches):
            granted = _Granted(1, order.batch, number, number + 1, order.seed)
            yield granted.fit(self, examples, [batch])

    def among(self, mesh: Mesh) -> bool:
        """Tell that it never has other ranks."""
        return False

    def round(
        self, opened: object, order: Train, examples: Arrays, memory: object = None, left: object = None
    ) -> "ArraysRound":
        """Return the round that is ordered; which dataset is ``opened`` matters to a round that is gone on with."""
        return ArraysRound(self, order, examples)

    def evaluate(self, examples: Arrays) -> dict[str, Mean | Scores]:
        """Return the task's metrics; it is given all the examples at once, for it knows best how to cut them."""
        chance.seed(0)
        return evaluate.joined_metrics([self.task.metrics(self.arrays(), examples)])

    def predict(self, examples: Arrays) -> dict[str, np.ndarray]:
        """Return the task's answers: name -> array with one entry per example."""
        chance.seed(0)
        return evaluate.joined_answers([(self.task.predict(self.arrays(), examples), count(examples))])


class ArraysRound:
    """One round of it: the update is the arrays after `fit` minus those before."""

    def __init__(self, learner: ArraysLearner, order: Train, examples: Arrays) -> None:
        """Raise `TaskFailed` for a sync that the task cannot follow, or weights that are not its own."""
        if words := beyond_arrays(order.sync):
            raise TaskFailed(f"sync.{words}")
        if order.private is not None:
            raise TaskFailed(
                "privacy: is of a step's gradients, and a task of arrays has none; put noise on the wire instead"
            )
        assert order.weights is not None, "a round of it is one call, which begins with the weights"
        learner.write(order.signature, load_vector(Path(order.weights), order.signature))
        self._learner, self._order, self._all = learner, order, examples
        self._start = self._end = learner.vector()
        self.step, self.examples, self.loss = 0, 0, 0.0

    def steps(self, batches: Callable[[int], Iterable[Arrays]]) -> Iterator[Step]:
        """Do the round's work, in which the task may take the ``batches(0)``; it is one step to us."""
        order = self._order
        of_run = order.done // order.sync.stride + 1
        granted = _Granted(order.steps, order.batch, order.done, of_run, order.seed, order.place, order.places)
        self._end, self.loss, self.examples = granted.fit(self._learner, self._all, batches(0))
        self.step = order.steps
        yield Step(order.steps - 1, self.loss, self.examples)

    def update(self) -> np.ndarray:
        """Return the flat float32 update."""
        return self._end - self._start

    def write_update(self, path: Path) -> None:
        save_vector(self.update(), path)

    def carried(self) -> None:
        """Say that a round is done from its beginning."""

    def ordered(self, order: Train) -> bool:
        """Say that no round of it goes on with what was begun ahead."""
        return False

    def keep_state(self) -> None:
        """Write that there is nothing to keep, where the order wants it: the task's arrays are all its state."""
        if self._order.state_out is not None:
            checkpoint.write_tensors(Path(self._order.state_out), {}, {})


@dataclass(frozen=True, slots=True)
class _Granted:
    """A budget that is yet to be given."""

    steps: int
    batch: int
    done: int
    round: int
    seed: int
    place: int = 0
    places: int = 1

    def fit(self, learner: ArraysLearner, examples: Arrays, batches: Iterable[Arrays]) -> tuple[np.ndarray, float, int]:
        """Have the task fit its arrays; return them as a vector, the mean loss, and how many examples that took."""
        taken: list[int] = []
        given = _counted(batches, taken)
        budget = Budget(self.steps, self.batch, self.done, self.round, given, self.place, self.places)
        chance.seed_step(self.seed, self.done, 0)
        fitted: object = learner.task.fit(learner.arrays(), examples, budget)
        if not isinstance(fitted, Fitted) or not isinstance(fitted.arrays, Mapping):
            raise TaskFailed(f"fit() returned a {type(fitted).__name__}; {_RETURN}, the arrays as a table by name")
        where = f"fit() of step {self.done + self.steps} of the run"
        vector = learner.packed(fitted.arrays, where)
        if not np.isfinite(vector).all():
            raise TaskFailed(f"{where}: the arrays are not finite; lower the rate at which it learns")
        return vector, _loss(fitted.loss, where), self._examples(fitted.examples, sum(taken), where)

    def _examples(self, said: object, taken: int, where: str) -> int:
        try:
            examples = taken if said is None else operator.index(said)  # pyright: ignore[reportArgumentType]
        except TypeError:
            raise TaskFailed(f"{where}: examples is a {type(said).__name__}; give a whole number") from None
        most = self.steps * self.batch
        if examples < 1:
            raise TaskFailed(f"{where}: no batch was taken and no number of examples is given; {_RETURN}")
        if examples > most:
            raise TaskFailed(
                f"{where}: {examples} examples, where {self.steps} steps of batch {self.batch} count for {most}; "
                f"set batch to {math.ceil(examples / self.steps)} or more, the same for all sites"
            )
        return examples


def _counted(batches: Iterable[Arrays], taken: list[int]) -> Iterator[Arrays]:
    for batch in batches:
        taken.append(count(batch))
        yield batch


def _loss(said: Any, where: str) -> float:
    try:
        loss = float(said)
    except (TypeError, ValueError):
        raise TaskFailed(f"{where}: loss is a {type(said).__name__}; give one number") from None
    if not math.isfinite(loss):
        raise TaskFailed(f"{where}: loss is {loss:g}; lower the rate at which it learns or look at the data")
    return loss


def _made(made: object) -> dict[str, np.ndarray]:
    if not isinstance(made, Mapping):
        raise TaskFailed(f"arrays() returned a {type(made).__name__}; return a table of name -> numpy array")
    return {name: _checked(name, value) for name, value in made.items()}


def _checked(name: object, value: Any) -> np.ndarray:
    called = f"arrays(): {str(name)[:128]!r}"
    if not can_travel(name):
        raise TaskFailed(f"{called} cannot travel under that name; use letters, digits, _ . -, at most 128")
    array = _array(value, called)
    wide = array.dtype.kind == "f" and array.itemsize > _WIDEST
    if array.dtype.kind not in "biuf" or wide:
        raise TaskFailed(f"{called} is an array of {array.dtype.name}; give floating numbers of at most 64 bits")
    if array.ndim > DIMENSIONS:
        raise TaskFailed(f"{called} has {array.ndim} dimensions; reshape it to {DIMENSIONS} at most")
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _travels(array: np.ndarray) -> bool:
    return array.dtype.kind == "f"


def _values(value: Any, spec: TensorSpec, whose: str) -> np.ndarray:
    if value is None:
        raise TaskFailed(f"{whose}: there is no array {spec.name!r}; return every one that was given")
    array = _array(value, f"{whose}: {spec.name!r}")
    if array.shape != spec.shape or array.dtype.kind not in "biuf":
        what = f"{array.dtype.name} of shape {list(array.shape)}"
        raise TaskFailed(
            f"{whose}: {spec.name!r} is {what} where numbers of shape {list(spec.shape)} were given; keep it"
        )
    with np.errstate(over="ignore"):  # becomes an infinity, which is told as one
        return array.astype(np.float32)


def _array(value: Any, called: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # rows of unequal lengths, a tensor that needs its gradient
        raise TaskFailed(f"{called} is no array of one shape; give a numpy array") from None
