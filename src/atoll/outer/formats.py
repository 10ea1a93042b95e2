"""How float32 numbers are written on the wire: as they are, in bfloat16, or in int8 or int4 steps per block."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from atoll.errors import Invalid
from atoll.outer.room import PIECE, room

Bytes = bytes | bytearray | memoryview
Packed = tuple[np.ndarray, np.ndarray]  # data and scales; both are contiguous, and go on the wire as bytes

INT8_BLOCK = 1024  # elements that share one float32 scale
INT4_BLOCK = 64  # elements that share one bfloat16 scale

_FLOAT, _WORD, _HALF = np.dtype("<f4"), np.dtype("<u4"), np.dtype("<u2")
# Scales stay where float32 is normal and all steps are finite: then no division by zero, no infinity at the receiver.
_SMALLEST = np.float32(2.0**-126)
_LARGEST_INT8 = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
_LARGEST_INT4 = np.float32(146 * 2.0**118)  # the largest bfloat16 of which 7 are finite in float32
# int4 by the byte that two lie in, each as itself + 8: one look-up gives both numbers.
_PAIRS = np.stack([np.arange(256) % 16 - 8.0, np.arange(256) // 16 - 8.0], axis=1).astype(np.float32)
_PAIRS_AS_ONE = _PAIRS.view(np.uint64).ravel()


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write numbers: `unpack(*pack(x), len(x))` is x within the error that `pack` states.

    `pack` takes contiguous, finite float32. `unpack` takes bytes of the sizes that `data_bytes` and `scale_bytes`
    give for that count, from another party, and raises `Invalid` for what `pack` cannot have made.
    """

    width: int  # bytes of an element, or 1 where elements are no larger
    data_bytes: Callable[[int], int]
    scale_bytes: Callable[[int], int]
    pack: Callable[[np.ndarray], Packed]
    unpack: Callable[[Bytes, Bytes, int], np.ndarray]


def _pack_float32(values: np.ndarray) -> Packed:
    """Exact, and a view: the values must not change until they are sent."""
    return values, _NO_SCALES


def _unpack_float32(data: Bytes, scales: Bytes, count: int) -> np.ndarray:
    values = np.frombuffer(data, _FLOAT)
    if not np.isfinite(values).all():
        raise Invalid("data: not finite somewhere; send finite values")
    return values


def _pack_masked(values: np.ndarray) -> Packed:
    raise AssertionError("a mask is not a function of the numbers; see atoll.outer.secret")


def _unpack_masked(data: Bytes, scales: Bytes, count: int) -> np.ndarray:
    """Return the words themselves, as float32 by name alone: any 32 bits may be one."""
    return np.frombuffer(data, _FLOAT)


def _pack_bfloat16(values: np.ndarray) -> Packed:
    """Round to the nearest of 8 significant bits, ties to even: |error| <= max(|x| * 2**-8, 2**-134).

    What would round to infinity becomes the largest finite number, which is within the same bound.
    """
    packed = np.empty(values.size, _HALF)
    for start in range(0, values.size, PIECE):
        bits = values[start : start + PIECE].view(_WORD)
        carry = bits >> 16
        carry &= 1
        carry += 0x7FFF
        carry += bits
        carry >>= 16
        place = packed[start : start + PIECE]
        np.copyto(place, carry, casting="unsafe")
        place -= (place & 0x7FFF) == 0x7F80
    return packed, _NO_SCALES


def _unpack_bfloat16(data: Bytes, scales: Bytes, count: int) -> np.ndarray:
    packed = np.frombuffer(data, _HALF)
    if ((packed & 0x7F80) == 0x7F80).any():
        raise Invalid("data: not finite somewhere; send finite values")
    return _widened(packed)


def _widened(packed: np.ndarray) -> np.ndarray:
    words = packed.astype(_WORD)
    words <<= 16
    return words.view(_FLOAT)


