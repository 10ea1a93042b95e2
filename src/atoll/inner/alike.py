"""Whether ranks that ought to have the same model and the same examples do. One sum over ranks; all say the same.

Ranks that drift apart train on, each its own model, and nothing else would tell.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from atoll.errors import TaskFailed
from atoll.inner.mesh import Mesh
from atoll.inner.whole import here
from atoll.spec.task import Arrays

# Ranks of unlike processors round unlike, so sums are held to a share of themselves, or of 1 where they are less.
_NEAR = {"float32": 1e-4, "bfloat16": 5e-2}  # of a loss
_WEIGHTS, _EXAMPLES = 1e-5, 2e-7
_TOLD = 8  # ranks that are named
_PLACE = 6  # numbers before the signs in a row: where a rank is
_MEND = "examples() depends on something besides the rows and the seed"
Row = Sequence[float]


def weight_sum(model: torch.nn.Module) -> float:
    """Return a sum over this rank's part of the parameters, in which each tensor has a weight of its own."""
    total = 0.0
    for number, parameter in enumerate(model.parameters(), 1):
        total += number * float(here(parameter.detach()).sum(dtype=torch.float64))
    return total


@dataclass(frozen=True, slots=True)
class Brought:
    """What a rank brings to a step: its `weight_sum` before it, and the `digest` of all its examples."""

    weights: float
    examples: tuple[float, float]


def digest(examples: Arrays) -> tuple[float, float]:
    """Return numbers for what examples are (how many, names, types, shapes) and for their values in their order.

    Takes one pass over them.
    """
    total = 0.0
    for number, name in enumerate(sorted(examples), 1):
        array = examples[name]
        each = array.reshape(len(array), -1).sum(axis=1, dtype=np.float64)
        total += number * float(each @ np.arange(1, len(array) + 1, dtype=np.float64))
    count = len(next(iter(examples.values())))
    return float(zlib.crc32(repr((count, _form(examples))).encode())), total


def check_step(
    mesh: Mesh, precision: str, brought: Brought, batch: Mapping[str, torch.Tensor], loss: float, step: int
) -> None:
    """Compare what ranks had before a step and made of it. Raises `TaskFailed` at all of them, in the same words.

    Of all ranks the examples, of those that keep the same part of the model the weights, and of those of one share of a
    batch what they were given of it and their ``loss``.
    """
    axes = ("pipeline", "shard", "tensor", "expert")
    last = mesh.place("pipeline") == mesh.layout.pipeline - 1
    here = [*(mesh.place(axis) for axis in axes), mesh.share, last]
    given = sum(number * float(batch[name].sum(dtype=torch.float64)) for number, name in enumerate(sorted(batch), 1))
    rows = mesh.gather([*here, *brought.examples, brought.weights, _form(batch), given, loss])

    def apart(column: int, key: Callable[[Row], tuple[float, ...]], near: float = 0.0) -> list[int]:
        return _apart(rows, key, lambda row: row[_PLACE + column], near)

    at = f"step {step + 1} of the run"
    if found := apart(0, lambda row: ()) or apart(1, lambda row: (), _EXAMPLES):
        raise TaskFailed(f"examples: {_named(found)} other examples, or another order, than rank {found[0]}; {_MEND}")
    if found := apart(2, lambda row: tuple(row[:4]), _WEIGHTS):
        raise TaskFailed(
            f"model: {_named(found)} other weights before {at} than rank {found[0]}; "
            "model() depends on something besides the seed"
        )
    if found := apart(3, lambda row: ()):
        raise TaskFailed(f"examples: {_named(found)} arrays of other names or shapes than rank {found[0]}; {_MEND}")
    if found := apart(4, lambda row: (row[4],), _EXAMPLES):
        raise TaskFailed(
            f"examples: {_named(found)} other examples at {at} than rank {found[0]}, of the same share of a batch; "
            f"{_MEND}"
        )
    if found := apart(5, lambda row: (row[4], row[5]), _NEAR[precision]):
        values = [rows[rank][_PLACE + 5] for rank in found]
        raise TaskFailed(
            f"loss at {at} is {values[0]:g} at rank {found[0]} and {values[1]:g} at rank {found[1]}, which have the "
            "same weights and examples; model() or loss() depends on something besides the seed"
        )


def _form(arrays: Mapping[str, torch.Tensor] | Arrays) -> float:
    """Return a number for names, types and shapes, but for how many examples there are."""
    said = [(name, str(arrays[name].dtype), tuple(arrays[name].shape[1:])) for name in sorted(arrays)]
    return float(zlib.crc32(repr(said).encode()))


def _apart(
    rows: Sequence[Row], key: Callable[[Row], tuple[float, ...]], sign: Callable[[Row], float], near: float
) -> list[int]:
    """Return a rank and those that differ from it where they should not; nothing where all agree."""
    first: dict[tuple[float, ...], int] = {}
    for rank, row in enumerate(rows):
        first.setdefault(key(row), rank)
    for of, rank in first.items():
        others = [n for n, row in enumerate(rows) if key(row) == of and not _same(sign(row), sign(rows[rank]), near)]
        if others:
            return [rank, *others]
    return []


def _same(one: float, other: float, near: float) -> bool:
    """What is not finite at both is told elsewhere, with its cause."""
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= near * max(1.0, abs(one))


def _named(found: Sequence[int]) -> str:
    others = [str(rank) for rank in found[1 : 1 + _TOLD]]
    more = " and more" if len(found) > 1 + _TOLD else ""
    return f"rank {others[0]} has" if len(others) == 1 else f"ranks {', '.join(others)}{more} have"
