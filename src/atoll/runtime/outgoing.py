"""What leaves a site of a train round: the update, encoded once where something is fed back, and sent from disk.

With feedback the encoded update and what it lost are on disk for good before the first byte leaves. From then on the
hub may count it, and then the next one is corrected by this very loss; `feedback` is pure, so that whatever dies
before is done again to the same bits. Without feedback nothing is kept but the update itself, encoded as it is sent.
"""

import zlib
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from atoll.boundary.channel import Source
from atoll.errors import TaskFailed
from atoll.outer.masks import Masks
from atoll.outer.ring import Ring
from atoll.outer.secret import concealed
from atoll.outer.wire import CHUNK, afterwards, encode, encoded_bytes, feedback, private
from atoll.runtime.disk import appearing, mapped
from atoll.runtime.frames import file_bytes, frames, payload_bytes, pieces
from atoll.runtime.kept import RunFolder
from atoll.runtime.mark import Kept
from atoll.spec.document import canonical, sha256
from atoll.spec.message import Assign
from atoll.spec.model import Signature, elements
from atoll.spec.wire import Transform


def encode_with_feedback(folder: RunFolder, a: Assign) -> int:
    """Write the update as it travels, corrected by what the newest counted one lost, and what it loses itself.

    Returns the CRC of what it loses. Memory: O(CHUNK). Raises `Corrupt` for a residual that is not what was kept, and
    `TaskFailed` where the corrected update is not finite.
    """
    update, (first, last), size = mapped(folder.update(a.position)), span(a), elements(a.signature)
    residual = folder.last_residual(a.counted, size)
    residual_crc = 0
    with (
        folder.new_memory(folder.wire(a.position), file_bytes(last - first, a.sync.wire)) as sent,
        folder.new_memory(folder.residual(a.position), 4 * size) as lost,
    ):
        # Of the other fragments what they lost last stays as it was, until it is their turn.
        residual_crc = _write(lost, residual[:first], residual_crc)
        for chunk, window in feedback(update, residual[first:last], afterwards(a.sync.wire)):
            for piece in pieces(chunk):
                sent.write(piece)
            residual_crc = _write(lost, window, residual_crc)
        return _write(lost, residual[last:], residual_crc)


def _write(file: BinaryIO, values: np.ndarray, crc: int) -> int:
    """Write float32 numbers as bytes, a chunk at a time; return the CRC of what was written before, and this."""
    for start in range(0, values.size, CHUNK):
        piece = np.ascontiguousarray(values[start : start + CHUNK])  # before anything was lost there is no memory of it
        file.write(piece.data)
        crc = zlib.crc32(piece.data, crc)
    return crc


def span(a: Assign) -> tuple[int, int]:
    """Return which elements of the model a train round exchanges, from and up to."""
    return a.sync.span(elements(a.signature), a.version)


def check_vector(path: Path, signature: Signature, what: str, part: tuple[int, int] | None = None) -> None:
    """Hold a vector that a worker wrote to the signature, or to a part of it: whole and finite, or `TaskFailed`."""
    first, last = part or (0, elements(signature))
    found = path.stat().st_size if path.is_file() else 0
    if found != 4 * (last - first):
        due = f"{found} bytes where the model has {4 * (last - first)}"
        raise TaskFailed(f"{what}: {due}; the task must leave files alone")
    vector = mapped(path)
    start = -first
    for spec in signature:
        values = vector[max(start, 0) : max(start + spec.size, 0)]
        finite = np.isfinite(values)
        if not finite.all():
            raise TaskFailed(
                f"{what}: tensor {spec.name} has {values[~finite][0]} among its values; "
                "lower the optimiser's rate or look at the data"
            )
        start += spec.size


def outgoing(path: Path, wire: tuple[Transform, ...]) -> Source:
    """Return the frames of an update as it was computed and seen to be finite, encoded as they are sent, from any
    element on."""
    # What goes before that element is encoded again and thrown away: clip needs it all in any case.
    return lambda at: dropwhile(lambda chunk: chunk.offset < at, encode(mapped(path), wire, finite=True))


def outgoing_kept(folder: RunFolder, a: Assign, kept: Kept) -> tuple[Source, int]:
    """Return the frames of a kept update from any element on, and their bytes of data and scales in all.

    Of what topk or zstd makes smaller only as it is sent, the bytes are a bound.
    """
    first, last = span(a)
    size = last - first
    if kept.residual_crc is None:
        return outgoing(folder.update(a.position), afterwards(a.sync.wire)), encoded_bytes(size, a.sync.wire)
    path = folder.wire(a.position)
    return partial(frames, path), payload_bytes(path, -(-size // CHUNK))


def privatise(folder: RunFolder, a: Assign) -> None:
    """Put clip and noise on an update where it lies: from here on nothing but this can leave, however often it is sent.

    Noise is never drawn twice for one update that leaves: their mean would have less of it.
    """
    path = folder.update(a.position)
    with appearing(path) as file:
        for window in private(mapped(path), a.sync.wire, a.sync.parts(len(a.together))):
            file.write(window.data)


def outgoing_masked(folder: RunFolder, a: Assign, ring: Ring, weight: float, masks: Masks) -> Source:
    """Return the frames of an update as a secure sum takes it: clipped, weighed and masked as they are sent."""
    clips = tuple(step for step in afterwards(a.sync.wire) if step.kind == "clip")
    path = folder.update(a.position)
    return lambda at: (
        concealed(chunk, ring, weight, masks)
        for chunk in encode(mapped(path), clips, finite=True)
        if chunk.offset >= at
    )


def content(name: int | str, *more: object) -> str:
    """Return the digest that names a stream by its file's CRC or token and whatever else its bytes follow from.

    It tells the hub whether an upload that broke off may go on: of one stage of one site, so a CRC tells enough.
    """
    return sha256(canonical([name, *more]))
