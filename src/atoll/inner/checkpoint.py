"""What outlives a worker: the optimiser's state between rounds, and a round's own state while it goes on.

Each is one safetensors file, written beside its place and moved there whole, with a digest over every tensor and what
is said of them in its metadata. It is checked before anything of it is used: a file cut short by a loss of power, or
of another round, is told from a good one. No pickle, even of our own.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch

from atoll.errors import Corrupt
from atoll.inner import optimiser as optimisers
from atoll.inner.vector import varying
from atoll.inner.whole import put
from atoll.spec.document import canonical

_ENTRY = "atoll"  # of the file's metadata; the only one, for several are written in no certain order


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write named tensors and a few JSON values that go with them, whole or not at all. Raises `OSError`.

    Not flushed to the disk: a process that is killed loses nothing by that, and a lost power shows in the digest.
    """
    # Copies: two names may stand for one memory, which the format does not allow.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    part = path.with_suffix(".part")
    try:
        said = {"about": about, "digest": _digest(about, copies)}
        safetensors.torch.save_file(copies, part, metadata={_ENTRY: canonical(said).decode()})
        os.replace(part, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path.name}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and values of a file. Raises `Corrupt` unless they are the very ones that were written."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        said = json.loads(metadata[_ENTRY])
        about, digest = said["about"], said["digest"]
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise Corrupt(f"{path.name}: cannot be read ({error}); what it kept must be computed anew") from None
    if not isinstance(about, dict) or digest != _digest(about, tensors):
        raise Corrupt(f"{path.name}: its bytes are not the ones written; what it kept must be computed anew")
    return tensors, cast("dict[str, Any]", about)


def _digest(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256(canonical(about))
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimiser's state by names of a file that holds other tensors, too; not copied."""
    return {f"optimiser.{name}": tensor for name, tensor in optimisers.state(optimiser).items()}


def put_optimiser(optimiser: torch.optim.Optimizer, found: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser its state among the tensors of a file. Raises `Corrupt` when it does not fit."""
    moments = {name.removeprefix("optimiser."): t for name, t in found.items() if name.startswith("optimiser.")}
    optimisers.put_state(optimiser, moments)


def tensors_of(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer | None, gradient: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return everything that steps change, by name: parameters, all buffers, optimiser state, summed gradient."""
    found = {f"model.{name}": tensor for name, tensor in varying(model).items()}
    if optimiser is not None:
        found |= optimiser_tensors(optimiser)
    if gradient is not None:
        found["gradient"] = gradient
    return found


def put_tensors(
    found: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer | None,
    gradient: torch.Tensor | None,
) -> None:
    """Write back what `tensors_of` named, in place. Raises `Corrupt`, with nothing changed, when they do not fit."""
    places = tensors_of(model, None, gradient)
    here = {name: (tensor.dtype, tensor.shape) for name, tensor in places.items()}
    there = {name: (t.dtype, t.shape) for name, t in found.items() if not name.startswith("optimiser.")}
    if here != there or (len(there) < len(found) and optimiser is None):
        raise Corrupt("checkpoint: its tensors are not this model's; the round begins anew")
    if optimiser is not None:
        put_optimiser(optimiser, found)
    for name, place in places.items():
        put(place, found[name])
