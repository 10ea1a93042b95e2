"""Where a round that lost its group is found again: at a rank that lives on, in the mirrors, or at last on a disk.

All ranks of the new group call this together, and look at the same states in the same order.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from atoll.errors import Corrupt
from atoll.inner.guests import Whereabouts, exchanged, handed, whereabouts
from atoll.inner.mesh import Mesh
from atoll.inner.mirror import MIRRORS, Mirror
from atoll.inner.parts import Parts, packed, unpacked
from atoll.inner.saved import Saved, complete, read, saved
from atoll.spec.document import canonical

_KEPT = 2 * MIRRORS  # states that a rank has in memory: its own and another's
_LOOKED = 4  # steps on a disk that a rank tells others of
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Carried:
    """A round as ranks have it after a step: in JSON values which round and step it is, and parts of all tensors."""

    about: Mapping[str, Any]
    parts: Sequence[Parts]  # of one rank or of several


class Copy:
    """Mirrors a rank's parts, beside its next step if need be: what changes before they are copied is not kept."""

    def __init__(self, mirror: Mirror, about: Mapping[str, Any], parts: Parts, spent: float) -> None:
        """``spent`` is the seconds that it took already."""
        self._mirror, self._about, self._parts, self._spent = mirror, about, parts, spent
        self._versions = self._counted()
        self.bytes = sum(part.value.nbytes for part in parts.values())

    def make(self) -> int | None:
        """Copy them, and return the number of the file that has them; None without room: training goes on."""
        began = time.thread_time()
        file = None
        try:
            file = self._mirror.write(self._about, self._parts, self.same)
        except OSError as error:
            log.warning("the round's state cannot be mirrored (%s); a lost rank costs the steps since", error.strerror)
        finally:
            self._mirror.took(self._spent + time.thread_time() - began)
        return file

    def same(self) -> bool:
        """Tell whether all of them are still what they were."""
        return self._counted() == self._versions

    def _counted(self) -> list[int]:
        return [part.value._version for part in self._parts.values()]


@dataclass(slots=True)
class Memory:
    """What a process has besides a disk: its place's mirror, and the round in which it lost its peers, if it did."""

    mirror: Mirror = field(default_factory=lambda: Mirror(()))
    guest: Mirror = field(default_factory=lambda: Mirror(()))  # of a rank of another node
    node: str = ""  # names this one, where there may be several
    carried: Carried | None = None
    again: bool = False  # whether the group met since the last round was done: what is mirrored is of this one
    leaving: Callable[[], bool] = lambda: False  # whether the group is to meet anew
    _where: tuple[Mesh, Whereabouts] | None = None

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

    def keep(self, mesh: Mesh, made: Callable[[], Carried]) -> "Copy":
        """Return what mirrors the state that a step has left, of which ``made`` tells."""
        began = time.monotonic()
        self.mirror.begun()
        carried = made()
        (parts,) = carried.parts
        about = {**carried.about, "cut": _cut(mesh), "part": part_at(mesh)}
        if mesh.device is not None and self.node:
            self._pass_on(mesh, about, parts)
        return Copy(self.mirror, about, parts, time.monotonic() - began)

    def _pass_on(self, mesh: Mesh, about: Mapping[str, Any], parts: Parts) -> None:
        """Have a rank of another node keep what was mirrored, and keep another's: a node is lost with its memory."""
        if self._where is None or self._where[0] is not mesh:
            self._where = mesh, whereabouts(mesh, self.node)
        where = self._where[1]
        received = exchanged(where, _flat(about, parts) if where.keeper is not None else torch.empty(0))
        if received is not None:
            try:
                theirs, about = unpacked(received.numpy().data, "guest")
                self.guest.write(about, theirs)
            except OSError as error:
                log.warning("another node's state cannot be kept (%s); its loss costs the steps since", error.strerror)

    def _mirrored(self, mesh: Mesh, identity: str) -> Iterator[Carried | None]:
        told = {"round": identity, "cut": _cut(mesh)}
        kept = [(one, mirror) for mirror in (self.mirror, self.guest) for one in mirror.about()]
        mine = {(int(one["step"]), int(one["part"][0])): (one, m) for one, m in kept if one.items() >= told.items()}
        if mesh.device is None:  # each holds the whole, and one of them has mirrored it
            newest = max(mine, default=(-1, 0))
            if any(row[0] >= 0 for row in mesh.gather([newest[0]])):
                yield _from_peers(mesh, self._read(mine, newest))
            return
        there = _told(mesh, mine)
        parts = [int(row[0]) for row in mesh.gather([part_at(mesh)[0]])]
        for step in sorted({step for of in there for step, _ in of}, reverse=True):
            holders = [[rank for rank, of in enumerate(there) if (step, part) in of] for part in parts]
            if all(holders):
                yield self._gathered(mesh, mine, step, parts, holders)

    def _gathered(
        self, mesh: Mesh, mine: "_Kept", step: int, parts: Sequence[int], holders: Sequence[Sequence[int]]
    ) -> Carried | None:
        """Return this rank's part after a step, from its own memory or that of another rank that has it."""
        found = self._read(mine, (step, parts[mesh.rank]))
        for rank, holding in enumerate(holders):
            if rank in holding:
                continue
            lent = self._read(mine, (step, parts[rank])) if mesh.rank == holding[0] else None
            flat = _flat(lent.about, lent.parts[0]) if lent is not None else torch.empty(0, dtype=torch.uint8)
            flat = handed(mesh, flat, holding[0], rank)
            if mesh.rank == rank:
                found = _unless_corrupt(lambda flat=flat: _unpacked(flat))
        return found

    def _read(self, mine: "_Kept", which: tuple[int, int]) -> Carried | None:
        if which not in mine:
            return None
        about, mirror = mine[which]
        return _unless_corrupt(lambda: Carried(about, [mirror.read(about)]))


# Whose step and part it is -> what goes with it, and the mirror that has it.
_Kept = Mapping[tuple[int, int], tuple[Mapping[str, Any], Mirror]]


def _told(mesh: Mesh, mine: _Kept) -> list[set[tuple[int, int]]]:
    """Return of which steps each rank has which parts in its memory."""
    pairs = [*mine, *[(-1, -1)] * _KEPT][:_KEPT]
    rows = mesh.gather([number for pair in pairs for number in pair])
    return [
        {(int(step), int(part)) for step, part in zip(row[::2], row[1::2], strict=True) if step >= 0} for row in rows
    ]


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
    flat = _flat(mine.about, mine.parts[0]) if gives and mine is not None else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([flat.numel()])
    dist.broadcast(size, source)
    flat = flat if gives else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(flat, source)
    return mine if gives else _unpacked(flat)


def _flat(about: Mapping[str, Any], parts: Parts) -> torch.Tensor:
    return torch.cat([torch.frombuffer(piece, dtype=torch.uint8) for piece in packed(about, parts)])


def _unpacked(flat: torch.Tensor) -> Carried:
    parts, about = unpacked(flat.numpy().data, "peer")
    return Carried(about, [parts])
