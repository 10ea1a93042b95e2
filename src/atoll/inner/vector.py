"""A module as one flat float32 vector: its floating parameters and buffers in `state_dict()` order, tied ones once.

Integer and boolean buffers (BatchNorm's counter, masks) and those outside the state stay with the module and never
travel.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.whole import Staged, put, whole
from atoll.spec.model import Signature, TensorSpec, elements

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS += (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def signature_of(module: nn.Module) -> Signature:
    """Names and shapes of the tensors that make the vector, in order."""
    return tuple(TensorSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in _tensors(module).items())


def matched(module: nn.Module, signature: Signature, personal: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return the tensors that a signature names and that are here, themselves; `TaskFailed` for another model's."""
    tensors = {name: tensor for name, tensor in _tensors(module).items() if name not in personal}
    there = module.elsewhere if isinstance(module, Staged) else frozenset[str]()
    expected = tuple(spec for spec in signature if spec.name not in there)
    check_same([(name, tuple(tensor.shape)) for name, tensor in tensors.items()], expected)
    return tensors


def read_vector(module: nn.Module, signature: Signature, personal: Collection[str] = ()) -> np.ndarray:
    """Copy the module's tensors, but for the ``personal`` ones, into a new float32 vector of ``(sum of sizes,)``."""
    tensors = matched(module, signature, personal)
    vector = np.empty(elements(signature), dtype=np.float32)
    staged = module if isinstance(module, Staged) else None
    start = 0
    for spec in signature:
        part = torch.from_numpy(vector[start : start + spec.size])
        if spec.name in tensors:
            part.copy_(whole(tensors[spec.name]).reshape(-1))
        if staged is not None:
            staged.tell(spec.name, part)
        start += spec.size
    return vector


def write_vector(module: nn.Module, signature: Signature, vector: np.ndarray, personal: Collection[str] = ()) -> None:
    """Copy a flat float32 vector into the module's tensors, in place, whatever their device and precision.

    The ``personal`` ones, which the signature lacks, are left as they are. Running variances are mended.
    """
    tensors = matched(module, signature, personal)
    total = elements(signature)
    if vector.shape != (total,) or vector.dtype != np.float32:
        raise TaskFailed(f"weights: {vector.dtype} of shape {vector.shape} where the model has {total} float32 numbers")
    if not vector.flags.writeable:
        vector = vector.copy()  # torch warns of read-only memory (a mapped file, bytes)
    start = 0
    with torch.no_grad():
        for spec in signature:
            part = torch.from_numpy(vector[start : start + spec.size])
            if spec.name in tensors:
                put(tensors[spec.name], part.reshape(spec.shape))
            start += spec.size
    mend_variances(module)


def mend_variances(module: nn.Module) -> None:
    """Make a running variance below zero, as rounding on the way may leave one, zero: else its root is no number."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _NORMS) and part.running_var is not None:
                part.running_var.clamp_(min=0)


def check_same(ours: Sequence[tuple[str, tuple[int, ...]]], signature: Signature) -> None:
    """Raise `TaskFailed` unless a task's tensors, by name and shape and in order, are those of the weights."""
    for (name, shape), spec in zip(ours, signature, strict=False):
        if (name, shape) != (spec.name, spec.shape):
            raise TaskFailed(
                f"model: tensor {name} {list(shape)} where the weights have {spec.name} {list(spec.shape)}; "
                "the task's code, params and data must be the ones the weights were made with"
            )
    if len(ours) != len(signature):
        raise TaskFailed(
            f"model: {len(ours)} tensors where the weights have {len(signature)}; use the task they came from"
        )


def save_vector(vector: np.ndarray, path: Path) -> None:
    """Write a flat float32 vector as bare numbers, whole or not at all. Not flushed: its reader has a digest of it."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(vector.data)  # numpy's own writer would not say what went wrong with the disk
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_vector(path: Path, signature: Signature) -> np.ndarray:
    """Read a vector of this signature; raise `Corrupt` when the file has another count of numbers."""
    vector = np.fromfile(path, dtype=np.float32)
    total = elements(signature)
    if len(vector) != total:
        raise Corrupt(f"weights: {len(vector)} numbers where the signature has {total}; fetch them again")
    return vector


def at_rest(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the tensors that never travel, by name."""
    travelling = {id(tensor) for tensor in _tensors(module).values()}
    return {name: tensor.detach().clone() for name, tensor in varying(module).items() if id(tensor) not in travelling}


def put_back(module: nn.Module, rest: Mapping[str, torch.Tensor]) -> None:
    """Write what `at_rest` returned back in place, so that work done before leaves no trace in what comes."""
    named = _named(module)
    with torch.no_grad():
        for name, tensor in rest.items():
            named[name].copy_(tensor)


def named(module: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return those of the tensors that can travel which have these names, themselves and not copies."""
    return {name: tensor for name, tensor in _tensors(module).items() if name in names}


def varying(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by name, themselves, but for constants: frozen parameters that the module keeps
    out of its state, as a large model's below a small adapter. Nobody copies them, keeps them or writes to them."""
    state = {id(value) for value in module.state_dict(keep_vars=True).values()}
    parameters = dict(module.named_parameters()).items()
    kept = {name: parameter for name, parameter in parameters if parameter.requires_grad or id(parameter) in state}
    return {**kept, **dict(module.named_buffers())}


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found
