"""Tensors of which each rank has a part, and the same tensors whole: what travels between sites and lies in files.

All ranks that have parts of a tensor call these together, in the same order.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch


@runtime_checkable
class Staged(Protocol):
    """A model of which this rank has some tensors, whole or in part, and others are at other ranks."""

    elsewhere: frozenset[str]

    def tell(self, name: str, value: torch.Tensor) -> None:
        """Give a tensor's value to all ranks from the one that has it, in place."""
        ...

    def add(self, values: torch.Tensor) -> None:
        """Sum values over the stages, in place."""
        ...

    def collect(self, mine: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """Return all stages' tensors by name, whole, at the ranks that ``keep`` them; each stage has its own names."""
        ...


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's whole value; of one that lies here anyway, itself. Not for gradients to flow through."""
    # Asked of the tensor, because importing the type takes a second, and most processes never see one.
    join = getattr(tensor.detach(), "full_tensor", None)
    return cast("torch.Tensor", join()) if join is not None else tensor.detach()


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor: its own memory, not a copy; of one that is whole, itself."""
    local = getattr(tensor, "to_local", None)  # asked so for the same reason
    return cast("torch.Tensor", local()) if local is not None else tensor


def described(tensors: Mapping[str, torch.Tensor]) -> list[list[object]]:
    """Return names, types and shapes in JSON values, from which `room` makes tensors like these. No pickle."""
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()]


def room(kind: str, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor without values, of a type and shape as `described`."""
    return torch.empty(tuple(shape), dtype=getattr(torch, kind))


def put(place: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value into a tensor, each rank its own part, whatever its device and precision."""
    with torch.no_grad():
        place.copy_(part(value.to(place.dtype), place))


def part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole value in parts as another tensor is; where that one is whole, itself. Nothing is sent."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    cut = cast("DTensor", like)
    return distribute_tensor(value, cut.device_mesh, cut.placements, src_data_rank=None)


def lying(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Return the part of a tensor that lies at this rank, its own memory, and where in the whole it is."""
    plain = tensor.detach()
    if not hasattr(plain, "full_tensor"):
        return plain, tuple(slice(0, size) for size in plain.shape)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as torch's checkpoints do

    cut = cast("DTensor", plain)
    sizes, begins = compute_local_shape_and_global_offset(cut.shape, cut.device_mesh, cut.placements)
    return cut.to_local(), tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's tensors whole, one after the other, at the ranks that ``keep`` them."""
    if isinstance(model, Staged):
        return model.collect(tensors, keep)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if keep:
            found[name] = value
    return found
