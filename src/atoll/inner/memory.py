"""Where a round that lost its group is found again: at a rank that lives on, or in the mirrors; only then on a disk.

All ranks of the new group call this together, and come to the same step, or to none.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from atoll.inner.mesh import Mesh
from atoll.inner.mirror import Mirror
from atoll.inner.whole import described, room
from atoll.spec.document import canonical

Tensors = Mapping[str, torch.Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Carried:
    """A round as a rank has it after a step: its part of all tensors, and in JSON values which round and step it is."""

    about: Mapping[str, Any]
    tensors: Tensors


@dataclass(slots=True)
class Memory:
    """What a process has besides a disk: its place's mirror, and the round in which it lost its peers, if it did."""

    mirror: Mirror = field(default_factory=lambda: Mirror(()))
    carried: Carried | None = None
    again: bool = False  # whether the group met since the last round was done: what is mirrored is of this one
    leaving: Callable[[], bool] = lambda: False  # whether the group is to meet anew

    def found(self, mesh: Mesh, identify: Callable[[], str]) -> Carried | None:
        """Return the newest state of the round that every rank of the mesh can have. Raises `Corrupt`.

        ``identify`` gives the round's digest, for which its weights are read: not asked where nobody was lost.
        """
        if not self.again:
            return None
        identity = identify()
        if mesh.device is None:
            found = _from_peers(mesh, self.carried if _is(self.carried, identity) else None)
            if found is not None:
                return found
        return self._mirrored(mesh, identity)

    def keep(self, mesh: Mesh, carried: Carried) -> None:
        """Mirror what a step has left; a rank of copies does so for all. Without room for it training goes on."""
        if mesh.device is None and mesh.rank:
            return
        try:
            self.mirror.write(int(carried.about["step"]), {**carried.about, "cut": _cut(mesh)}, carried.tensors)
        except OSError as error:
            log.warning("the round's state cannot be mirrored (%s); a lost rank costs the steps since", error.strerror)

    def _mirrored(self, mesh: Mesh, identity: str) -> Carried | None:
        if mesh.device is None:  # each holds the whole, and one of them has mirrored it
            newest = max(self.mirror.steps({"round": identity, "cut": ""}))
            return _from_peers(mesh, None if newest < 0 else self._read(newest))
        rows = mesh.gather(self.mirror.steps({"round": identity, "cut": _cut(mesh)}))
        common = set(rows[0]).intersection(*rows[1:])
        step = int(max(common, default=-1))
        if step < 0:
            return None
        return self._read(step)

    def _read(self, step: int) -> Carried:
        tensors, about = self.mirror.read(step)
        return Carried(about, tensors)


def _is(carried: Carried | None, identity: str) -> bool:
    return carried is not None and carried.about["round"] == identity


def _cut(mesh: Mesh) -> str:
    return "" if mesh.device is None else mesh.layout.model_dump_json()


def _from_peers(mesh: Mesh, mine: Carried | None) -> Carried | None:
    """Return the state of the rank that is furthest, at all ranks: each has the whole."""
    steps = [row[0] for row in mesh.gather([-1 if mine is None else int(mine.about["step"])])]
    best = max(steps)
    if best < 0 or min(steps) == best:
        return mine
    source = steps.index(best)
    gives = mesh.rank == source
    assert mine is not None or not gives, "who is furthest has something"
    words, flat = b"", torch.empty(0, dtype=torch.uint8)
    if gives and mine is not None:
        words = canonical({"about": mine.about, "tensors": described(mine.tensors)})
        flat = torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in mine.tensors.values()])
    size = torch.tensor([len(words), flat.numel()])
    dist.broadcast(size, source)
    letters = torch.frombuffer(bytearray(words), dtype=torch.uint8) if gives else room("uint8", [int(size[0])])
    flat = flat if gives else room("uint8", [int(size[1])])
    dist.broadcast(letters, source)
    dist.broadcast(flat, source)
    said, at, tensors = json.loads(letters.numpy().tobytes()), 0, dict[str, torch.Tensor]()
    for name, kind, shape in said["tensors"]:
        tensor = room(kind, shape)
        end = at + tensor.numel() * tensor.element_size()
        tensor.view(-1).copy_(flat[at:end].clone().view(tensor.dtype))
        tensors[name], at = tensor, end
    return Carried(said["about"], tensors)
