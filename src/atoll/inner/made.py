"""What the user's task makes, a model and examples: made from a seed, and looked at before anything is done with it."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch.nn.parameter import is_lazy

from atoll.errors import TaskFailed
from atoll.inner import chance
from atoll.inner.task import hands_arrays
from atoll.spec.document import Label
from atoll.spec.task import Arrays, ArraysTask, Rows, Task

_LABEL: TypeAdapter[str] = TypeAdapter(Label)
TENSORS = 100_000  # of a signature
DIMENSIONS = 16  # of a tensor
FEW = 8  # rows of which examples are made once more, to see that each is made of its own
_NUMBERS = "biuf"  # numpy's kinds of arrays that become tensors


def make_model(task: Task, seed: int) -> torch.nn.Module:
    """Return the task's model, made with all generators at ``seed``; raise `TaskFailed` for one that cannot travel."""
    chance.seed(seed)
    model: object = task.model()
    if not isinstance(model, torch.nn.Module):
        raise TaskFailed(f"model() returned a {type(model).__name__}; return a torch.nn.Module")
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        _check_tensor(name, tensor)
    if not any(parameter.requires_grad and parameter.numel() for parameter in model.parameters()):
        raise TaskFailed("model() has no parameter to train; give it one with requires_grad=True")
    if len(named) > TENSORS:
        raise TaskFailed(f"model() has {len(named):,} tensors where {TENSORS:,} may travel; stack the small ones")
    return model


def make_examples(task: Task | ArraysTask, rows: Rows, seed: int) -> dict[str, np.ndarray]:
    """Return the task's examples as contiguous, writable arrays of numbers, all equally long and not empty.

    For torch float64 becomes float32, the precision models have here. Raises `TaskFailed` for what is no numbers.
    """
    chance.seed(seed)
    made: object = task.examples(rows)
    if not isinstance(made, Mapping):
        raise TaskFailed(f"examples() returned a {type(made).__name__}; return a table of name -> numpy array")
    widest = 8 if hands_arrays(task) else 4
    examples = {name: _array(name, value, widest) for name, value in made.items()}
    lengths = {name: len(array) for name, array in examples.items()}
    if len(set(lengths.values())) != 1:
        raise TaskFailed(f"examples() returned arrays of lengths {lengths}; give at least one, all equally long")
    if not next(iter(lengths.values())):
        raise TaskFailed("examples() returned no examples; look at the dataset and at what the task filters out")
    return examples


def check_alone(examples: Arrays, few: Arrays) -> None:
    """Raise `TaskFailed` unless examples begin with those that were made of a few of their rows alone."""
    for name, made in examples.items():
        alone = few.get(name)
        if alone is None or not np.array_equal(made[: len(alone)], alone, equal_nan=made.dtype.kind == "f"):
            raise TaskFailed(
                f"examples: {name[:40]!r} is another for a row when the others are not there, and privacy is of each "
                "by itself; make it of its own row, with sizes and scales that the job gives"
            )


def count(examples: Mapping[str, Sized]) -> int:
    """Return how many examples there are."""
    return len(next(iter(examples.values())))


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Return arrays as the tensors that torch tasks are given; they share their memory."""
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def can_travel(name: object) -> bool:
    """Tell whether a tensor may cross borders under this name."""
    try:
        _LABEL.validate_python(name, strict=True)
    except ValidationError:
        return False
    return True


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    called = f"model: tensor {name[:128]!r}"
    if not can_travel(name):
        raise TaskFailed(
            f"{called} cannot travel under that name; name its modules with letters, digits, _ . -, at most 128 in all"
        )
    if is_lazy(tensor) or tensor.is_meta:
        raise TaskFailed(f"{called} has no values yet; give its module all its sizes, on the CPU")
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.itemsize > 4):
        raise TaskFailed(f"{called} is {tensor.dtype}; weights travel as float32, so return model.float()")
    if tensor.ndim > DIMENSIONS:
        raise TaskFailed(f"{called} has {tensor.ndim} dimensions; reshape it to {DIMENSIONS} at most")


def _array(name: object, value: Any, widest: int) -> np.ndarray:
    """Return one array; a floating number takes at most ``widest`` bytes in it."""
    if not isinstance(name, str):
        raise TaskFailed(f"examples() has a {type(name).__name__} for an array's name; use text")
    called = f"examples: {name[:40]!r}"
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # rows of unequal lengths, a tensor on an accelerator
        raise TaskFailed(f"{called} is no array of one shape; pad its rows to one length") from None
    if array.ndim == 0:
        raise TaskFailed(f"{called} is one value; give an array with one entry per example")
    if array.dtype.kind not in _NUMBERS:
        raise TaskFailed(
            f"{called} is an array of {_what(array)}; turn it into numbers of one type, "
            "with missing ones filled, as by np.array(column, dtype=np.float32)"
        )
    wide = array.dtype.kind == "f" and array.itemsize > widest
    kind = np.dtype(f"f{widest}") if wide else array.dtype.newbyteorder("=")
    return np.require(array, dtype=kind, requirements=["C", "W"])


def _what(array: np.ndarray) -> str:
    kinds = {"O": "Python objects", "U": "text", "S": "bytes", "M": "dates", "m": "durations", "c": "complex numbers"}
    return kinds.get(array.dtype.kind, "records")
