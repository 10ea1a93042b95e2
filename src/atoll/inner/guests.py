"""A rank's mirror in the memory of another node: what a place needs back is there though its own node is gone.

Ranks that hold parts, on several nodes, pass on what they have mirrored by their own group, each to one rank of another
node and all at the same step. There it lies in memory that outlives the rank, like a mirror.
"""

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from atoll.inner.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Which rank of another node keeps what this one mirrors, and for which one this one does; None where none does."""

    keeper: int | None = None
    guest: int | None = None


def whereabouts(mesh: Mesh, node: str) -> Whereabouts:
    """Find out, all ranks together, who is where; ``node`` names this one's."""
    nodes = [row[0] for row in mesh.gather([float(zlib.crc32(node.encode()))])]
    ranks, rank = mesh.ranks, mesh.rank
    # All by the same distance, so that each keeps for one at most: the one that leaves fewest on their own node.
    by = min(range(ranks), key=lambda by: (sum(nodes[at] == nodes[(at + by) % ranks] for at in range(ranks)), by))
    after, before = (rank + by) % ranks, (rank - by) % ranks
    return Whereabouts(after if nodes[after] != nodes[rank] else None, before if nodes[before] != nodes[rank] else None)


def exchanged(where: Whereabouts, mine: torch.Tensor) -> torch.Tensor | None:
    """Send bytes to this rank's keeper; return those of the rank that this one keeps for, if there is one."""
    theirs = torch.zeros(1, dtype=torch.int64)
    _exchange(where, torch.tensor([mine.numel()]), theirs)
    received = torch.empty(int(theirs), dtype=torch.uint8)
    _exchange(where, mine, received)
    return received if where.guest is not None else None


def _exchange(where: Whereabouts, sent: torch.Tensor, received: torch.Tensor) -> None:
    under_way = [dist.isend(sent, where.keeper)] if where.keeper is not None else []
    under_way += [dist.irecv(received, where.guest)] if where.guest is not None else []
    for one in under_way:
        assert one is not None, "both ranks are of this group"
        one.wait()


def handed(mesh: Mesh, mine: torch.Tensor, source: int, to: int) -> torch.Tensor:
    """Return the bytes of the rank ``source`` at the rank ``to``, and ``mine`` elsewhere."""
    if mesh.rank == source:
        dist.send(torch.tensor([mine.numel()]), to)
        dist.send(mine, to)
    elif mesh.rank == to:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, source)
        mine = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(mine, source)
    return mine
