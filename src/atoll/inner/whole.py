"""Tensors of which each rank has a part, and the same tensors whole: what travels between sites and lies in files.

All ranks that have parts of a tensor call these together, in the same order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@runtime_checkable
class Staged(Protocol):
    """A model of which this rank has some tensors, whole or in part, and others are at other ranks."""

    elsewhere: frozenset[str]

    def tell(self, name: str, value: torch.Tensor) -> None:
        """Give a tensor's value to all ranks from the one that has it, in place."""
        ...

    def listed(self, mine: Sequence[list[Any]]) -> list[list[Any]]:
        """Return what all stages say of their tensors, in JSON values and the order of the stages."""
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


def put(place: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value into a tensor, each rank its own part, whatever its device and precision."""
    with torch.no_grad():
        place.copy_(part(value.to(place.dtype), place))


def part(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a whole value in parts as another tensor is; where that one is whole, itself. Nothing is sent."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    cut = cast("DTensor", like)
    return distribute_tensor(value, cut.device_mesh, cut.placements, src_data_rank=None)


def lying(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Return the part of a tensor that lies at this rank, its own memory, and where in the whole it is."""
    plain = tensor.detach()
    if not hasattr(plain, "full_tensor"):
        return plain, tuple(slice(0, size) for size in plain.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # as torch's checkpoints do

    cut = cast("DTensor", plain)
    sizes, begins = compute_local_shape_and_global_offset(cut.shape, cut.device_mesh, cut.placements)
    return cut.to_local(), tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter's gradient, from here on cut as the parameter is: torch leaves an embedding's otherwise."""
    gradient = cast("torch.Tensor", parameter.grad)
    if hasattr(parameter, "full_tensor") and hasattr(gradient, "full_tensor"):
        cut, made = cast("DTensor", parameter), cast("DTensor", gradient)
        if made.placements != cut.placements:
            gradient = parameter.grad = made.redistribute(placements=cut.placements)
    return gradient
