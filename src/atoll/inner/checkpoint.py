"""What outlives a worker: the optimiser's state between rounds, and a round's own state while it goes on.

Each is one safetensors file, written beside its place and moved there whole, with a digest over every tensor and what
is said of them in its metadata. It is checked before anything of it is used: a file cut short by a loss of power, or
of another round, is told from a good one. No pickle, even of our own.
"""

import hashlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch

from atoll.errors import Corrupt
from atoll.inner import optimiser as optimisers
from atoll.inner.vector import varying
from atoll.inner.whole import here, put
from atoll.spec.document import canonical

log = logging.getLogger(__name__)
_NUMBERS = itertools.count()
_ENTRY = "atoll"  # of the file's metadata; the only one, for several are written in no certain order


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write named tensors and a few JSON values that go with them, whole or not at all. Raises `OSError`.

    Not flushed to the disk: a process that is killed loses nothing by that, and a lost power shows in the digest.
    """
    _write(path, _copied(tensors), about)


class Background:
    """Writes one file at a time while its caller goes on; a failure is logged, since no such file is ever needed."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.seconds = 0.0  # that the last one took
        self.step: int | None = None  # that the file is of

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        """Copy the tensors, and write them as `write_tensors` does; the caller waits for the copies only."""
        self.wait()
        copies, about = _copied(tensors), dict(about)
        self._thread = threading.Thread(target=self._write, args=(path, copies, about), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written: a write to a disk ends, or fails."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, path: Path, copies: dict[str, torch.Tensor], about: Mapping[str, Any]) -> None:
        began = time.monotonic()
        try:
            _write(path, copies, about)
        except OSError as error:  # the round needs none unless its ranks are lost, and then does more of itself again
            log.warning("no checkpoint after step %s of the round: %s", about.get("step"), error)
        else:
            self.step = about["step"]
        self.seconds = time.monotonic() - began


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors: two names may stand for one memory, which the format does not allow."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _write(path: Path, copies: dict[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    part = path.with_suffix(f".{next(_NUMBERS)}.part")  # a round that lost its group may still be writing its own
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


def parts_of(
    model: torch.nn.Module, optimiser: torch.optim.Optimizer | None, gradient: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return what `tensors_of` names, of each only the part that lies at this rank: its own memory, not a copy."""
    return {name: here(tensor.detach()) for name, tensor in tensors_of(model, optimiser, gradient).items()}


def put_parts(
    found: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer | None,
    gradient: torch.Tensor | None,
) -> None:
    """Write back what `parts_of` named, at a rank that has the same place in the same layout. Raises `Corrupt`."""
    places = parts_of(model, None, gradient)
    here = {name: (tensor.dtype, tensor.shape) for name, tensor in places.items()}
    if here != {name: (t.dtype, t.shape) for name, t in found.items() if not name.startswith("optimiser.")}:
        raise Corrupt("mirror: its tensors are not this model's; the round begins anew")
    if optimiser is not None:
        optimisers.put_parts(optimiser, {n.removeprefix("optimiser."): t for n, t in found.items() if n not in places})
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(found[name])


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
