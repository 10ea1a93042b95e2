"""How an update travels: cut into aligned chunks, made smaller on the way out, checked on the way in."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from atoll.errors import Invalid, TaskFailed
from atoll.noise import BEYOND, Noise
from atoll.outer import sparse, zstd
from atoll.outer.formats import FORMATS, MASKED, Bytes, Format
from atoll.spec.wire import Transform, clipped, disorder, noised

CHUNK = 262_144  # elements: 1 MiB of float32, and a whole number of blocks of every format

_PIECE = 1 << 15  # elements of the norm that are float64 at a time
_ROUNDING = 1 - 2.0**-22  # a clipped update stays within its bound after each element is rounded to float32


@dataclass(frozen=True, slots=True)
class Chunk:
    """One aligned piece of an encoded vector: `length` elements from element `offset`.

    `data` is what `encode` made of them: after topk the places that were kept (`atoll.outer.sparse`), then the numbers
    in their format, little-endian (`atoll.outer.formats`); all of it in one frame after zstd. `scales` are those of
    the format's blocks, and else empty.
    """

    offset: int
    length: int
    data: Bytes
    scales: Bytes = b""


@dataclass(frozen=True, slots=True)
class _Form:
    """What an ordered list of transforms comes to."""

    bound: float  # of the norm; infinity without clip
    share: float | None  # kept by topk
    format: Format
    level: int | None  # of zstd
    recalls_places: bool  # is what topk drops fed back, and
    recalls_rounding: bool  # what the format rounds off?

    @property
    def recalls(self) -> bool:
        return self.recalls_places or self.recalls_rounding

    def count(self, length: int) -> int:
        """Return how many numbers a chunk of `length` elements carries."""
        return length if self.share is None else sparse.kept(self.share, length)

    def data_bytes(self, length: int) -> tuple[int, int]:
        """Return the least and the most bytes of a chunk's data, before zstd."""
        count = self.count(length)
        numbers = self.format.data_bytes(count)
        places = (1, sparse.bit_bytes(length)) if self.share is not None else (0, 0)
        return numbers + places[0], numbers + places[1]

    def scale_bytes(self, length: int) -> int:
        return self.format.scale_bytes(self.count(length))

    def most_bytes(self, length: int) -> int:
        most = self.data_bytes(length)[1]
        return (most if self.level is None else zstd.most_bytes(most)) + self.scale_bytes(length)


def encode(vector: np.ndarray, transforms: tuple[Transform, ...], *, finite: bool = False) -> Iterator[Chunk]:
    """Return the chunks of a flat float32 vector with `transforms` applied, in offset order.

    clip scales the whole vector, by its L2 norm in float64, to a norm of at most `value`. topk drops, of each chunk,
    elements no larger than the smallest that it keeps, and is exact for those. The formats round each number within
    the bound that `atoll.outer.formats` states; after clip that may lift the norm over `value`. zstd is exact. Without
    a format chunks are views where they can be: the vector must not change until they are sent. ``finite``: the caller
    has looked through all of it already.

    Raises `TaskFailed` when the update is not finite, before the first chunk; `Invalid` for a wrong vector or order.
    """
    form = _form(transforms)
    _check_flat("update", vector)
    plain = finite and form.bound == math.inf
    windows = _corrected(vector, None) if plain else _clipped(vector, None, form.bound)
    return (_cut(offset, window, form).chunk for offset, window in windows)


def private(vector: np.ndarray, transforms: tuple[Transform, ...], parts: int = 1) -> Iterator[np.ndarray]:
    """Return the windows of a flat float32 vector, clipped and with noise, in offset order; not twice the same.

    The noise has the standard deviation that the transforms ask for over the root of ``parts``, so that of so many
    sites' vectors the sum has all of it. A number that noise takes far out stays within `reach`. What is encoded of
    them later tells no more of the vector than they do.
    """
    form, multiple = _form(transforms), noised(transforms)
    _check_flat("update", vector)
    bound = reach(transforms, parts) * _ROUNDING
    noise = Noise(multiple * form.bound / math.sqrt(parts))
    windows = _clipped(vector, None, form.bound)
    return (np.clip(window + noise.take(window.size), -bound, bound).astype("<f4") for _, window in windows)


def reach(transforms: tuple[Transform, ...], parts: int = 1) -> float:
    """Return within which bound each number of a clipped vector is, also with such a part of the noise on it."""
    return clipped(transforms) * (1 + BEYOND * noised(transforms) / math.sqrt(parts))


def afterwards(transforms: tuple[Transform, ...]) -> tuple[Transform, ...]:
    """Return what is left to do to a vector that was made `private`; all of it where there is no noise."""
    return tuple(step for step in transforms if not noised(transforms) or step.kind not in ("clip", "noise"))


def recalls(transforms: tuple[Transform, ...]) -> bool:
    """Tell whether a site must remember what these transforms lose, and encode with `feedback`."""
    return _form(transforms).recalls


