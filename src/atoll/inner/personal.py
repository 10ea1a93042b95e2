"""Personal tensors: those of a model that never leave their site, chosen by patterns of their names.

FedPer (Arivazhagan et al., 2019) and FedRep (Collins et al., 2021) keep the head, FedBN (Li et al., 2021) the
normalisations. All that is exchanged is told by a signature that lacks them.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from atoll.errors import Corrupt, TaskFailed
from atoll.inner import checkpoint
from atoll.inner.mesh import Mesh
from atoll.inner.whole import here, put
from atoll.spec.document import near_miss
from atoll.spec.model import Patterns, Signature, fits

_ALONE = Mesh()
_SHOWN = 8  # names of tensors in a sentence


def chosen(signature: Signature, patterns: Patterns) -> frozenset[str]:
    """Return the names that fit a pattern. Raises `TaskFailed` for a pattern that none fits, or when all fit one."""
    names = [spec.name for spec in signature]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = near_miss(pattern, names)
            if len(names) > _SHOWN and near.startswith("; there"):
                near = f"; there is {', '.join(names[:_SHOWN])}, ..."
            raise TaskFailed(f"sync.keep_local: no tensor's name fits {pattern!r}{near}")
    found = frozenset(name for name in names if fits(name, patterns))
    if not any(spec.size for spec in signature if spec.name not in found):
        raise TaskFailed(f"sync.keep_local: every tensor fits {', '.join(patterns)}; leave something to be exchanged")
    return found


def shared(signature: Signature, personal: Collection[str]) -> Signature:
    """Return the signature of what is exchanged."""
    return tuple(spec for spec in signature if spec.name not in personal)


def shared_part(vector: np.ndarray, signature: Signature, personal: Collection[str]) -> np.ndarray:
    """Return what is exchanged of a vector of the whole model: that itself where nothing stays."""
    if not personal:
        return vector
    parts: list[np.ndarray] = []
    start = 0
    for spec in signature:
        if spec.name not in personal:
            parts.append(vector[start : start + spec.size])
        start += spec.size
    return np.concatenate(parts)


def write_personal(path: Path, tensors: Mapping[str, torch.Tensor], mesh: Mesh = _ALONE) -> None:
    """Write a site's personal tensors: all ranks together, each what it has of them.

    Raises `TaskFailed` for values that no round can begin from.
    """
    finite = mesh.gather([bool(here(tensor).isfinite().all()) for tensor in tensors.values()])
    for name, everywhere in zip(tensors, zip(*finite, strict=True), strict=True):
        if not all(everywhere):
            raise TaskFailed(f"tensor {name}, which stays at its site, is not finite; lower the optimiser's rate")
    checkpoint.write_tensors(path, tensors, {}, mesh)


def put_personal(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Give a model's personal tensors the values that were written. Raises `Corrupt` where they are not of these."""
    found = checkpoint.read_tensors(path)[0]
    here = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if here != {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}:
        raise Corrupt(f"{path.name}: its tensors are not those that stay of this model; use the code that made it")
    for name, tensor in tensors.items():
        put(tensor, found[name])
