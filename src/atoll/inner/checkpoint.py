"""A round's state by name, and files of whole tensors that go on from round to round: an optimiser's, for one.

A file is safetensors, written beside its place and moved there whole, with a digest over every tensor and what is said
of them in its metadata. It is checked before anything of it is used: one cut short by a loss of power, or of another
round, is told from a good one. No pickle, even of our own.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import safetensors
import torch

from atoll.errors import Corrupt
from atoll.inner import optimiser as optimisers
from atoll.inner.held import Held, held_of, written
from atoll.inner.joint import Joint
from atoll.inner.mesh import Mesh
from atoll.inner.parts import Part, Parts, moves, part_of, told
from atoll.inner.vector import varying
from atoll.inner.whole import Staged
from atoll.spec.document import canonical

_OPTIMISER, _MODEL, _GRADIENT = "optimiser.", "model.", "gradient."  # before names in files that hold all of them
Tensors = Mapping[str, torch.Tensor]
_ENTRY = "atoll"  # of the file's metadata, as in `parts`
_NO_DIGEST = "0" * 64  # as long as one
_ALONE = Mesh()


def write_tensors(
    path: Path,
    tensors: Tensors,
    about: Mapping[str, Any],
    mesh: Mesh = _ALONE,
    model: torch.nn.Module | None = None,
    flat: Mapping[str, tuple[int, Iterable[Held]]] = MappingProxyType({}),
) -> None:
    """Write named tensors and a few JSON values that go with them, whole or not at all. Raises `OSError`.

    The ranks of a mesh write it together, of each tensor what lies there; in stages of a ``model`` each has its own.
    ``flat`` are float32 vectors by name: how many numbers each has, and what lies here of it. The rest are zeros. Not
    flushed to the disk: a process that is killed loses nothing by that, and a lost power shows in the digest.
    """
    listed = [[name, str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()]
    if isinstance(model, Staged):
        listed = model.listed(listed)
    kinds = {name: (cast("torch.dtype", getattr(torch, kind)), tuple(shape)) for name, kind, shape in listed}
    kinds |= {name: (torch.float32, (size,)) for name, (size, _) in flat.items()}
    head, places = told({"about": about, "digest": _NO_DIGEST}, kinds)
    file = Joint(mesh, path, max((place.stop for place in places.values()), default=len(head)))
    try:
        own = {name: [held_of(name, tensor, mesh)] for name, tensor in tensors.items()}
        for name, parts in (*own.items(), *((name, parts) for name, (_, parts) in flat.items())):
            written(parts, partial(file.write, since=places[name].start))
        file.written()
        if mesh.rank == 0:
            made = file.read()
            found = {name: made[place].view(kinds[name][0]).reshape(kinds[name][1]) for name, place in places.items()}
            head, _ = told({"about": about, "digest": _digest(about, found)}, kinds)
        file.put(head)
    finally:
        file.drop()


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and values of a file. Raises `Corrupt` unless they are the very ones that were written."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        said = json.loads(metadata[_ENTRY])
        about, digest = said["about"], said["digest"]
        found = _digest(about, tensors)
    except (OSError, KeyError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise Corrupt(f"{path.name}: cannot be read ({error}); what it kept must be computed anew") from None
    if not isinstance(about, dict) or digest != found:
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
    return {f"{_OPTIMISER}{name}": tensor for name, tensor in optimisers.state(optimiser).items()}


def whole_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
    """Return whole tensors as parts of themselves."""
    return {name: Part(tensor, (0,) * tensor.ndim, tuple(tensor.shape)) for name, tensor in tensors.items()}


def state_of(
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer | None,
    summed: Tensors,
    before: Parts = MappingProxyType({}),
) -> dict[str, Part]:
    """Return everything that steps change, by name, of each what lies at this rank: its own memory, not a copy.

    It is parameters, all buffers, the optimiser's state, and the ``summed`` gradients by parameter, if there are any.
    They lie as ``before``, where that is given.
    """
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in varying(model).items()}
    tensors |= {f"{_GRADIENT}{name}": tensor for name, tensor in summed.items()}
    if optimiser is not None:
        tensors |= optimiser_tensors(optimiser)
    return {name: part_of(tensor, before.get(name)) for name, tensor in tensors.items()}


class Fitted:
    """What was kept, found to be all that this rank lacks of it; nothing is changed until it is `put`."""

    def __init__(
        self,
        found: Sequence[Parts],
        model: torch.nn.Module,
        optimiser: torch.optim.Optimizer | None,
        summed: Tensors | None,
    ) -> None:
        """``found`` are parts as `state_of` names them, of any layout's ranks; without ``summed``, an optimiser's only.

        Raises `Corrupt` for another model's.
        """
        self._optimiser, self._moments = optimiser, dict[str, torch.Tensor]()
        elsewhere = model.elsewhere if isinstance(model, Staged) else frozenset[str]()
        places = state_of(model, None, summed) if summed is not None else {}
        for name, kept in {name: part for parts in found for name, part in parts.items()}.items():
            _, _, rest = name.partition(".")
            of = rest.partition(".")[2] if name.startswith(_OPTIMISER) else rest
            if name in places or of in elsewhere:
                continue
            if optimiser is None or not name.startswith(_OPTIMISER):
                raise Corrupt(f"tensor {name[:80]!r}: what is kept is not this model's; the round begins anew")
            moment = self._moments[rest] = optimisers.room(optimiser, rest, kept.value.dtype, kept.whole)
            places[name] = part_of(moment)
        self._moves = moves(places, found)

    def put(self) -> None:
        """Write it into the model, the optimiser and the summed gradients, in place."""
        with torch.no_grad():
            for place, value in self._moves:
                place.copy_(value)
        if self._optimiser is not None:
            optimisers.put_state(self._optimiser, self._moments)


def put_optimiser(optimiser: torch.optim.Optimizer, found: Tensors, model: torch.nn.Module) -> None:
    """Give a model's optimiser its state among the whole tensors of a file. Raises `Corrupt` when it does not fit."""
    kept = {name: part for name, part in whole_parts(found).items() if name.startswith(_OPTIMISER)}
    Fitted([kept], model, optimiser, None).put()
