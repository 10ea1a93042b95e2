"""How an update travels: cut into aligned chunks, clipped and quantised on the way out, checked on the way in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from atoll.errors import Invalid, TaskFailed
from atoll.spec.plan import Transform

CHUNK = 262_144  # elements: 1 MiB of float32, and a whole number of blocks
BLOCK = 1024  # elements that share one int8 scale

_FLOAT = np.dtype("<f4")
# Scales stay where float32 is normal and 127 steps are finite: then no division by zero, no infinity at the receiver.
_SMALLEST = np.float32(2.0**-126)
_LARGEST = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
_ROUNDING = 1 - 2.0**-22  # a clipped update stays within its bound after each element is rounded to float32

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Chunk:
    """One aligned piece of an encoded vector: `length` elements from element `offset`.

    `data` is float32 or int8, little-endian; `scales` is one float32 per block of int8 and else empty.
    """

    offset: int
    length: int
    data: Bytes
    scales: Bytes = b""


def encode(vector: np.ndarray, transforms: tuple[Transform, ...]) -> Iterator[Chunk]:
    """Return the chunks of a flat float32 vector with `transforms` applied, in offset order.

    clip scales the whole vector, by its L2 norm in float64, to a norm of at most `value`. int8 stores
    x as q = round-half-even(x / step), step = (largest magnitude of the block) / 127, so that each decoded element is
    within half a step of x (0.5001 steps with float32 rounding; below 2**-126 the step is 2**-126). int8 after clip
    may lift the norm over the bound by that error. Without transforms chunks are views: the vector must not change
    until they are sent.

    Raises `TaskFailed` when the update is not finite, before the first chunk; `Invalid` for a wrong vector or order.
    """
    names = tuple(transform.kind for transform in transforms)
    quantised = _quantised(names)
    if vector.ndim != 1 or vector.dtype != np.float32:
        raise Invalid(f"update: {vector.dtype} of shape {vector.shape}: must be a flat float32 vector; concatenate it")
    norm = _norm(vector)
    bounds = [transform.value for transform in transforms if transform.value is not None]
    factor = min(bounds) / norm * _ROUNDING if bounds and norm > min(bounds) else 1.0
    return _chunks(vector, factor, quantised)


def decode(chunk: Chunk, wire: tuple[str, ...], size: int) -> np.ndarray:
    """Return the float32 values of a chunk that another party sent, `size` being the receiver's own count.

    Everything is checked before anything is allocated: the place on the grid, exact byte lengths for the encoding,
    finite values. Without int8 the result is a read-only view of the chunk's bytes where these are read-only.
    Raises `Invalid` saying what is wrong.
    """
    offset, length = chunk.offset, chunk.length
    if not isinstance(offset, int) or offset % CHUNK or not 0 <= offset < size:
        raise Invalid(f"chunk.offset: {offset!r}: must be a multiple of {CHUNK} below {size}; send aligned chunks")
    if not isinstance(length, int) or length != min(CHUNK, size - offset):
        raise Invalid(
            f"chunk.length: {length!r}: must be {min(CHUNK, size - offset)} at offset {offset}; send it whole"
        )
    width = 1 if _quantised(wire) else 4
    blocks = -(-length // BLOCK) if width == 1 else 0
    _check_bytes("data", chunk.data, length * width)
    _check_bytes("scales", chunk.scales, blocks * 4)
    if width == 1:
        return _dequantise(np.frombuffer(chunk.data, np.int8), np.frombuffer(chunk.scales, _FLOAT), offset)
    values = np.frombuffer(chunk.data, _FLOAT)
    if not np.isfinite(values).all():
        raise Invalid(f"chunk.data: not finite somewhere in the {length} elements from {offset}; send finite values")
    return values


def encoded_bytes(size: int, wire: tuple[str, ...]) -> int:
    """Return the bytes of data and scales that a vector of `size` elements takes under these transforms."""
    return size + 4 * -(-size // BLOCK) if _quantised(wire) else 4 * size


def _quantised(wire: tuple[str, ...]) -> bool:
    for name in wire:
        if name not in ("clip", "int8"):
            raise Invalid(f"wire: {name!r}: there is no such transform; there is clip, int8")
    if "int8" in wire[:-1]:
        raise Invalid(f"wire: {', '.join(wire)}: nothing can follow int8; make it the last transform")
    return wire[-1:] == ("int8",)


def _norm(vector: np.ndarray) -> float:
    """L2 norm in float64, summed pairwise by window so that it never depends on the number of threads."""
    squares: list[float] = []
    for offset in range(0, vector.size, CHUNK):
        window = vector[offset : offset + CHUNK].astype(np.float64)
        # Squares of finite float32 cannot overflow float64, so the sum is finite exactly when the update is.
        squares.append(float(np.square(window, out=window).sum()))
        if not math.isfinite(squares[-1]):
            bad = offset + int(np.argmin(np.isfinite(vector[offset : offset + CHUNK])))
            raise TaskFailed(
                f"update: {vector[bad]} at element {bad}: the update is not finite; "
                "lower the learning rate or mend the loss"
            )
    return math.sqrt(math.fsum(squares))


def _chunks(vector: np.ndarray, factor: float, quantised: bool) -> Iterator[Chunk]:
    for offset in range(0, vector.size, CHUNK):
        window = np.ascontiguousarray(vector[offset : offset + CHUNK], _FLOAT)
        if factor != 1.0:
            window = np.multiply(window, factor, dtype=np.float64).astype(_FLOAT)
        if quantised:
            data, scales = _quantise(window)
            yield Chunk(offset, window.size, data.data.cast("B"), scales.data.cast("B"))
        else:
            yield Chunk(offset, window.size, window.data.cast("B"))


def _blocks(flat: np.ndarray) -> list[np.ndarray]:
    """Return 2-D views with one block a row: the whole blocks, then a shorter last one."""
    whole = flat.size - flat.size % BLOCK
    views = [flat[:whole].reshape(-1, BLOCK), flat[whole:].reshape(1, -1)]
    return [view for view in views if view.size]


def _quantise(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data = np.empty(window.size, np.int8)
    scales: list[np.ndarray] = []
    for source, target in zip(_blocks(window), _blocks(data), strict=True):
        top = np.maximum(source.max(axis=1), -source.min(axis=1))
        scale = np.clip(top / np.float32(127), _SMALLEST, _LARGEST)
        steps = source / scale[:, None]
        np.copyto(target, np.rint(steps, out=steps), casting="unsafe")
        scales.append(scale)
    return data, np.concatenate(scales).astype(_FLOAT, copy=False)


def _dequantise(steps: np.ndarray, scales: np.ndarray, offset: int) -> np.ndarray:
    if not bool(((scales >= 0) & (scales <= _LARGEST)).all()):  # NaN is in no range
        raise Invalid(f"chunk.scales: outside 0 to {_LARGEST:g} in the chunk at {offset}; send finite scales")
    if int(steps.min()) < -127:
        raise Invalid(f"chunk.data: -128 in the chunk at {offset}: int8 steps run from -127 to 127; encode it again")
    values = steps.astype(np.float32)
    row = 0
    for block in _blocks(values):
        block *= scales[row : row + len(block), None]
        row += len(block)
    return values


def _check_bytes(field: str, data: Bytes, expected: int) -> None:
    given = memoryview(data).nbytes
    if given != expected:
        raise Invalid(f"chunk.{field}: {given} bytes: must be {expected} for this encoding; send the chunk whole")
