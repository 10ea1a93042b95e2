"""What a rank holds of a model that is one flat vector elsewhere: its parts of tensors, and where they lie in there."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from atoll.inner.mesh import Mesh
from atoll.inner.whole import lying
from atoll.spec.model import Signature

_ALONE = Mesh()
_CUTTING = ("data", "shard", "expert", "context", "tensor")  # axes along which ranks may have the same


@dataclass(frozen=True, slots=True)
class Held:
    """A part of a tensor: its own memory, where it begins in its tensor, the tensor's shape, and where that begins in
    the flat vector. Of ranks that hold the same one is the ``first``, which writes it."""

    name: str
    value: torch.Tensor
    begins: tuple[int, ...]
    shape: tuple[int, ...]
    at: int
    first: bool = True

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the same places in a flat vector: the vector's own memory."""
        if not self.value.numel():
            return torch.empty_like(self.value, dtype=vector.dtype)
        strides = _strides(self.shape)
        within = sum(begin * stride for begin, stride in zip(self.begins, strides, strict=True))
        return vector.as_strided(self.value.shape, strides, vector.storage_offset() + self.at + within)

    def runs(self) -> "Iterator[tuple[int, torch.Tensor]]":
        """Yield its numbers as they follow each other in the vector: where each run of them begins there, and they."""
        if not self.value.numel():
            return
        rows = len(self.shape)  # dimensions that tell runs apart; behind these all of the tensor is here
        while rows and self.value.shape[rows:] == self.shape[rows:]:
            rows -= 1
        places = (range(begin, begin + size) for begin, size in zip(self.begins, self.value.shape[:rows], strict=False))
        strides = _strides(self.shape)
        last = sum(begin * stride for begin, stride in zip(self.begins[rows:], strides[rows:], strict=True))
        runs = self.value.contiguous().reshape(math.prod(self.value.shape[:rows]), -1)
        for place, run in zip(itertools.product(*places), runs, strict=True):
            yield self.at + last + sum(at * stride for at, stride in zip(place, strides[:rows], strict=True)), run

    def between(self, first: int, last: int) -> "Iterator[Held]":
        """Yield what of it lies between two places of the whole vector: views."""
        size = math.prod(self.shape)
        for box in _boxes(self.shape, max(first - self.at, 0), min(last - self.at, size)):
            mine = [(begin, begin + extent) for begin, extent in zip(self.begins, self.value.shape, strict=True)]
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(mine, box, strict=True)]
            if all(begin < end for begin, end in both):
                cut = tuple(slice(b - at, e - at) for (b, e), at in zip(both, self.begins, strict=True))
                yield replace(self, value=self.value[cut], begins=tuple(begin for begin, _ in both))


def held(tensors: Mapping[str, torch.Tensor], signature: Signature, mesh: Mesh = _ALONE) -> Iterator[Held]:
    """Yield what lies at this rank of the tensors that a signature names, in its order; some may be at others."""
    at = 0
    for spec in signature:
        if spec.name in tensors:
            yield held_of(spec.name, tensors[spec.name], mesh, at)
        at += spec.size


def held_of(name: str, tensor: torch.Tensor, mesh: Mesh = _ALONE, at: int = 0) -> Held:
    """Return what lies of one tensor at this rank."""
    value, where = lying(tensor)
    return Held(name, value, tuple(each.start for each in where), tuple(tensor.shape), at, _is_first(mesh, tensor))


def changes(own: Iterable[Held], start: torch.Tensor, first: int, last: int) -> Iterator[Held]:
    """Yield by how much parts differ from the flat ``start`` between two of its places, as they lie in that stretch."""
    for one in own:
        for each in one.between(first, last):
            yield replace(each, value=each.value.float().cpu() - each.of(start), at=each.at - first)


def written(parts: Iterable[Held], write: Callable[[Held], object]) -> bool:
    """Have parts written, each by the first rank that holds it; tell whether all are finite."""
    finite = True
    for one in parts:
        finite = finite and bool(one.value.isfinite().all())
        if one.first:
            write(one)
    return finite


def _is_first(mesh: Mesh, tensor: torch.Tensor) -> bool:
    """Tell whether this rank is the first of those that hold the same part of a tensor."""
    if mesh.device is None:
        return mesh.rank == 0
    names = getattr(getattr(tensor, "device_mesh", None), "mesh_dim_names", None) or ()
    placed = zip(names, getattr(tensor, "placements", ()), strict=True)
    cut = {name for name, placement in placed if not placement.is_replicate()}
    return all(axis in cut or mesh.place(axis) == 0 for axis in _CUTTING)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=1))[::-1] if shape else ()


def _boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield boxes, (begin, end) in each dimension, that are a tensor's numbers from first to last, row after row: at
    most two for each dimension."""
    if first >= last:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    top, bottom = -(-first // row), last // row  # rows that are there from end to end
    if top > bottom:
        yield from (((bottom, top), *box) for box in _boxes(shape[1:], first - bottom * row, last - bottom * row))
        return
    if first < top * row:
        yield from (((top - 1, top), *box) for box in _boxes(shape[1:], first - (top - 1) * row, row))
    if top < bottom:
        yield ((top, bottom), *((0, size) for size in shape[1:]))
    if bottom * row < last:
        yield from (((bottom, bottom + 1), *box) for box in _boxes(shape[1:], 0, last - bottom * row))
