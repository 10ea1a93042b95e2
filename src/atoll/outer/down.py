"""The way down: weights given out as a change to those before, by `Sync.down`, to the same bits at hub and sites.

A change is of the elements that its round exchanged (`Sync.span`), in chunks whose offsets count from the first of
them. Without transforms it holds their new values. With transforms it holds the encoded step, and the weights after it
are by definition those before plus what the step decodes to: so whoever has those has these, and their digest tells.
"""

import numpy as np

from atoll.errors import Invalid, TaskFailed
from atoll.outer.wire import Chunk, decode, sent
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform


def in_changes(sync: Sync) -> bool:
    """Tell whether this sync's weights can be given out as a change, which is smaller than they are."""
    return bool(sync.down) or sync.fragments > 1


def take(
    down: tuple[Transform, ...], offset: int, arrays: tuple[np.ndarray, np.ndarray], residual: np.ndarray | None
) -> Chunk:
    """Make the step between windows of (weights, next weights) one that every site can take; return its chunk.

    float32 windows of one shape, at `offset` of the change; the next weights are written in place. Error feedback
    (Seide et al., 2014): the step is corrected by `residual`, what earlier steps lost on the way, and what this one
    loses is left there. None: nothing is fed back. Raises `TaskFailed` when a result is not finite.
    """
    weights, following = arrays
    if not down:
        return Chunk(offset, following.size, following.data.cast("B"))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and told below
        step = following - weights
        if residual is not None:
            step += residual
        chunk, arrived, lost = sent(offset, step, down)
        np.add(weights, arrived, out=following)
    if not np.isfinite(following).all():
        raise TaskFailed("weights: not finite after a step as it goes down; lower sync.outer.rate")
    if residual is not None:
        residual[:] = lost
    return chunk


def follow(weights: np.ndarray, chunk: Chunk, down: tuple[Transform, ...], size: int) -> np.ndarray:
    """Return the next weights of a window from those before and a chunk that another party sent.

    `size` is the receiver's own count of the change's elements, and `weights` its window at the chunk's offset. Raises
    `Invalid` for a chunk that is not of this place and encoding (`atoll.outer.wire.decode`), or numbers that are not
    finite.
    """
    arrived = decode(chunk, down, size)
    if not down:
        return arrived
    with np.errstate(over="ignore"):
        following = np.add(weights, arrived, out=arrived if arrived.flags.writeable else None)
    if not np.isfinite(following).all():
        raise Invalid(f"chunk at {chunk.offset}: weights are not finite after it; send the whole weights")
    return following
