"""A module as one flat float32 vector: its floating parameters and buffers in `state_dict()` order, tied ones once.

Integer and boolean buffers (BatchNorm's counter, masks) stay with the module and never travel.
"""

import numpy as np
import torch

from atoll.errors import TaskFailed
from atoll.spec.model import Signature, TensorSpec


def signature_of(module: torch.nn.Module) -> Signature:
    """Names and shapes of the tensors that make the vector, in order."""
    return tuple(TensorSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in _tensors(module).items())


def read_vector(module: torch.nn.Module, signature: Signature) -> np.ndarray:
    """Copy the module's tensors into a new float32 vector of shape ``(sum of sizes,)``."""
    tensors = _matched(module, signature)
    vector = np.empty(sum(spec.size for spec in signature), dtype=np.float32)
    start = 0
    for spec in signature:
        part = torch.from_numpy(vector[start : start + spec.size])
        part.copy_(tensors[spec.name].detach().reshape(-1))
        start += spec.size
    return vector


def write_vector(module: torch.nn.Module, signature: Signature, vector: np.ndarray) -> None:
    """Copy a flat float32 vector into the module's tensors, in place, whatever their device and precision."""
    tensors = _matched(module, signature)
    total = sum(spec.size for spec in signature)
    if vector.shape != (total,) or vector.dtype != np.float32:
        raise TaskFailed(f"weights: {vector.dtype} of shape {vector.shape} where the model has {total} float32 numbers")
    if not vector.flags.writeable:
        vector = vector.copy()  # torch warns of read-only memory (a mapped file, bytes)
    start = 0
    with torch.no_grad():
        for spec in signature:
            part = torch.from_numpy(vector[start : start + spec.size])
            tensors[spec.name].copy_(part.reshape(spec.shape))
            start += spec.size


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def _matched(module: torch.nn.Module, signature: Signature) -> dict[str, torch.Tensor]:
    tensors = _tensors(module)
    ours = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    theirs = [(spec.name, spec.shape) for spec in signature]
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            raise TaskFailed(
                f"model: tensor {mine[0]} {list(mine[1])} where the weights have {other[0]} {list(other[1])}; "
                "the task's code, params and data must be the ones the weights were made with"
            )
    if len(ours) != len(theirs):
        raise TaskFailed(
            f"model: {len(ours)} tensors where the weights have {len(theirs)}; use the task they came from"
        )
    return tensors