def feedback(
    update: np.ndarray, residual: np.ndarray, transforms: tuple[Transform, ...]
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Return the chunks of update + residual, each with its window of the next residual, in offset order.

    Error feedback (Seide et al., 2014; Karimireddy et al., 2019): what an update loses on the wire is added to the
    next one, so that nothing is lost for good. `residual` is float32 of the update's shape, zeros at first. The next
    residual is `corrected - decode(encode(corrected))` for those transforms that have `feedback`, in float32.
    `corrected` is the sum after clip: clip bounds what leaves, and what it cuts off is not fed back.

    A pure function of its arguments: to encode the same update again gives the same bytes and the same residual.
    Memory beyond the vectors: O(CHUNK). Raises as `encode` does, but without clip looks at a window only when its turn
    comes: a second pass over two vectors costs as much as the format.
    """
    form = _form(transforms)
    _check_flat("update", update)
    _check_flat("residual", residual)
    if residual.shape != update.shape:
        raise Invalid(f"residual: {residual.size} elements, the update has {update.size}; begin again with zeros")
    if form.bound == math.inf:
        windows = ((offset, _finite(offset, window)) for offset, window in _corrected(update, residual))
    else:
        windows = _clipped(update, residual, form.bound)
    cuts = (_cut(offset, window, form) for offset, window in windows)
    return ((cut.chunk, cut.lost(cut.arrived(), form)) for cut in cuts)


def sent(offset: int, window: np.ndarray, transforms: tuple[Transform, ...]) -> tuple[Chunk, np.ndarray, np.ndarray]:
    """Return the chunk of one window at `offset`, what `decode` makes of it, and what is lost of it and fed back.

    For who needs at once what every receiver will have. The window is contiguous float32 of at most CHUNK; there is no
    clip, which is of the whole vector. Both arrays are float32 of its shape, and its own may be either of them.
    Raises `TaskFailed` when it is not finite.
    """
    form = _form(transforms)
    assert form.bound == math.inf, "clip is of a whole vector"
    cut = _cut(offset, _finite(offset, window), form)
    arrived = cut.arrived()
    return cut.chunk, cut.spread(arrived), cut.lost(arrived, form)


def decode(chunk: Chunk, transforms: tuple[Transform, ...], size: int) -> np.ndarray:
    """Return the float32 values of a chunk that another party sent, `size` being the receiver's own count.

    Everything is checked before anything is allocated: the place on the grid, byte lengths for the encoding, finite
    values; zstd unpacks to no more than these lengths. Without a format the result is a read-only view of the chunk's
    bytes where these are read-only. Raises `Invalid` saying what is wrong.
    """
    form = _form(transforms)
    offset, length = chunk.offset, chunk.length
    if not isinstance(offset, int) or offset % CHUNK or not 0 <= offset < size:
        raise Invalid(f"chunk.offset: {offset!r}: must be a multiple of {CHUNK} below {size}; send aligned chunks")
    if not isinstance(length, int) or length != min(CHUNK, size - offset):
        raise Invalid(
            f"chunk.length: {length!r}: must be {min(CHUNK, size - offset)} at offset {offset}; send it whole"
        )
    least, most = form.data_bytes(length)
    if form.level is None:
        _check_bytes("data", chunk.data, least, most)
    else:
        _check_bytes("data", chunk.data, 1, zstd.most_bytes(most))
    _check_bytes("scales", chunk.scales, form.scale_bytes(length), form.scale_bytes(length))
    try:
        return _decoded(chunk, form, least, most)
    except Invalid as error:
        raise Invalid(f"chunk at {offset}: {error}") from None


def encoded_bytes(size: int, transforms: tuple[Transform, ...]) -> int:
    """Return the bytes of data and scales that a vector of `size` elements takes; with topk or zstd, at most."""
    form = _form(transforms)
    whole, rest = divmod(size, CHUNK)
    return whole * form.most_bytes(CHUNK) + (form.most_bytes(rest) if rest else 0)


def _form(transforms: tuple[Transform, ...]) -> _Form:
    if words := disorder(transforms):
        raise Invalid(f"wire: {words}")
    by_kind = {step.kind: step for step in transforms}
    topk, packed = by_kind.get("topk"), by_kind.get("zstd")
    name = next((kind for kind in by_kind if kind in FORMATS), "float32")
    return _Form(
        bound=clipped(transforms) or math.inf,
        share=topk.share if topk else None,
        format=MASKED if "mask" in by_kind else FORMATS[name],
        level=(packed.level or zstd.LEVEL) if packed else None,
        recalls_places=topk is not None and topk.feedback,
        recalls_rounding=name in by_kind and by_kind[name].feedback,
    )


# --- the way out --------------------------------------------------------------------------------------------------


def _clipped(vector: np.ndarray, residual: np.ndarray | None, bound: float) -> Iterator[tuple[int, np.ndarray]]:
    """Look the whole vector through now, and return its (offset, window)s, corrected by `residual` and within `bound`.

    It is looked through twice rather than copied: a window is corrected again, to the same bits.
    """

    norm = _norm(_corrected(vector, residual), bound != math.inf)
    factor = bound / norm * _ROUNDING if norm > bound else 1.0

    def scaled(window: np.ndarray) -> np.ndarray:
        return window if factor == 1.0 else np.multiply(window, factor, dtype=np.float64).astype("<f4")

    return ((offset, scaled(window)) for offset, window in _corrected(vector, residual))


def _corrected(vector: np.ndarray, residual: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    for offset in range(0, vector.size, CHUNK):
        window = np.ascontiguousarray(vector[offset : offset + CHUNK], "<f4")
        if residual is not None:
            with np.errstate(over="ignore"):  # whoever looks at it finds what is not finite, and tells
                window = window + residual[offset : offset + CHUNK]
        yield offset, window


def _finite(offset: int, window: np.ndarray) -> np.ndarray:
    finite = np.isfinite(window)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise TaskFailed(
            f"update: {window[bad]} at element {offset + bad}: the update is not finite; "
            "lower the learning rate or mend the loss"
        )
    return window


def _norm(windows: Iterator[tuple[int, np.ndarray]], wanted: bool) -> float:
    """Return the L2 norm in float64, or 0.0 where it is not `wanted`; raise `TaskFailed` for what is not finite.

    It is summed pairwise by piece, so that it never depends on the number of threads.
    """
    squares: list[float] = []
    scratch = np.empty(_PIECE)
    for offset, window in windows:
        _finite(offset, window)
        for start in range(0, window.size if wanted else 0, _PIECE):
            piece = window[start : start + _PIECE]
            wide = scratch[: piece.size]
            np.copyto(wide, piece)
            squares.append(float(np.square(wide, out=wide).sum()))  # of finite float32: no overflow
    return math.sqrt(math.fsum(squares))


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """A window as it is sent: its chunk, and the numbers of it that were picked and packed."""

    chunk: Chunk
    window: np.ndarray
    places: np.ndarray | None  # of what was picked; None: all of it
    picked: np.ndarray
    unpack: Callable[[], np.ndarray]

    def arrived(self) -> np.ndarray:
        """Return the numbers picked as the receiver reads them."""
        return self.unpack()

    def spread(self, arrived: np.ndarray) -> np.ndarray:
        """Return the whole window as the receiver reads it."""
        if self.places is None:
            return arrived
        whole = np.zeros_like(self.window)
        whole[self.places] = arrived
        return whole

    def lost(self, arrived: np.ndarray, form: _Form) -> np.ndarray:
        """Return what the receiver does not have of the window, as far as it is to be recalled."""
        rounding = self.picked - arrived if form.recalls_rounding else np.zeros_like(self.picked)
        if self.places is None:
            return rounding
        rest = self.window.copy() if form.recalls_places else np.zeros_like(self.window)
        rest[self.places] = rounding
        return rest


def _cut(offset: int, window: np.ndarray, form: _Form) -> _Cut:
    places = None if form.share is None else sparse.largest(window, form.count(window.size))
    picked = window if places is None else window[places]
    numbers, scales = form.format.pack(picked)
    data = numbers.view(np.uint8)
    if form.level is not None:
        data = zstd.grouped(data, form.format.width)
    if places is not None:
        data = np.concatenate([sparse.pack(places, window.size), data])
    packed = _bytes(data) if form.level is None else zstd.pack(data, form.level)
    chunk = Chunk(offset, window.size, packed, _bytes(scales))
    return _Cut(chunk, window, places, picked, lambda: form.format.unpack(_bytes(numbers), _bytes(scales), picked.size))


def _bytes(array: np.ndarray) -> memoryview:
    return array.data.cast("B")


# --- the way in ---------------------------------------------------------------------------------------------------


def _decoded(chunk: Chunk, form: _Form, least: int, most: int) -> np.ndarray:
    length, count = chunk.length, form.count(chunk.length)
    data = memoryview(chunk.data) if form.level is None else zstd.unpack(chunk.data, least, most)
    split = len(data) - form.format.data_bytes(count)
    numbers: Bytes = data[split:]
    if form.level is not None:
        numbers = _bytes(zstd.ungrouped(np.frombuffer(numbers, np.uint8), form.format.width))
    values = form.format.unpack(numbers, chunk.scales, count)
    if form.share is None:
        return values
    window = np.zeros(length, np.float32)
    window[sparse.unpack(data[:split], count, length)] = values
    return window


def _check_bytes(field: str, data: Bytes, least: int, most: int) -> None:
    given = memoryview(data).nbytes
    if not least <= given <= most:
        due = f"{most}" if least == most else f"{least} to {most}"
        raise Invalid(f"chunk.{field}: {given} bytes: must be {due} for this encoding; send the chunk whole")


def _check_flat(name: str, vector: np.ndarray) -> None:
    if vector.ndim != 1 or vector.dtype != np.float32:
        raise Invalid(f"{name}: {vector.dtype} of shape {vector.shape}: must be a flat float32 vector; concatenate it")