def _pack_int8(values: np.ndarray) -> Packed:
    """q = round-half-even(x / step), step = (largest magnitude of the block) / 127 and at least 2**-126.

    |error| <= 0.5001 steps, of which 0.0001 is float32 rounding; zeros stay zeros.
    """
    steps, scales = np.empty(values.size, np.int8), np.empty(-(-values.size // INT8_BLOCK), _FLOAT)
    for place, rows in _blocks(values.size, INT8_BLOCK):
        source, scratch, top = _magnitudes(values[place], INT8_BLOCK)
        scale = np.clip(top / np.float32(127), _SMALLEST, _LARGEST_INT8, out=scales[rows])
        _to_steps(source, scale, scratch, steps[place])
    return steps, scales


def _unpack_int8(data: Bytes, scales: Bytes, count: int) -> np.ndarray:
    steps, scale = np.frombuffer(data, np.int8), np.frombuffer(scales, _FLOAT)
    _check_scales(scale, _LARGEST_INT8)
    if count and int(steps.min()) < -127:
        raise Invalid("data: -128 somewhere: int8 steps run from -127 to 127; encode it again")
    values = steps.astype(np.float32)
    _times(values, scale, INT8_BLOCK)
    return values


def _pack_int4(values: np.ndarray) -> Packed:
    """q = round-half-even(x / step), step = (largest magnitude of the block) / 7 in bfloat16, rounded up.

    |error| <= 0.51 steps, and a step is at most 2**-7 wider than the seventh of the magnitude; at least 2**-126. Two
    elements lie in a byte, the first in the low half, each as q + 8; half a byte left over holds 8.
    """
    steps, scales = np.zeros(values.size + values.size % 2, np.int8), np.empty(-(-values.size // INT4_BLOCK), _HALF)
    for place, rows in _blocks(values.size, INT4_BLOCK):
        source, scratch, top = _magnitudes(values[place], INT4_BLOCK)
        bits = (top / np.float32(7)).view(_WORD) + np.uint32(0xFFFF)  # up: then no number is more than 7 steps
        scale = np.clip(_widened((bits >> 16).astype(_HALF)), _SMALLEST, _LARGEST_INT4)
        scales[rows] = scale.view(_WORD) >> 16
        _to_steps(source, scale, scratch, steps[place])
    steps += 8
    pairs = steps.view(_HALF)
    return (pairs | pairs >> 4).astype(np.uint8), scales


def _unpack_int4(data: Bytes, scales: Bytes, count: int) -> np.ndarray:
    packed, scale = np.frombuffer(data, np.uint8), _widened(np.frombuffer(scales, _HALF))
    _check_scales(scale, _LARGEST_INT4)
    if count and (int(packed.min()) < 16 or int((packed & 15).min()) < 1):
        raise Invalid("data: a half byte of 0 somewhere: int4 steps run from -7 to 7, as 1 to 15; encode it again")
    if count % 2 and packed[-1] >> 4 != 8:
        raise Invalid("data: the half byte left over must hold 8; encode it again")
    values = _PAIRS_AS_ONE.take(packed).view(np.float32)[:count]
    _times(values, scale, INT4_BLOCK)
    return values


def _blocks(size: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Yield (elements, blocks) of pieces that are whole blocks, and of a shorter last block. All fit a thread's room,
    so that what is between two passes stays in cache."""
    whole = size - size % block
    for start in range(0, whole, PIECE):
        stop = min(start + PIECE, whole)
        yield slice(start, stop), slice(start // block, stop // block)
    if whole < size:
        yield slice(whole, size), slice(whole // block, whole // block + 1)


def _magnitudes(piece: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the piece with one block a row, room for work of the same shape, and each row's largest magnitude."""
    source = piece.reshape(-1, min(block, piece.size))
    scratch = np.abs(source, out=room.first.view(_FLOAT)[: piece.size].reshape(source.shape))
    return source, scratch, scratch.max(axis=1)


def _to_steps(source: np.ndarray, scale: np.ndarray, scratch: np.ndarray, steps: np.ndarray) -> None:
    np.divide(source, scale[:, None], out=scratch)
    np.rint(scratch, out=scratch)
    np.copyto(steps.reshape(source.shape), scratch, casting="unsafe")


def _times(values: np.ndarray, scale: np.ndarray, block: int) -> None:
    """Multiply each block by its scale, in place."""
    for place, rows in _blocks(values.size, block):
        part = values[place].reshape(-1, min(block, values[place].size))
        part *= scale[rows, None]


def _check_scales(scale: np.ndarray, largest: np.float32) -> None:
    if not bool(((scale >= 0) & (scale <= largest)).all()):  # NaN is in no range
        raise Invalid(f"scales: outside 0 to {largest:g} somewhere; send finite scales")


def _no_bytes(count: int) -> int:
    return 0


_NO_SCALES = np.empty(0, np.uint8)

FORMATS: dict[str, Format] = {
    "float32": Format(4, lambda n: 4 * n, _no_bytes, _pack_float32, _unpack_float32),
    "bfloat16": Format(2, lambda n: 2 * n, _no_bytes, _pack_bfloat16, _unpack_bfloat16),
    "int8": Format(1, lambda n: n, lambda n: 4 * -(-n // INT8_BLOCK), _pack_int8, _unpack_int8),
    "int4": Format(1, lambda n: -(-n // 2), lambda n: 2 * -(-n // INT4_BLOCK), _pack_int4, _unpack_int4),
}
MASKED = Format(4, lambda n: 4 * n, _no_bytes, _pack_masked, _unpack_masked)
