"""Where a round that lost its group is found again: at a rank that lives on, in the mirrors, or at last on a disk.

All ranks of the new group call this together, and look at the same states in the same order.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from atoll.errors import Corrupt
from atoll.inner.mesh import Mesh
from atoll.inner.mirror import Mirror
from atoll.inner.parts import Parts, packed, unpacked
from atoll.inner.saved import Saved, complete, read, saved
from atoll.spec.document import canonical

_LOOKED = 4  # steps on a disk that a rank tells others of
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Carried:
    """A round as ranks have it after a step: in JSON values which round and step it is, and parts of all tensors."""

    about: Mapping[str, Any]
    parts: Sequence[Parts]  # of one rank or of several


@dataclass(slots=True)
class Memory:
    """What a process has besides a disk: its place's mirror, and the round in which it lost its peers, if it did."""

    mirror: Mirror = field(default_factory=lambda: Mirror(()))
    carried: Carried | None = None
    again: bool = False  # whether the group met since the last round was done: what is mirrored is of this one
    leaving: Callable[[], bool] = lambda: False  # whether the group is to meet anew

    def states(self, mesh: Mesh, identify: Callable[[], str], folder: Path | None) -> Iterator[Carried | None]:
        """Yield the states that there are of a round, the newest of each kind first; None where this rank cannot read
        what the others perhaps can.

        ``identify`` gives the round's digest, for which its weights are read: it is asked only where something is kept.
        """
        if self.again:
            if mesh.device is None and any(row[0] for row in mesh.gather([self.carried is not None])):
                yield _from_peers(mesh, self.carried if _is(self.carried, identify()) else None)
            yield from self._mirrored(mesh, identify())
        if folder is not None:
            yield from _on_disk(mesh, identify, folder)

    def keep(self, mesh: Mesh, carried: Carried) -> int | None:
        """Mirror what a step has left; a rank of copies does so for all. Without room for it training goes on.

        Returns the number of the file that has it, None where there is none.
        """
        if mesh.device is None and mesh.rank:
            return None
        (parts,) = carried.parts
        try:
            return self.mirror.write({**carried.about, "cut": _cut(mesh), "part": part_at(mesh)}, parts)
        except OSError as error:
            log.warning("the round's state cannot be mirrored (%s); a lost rank costs the steps since", error.strerror)
            return None

    def _mirrored(self, mesh: Mesh, identity: str) -> Iterator[Carried | None]:
        told = {"round": identity, "cut": _cut(mesh)}
        mine = {int(one["step"]): one for one in self.mirror.about() if one.items() >= told.items()}
        if mesh.device is None:  # each holds the whole, and one of them has mirrored it
            newest = max(mine, default=-1)
            if any(row[0] >= 0 for row in mesh.gather([newest])):
                yield _from_peers(mesh, self._read(mine[newest]) if mine else None)
            return
        for step in _common(mesh, mine):
            yield self._read(mine[step])

    def _read(self, about: Mapping[str, Any]) -> Carried | None:
        return _unless_corrupt(lambda: Carried(about, [self.mirror.read(about)]))


def writes(mesh: Mesh) -> bool:
    """Tell whether this rank writes its part of a checkpoint: of those that have the same, one does."""
    return mesh.rank == 0 if mesh.device is None else not (mesh.place("data") or mesh.place("context"))


def part_at(mesh: Mesh) -> tuple[int, int]:
    """Return which part of a checkpoint is this rank's, of how many."""
    part, parts = 0, 1
    if mesh.device is None:
        return part, parts
    for axis in ("pipeline", "shard", "expert", "tensor"):
        degree = getattr(mesh.layout, axis)
        part, parts = part * degree + mesh.place(axis), parts * degree
    return part, parts


def _on_disk(mesh: Mesh, identify: Callable[[], str], folder: Path) -> Iterator[Carried | None]:
    found = {sets[0].named.step: sets for sets in reversed(complete(saved(folder)))}
    for step in _common(mesh, found):
        yield _unless_corrupt(lambda files=found[step]: _read_all(mesh, files, identify()))


def _read_all(mesh: Mesh, files: Sequence[Saved], identity: str) -> Carried | None:
    """Return what a step's files have of a round: this rank's own, or all of them when they are of another layout."""
    mine, found = part_at(mesh), list[Carried]()
    for one in sorted(files, key=lambda file: (file.named.part, file.named.parts) != mine):
        parts, about = read(one)
        if about.get("round") != identity:
            return None
        found.append(Carried(about, [parts]))
        if about.get("cut") == _cut(mesh) and (one.named.part, one.named.parts) == mine:
            break
    return Carried(found[0].about, [parts for one in found for parts in one.parts])


def _common(mesh: Mesh, steps: Mapping[int, object]) -> list[int]:
    """Return the steps that every rank has something of, the newest first."""
    newest = sorted(steps, reverse=True)[:_LOOKED]
    rows = mesh.gather([*newest, *[-1] * (_LOOKED - len(newest))])
    return sorted((int(step) for step in set(rows[0]).intersection(*rows[1:]) if step >= 0), reverse=True)


def _unless_corrupt(make: Callable[[], Carried | None]) -> Carried | None:
    try:
        return make()
    except Corrupt as error:  # only time is lost
        log.warning("%s", error)
        return None


def _is(carried: Carried | None, identity: str) -> bool:
    return carried is not None and carried.about["round"] == identity


def _cut(mesh: Mesh) -> str:
    """Return what two ranks have alike whose parts are cut alike; copies are whole, however many there are."""
    return canonical(mesh.layout.model_dump()).decode() if mesh.device is not None else ""


def _from_peers(mesh: Mesh, mine: Carried | None) -> Carried | None:
    """Return the state of the rank that is furthest, at every rank; each holds the whole of it."""
    rows = mesh.gather([mine.about["step"] if mine is not None else -1])
    steps = [int(row[0]) for row in rows]
    newest = max(steps)
    if newest < 0 or all(step == newest for step in steps):
        return mine
    source = steps.index(newest)
    gives = mesh.rank == source
    flat = torch.empty(0, dtype=torch.uint8)
    if gives and mine is not None:
        (parts,) = mine.parts
        flat = torch.cat([torch.frombuffer(piece, dtype=torch.uint8) for piece in packed(mine.about, parts)])
    size = torch.tensor([flat.numel()])
    dist.broadcast(size, source)
    flat = flat if gives else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(flat, source)
    parts, about = unpacked(flat.numpy().data, "peer")
    return Carried(about, [parts])
