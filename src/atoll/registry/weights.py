"""A model's flat float32 vector as a safetensors file, and back with every number of the file checked.

The tensors lie in the file in signature order and without gaps, so the file's data section is the vector itself and
equal weights are equal bytes: a file is `head` and then the vector, however it is cut. Reading also takes files that
others wrote, in any order. No pickle anywhere. https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from atoll.errors import Corrupt, Invalid
from atoll.spec.document import parse
from atoll.spec.model import Signature, TensorSpec, elements

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
_NAME_LIMIT = 1000


def save(vector: np.ndarray, signature: Signature) -> bytes:
    """Return the safetensors bytes of a float32 ``vector`` of shape ``(sum of sizes,)``; raise `Invalid`."""
    check(vector, signature)
    return head(signature) + vector.astype("<f4", copy=False).tobytes()


def check(vector: np.ndarray, signature: Signature) -> None:
    """Raise `Invalid` for a vector that the signature does not describe."""
    total = elements(signature)
    if vector.shape != (total,) or vector.dtype != np.float32:
        raise Invalid(
            f"weights: {vector.dtype} of shape {vector.shape} where the signature has {total} float32 numbers"
        )


def head(signature: Signature) -> bytes:
    """Return what comes before the vector in a file of this signature, in whole words of 8 bytes; raise `Invalid`."""
    return header((spec.name, "F32", spec.shape, 4 * spec.size) for spec in signature)


def header(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return what comes before tensors that follow each other in a file; each is (name, dtype, shape, bytes)."""
    table: dict[str, Any] = {}
    start = 0
    for name, dtype, shape, size in tensors:
        if name in table or name == "__metadata__":
            raise Invalid(f"weights: tensor name {name!r} is taken; a signature names each tensor once")
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load(
    data: bytes | memoryview, signature: Signature | None = None, limit: int = 16 << 30
) -> tuple[np.ndarray, Signature]:
    """Return the vector (read-only, shape ``(sum of sizes,)``) and its signature, in the order of the one given.

    Raises `Invalid` above ``limit`` bytes or when the tensors are not the given signature's, `Corrupt` when the
    bytes are not one whole safetensors file of float32 tensors.
    """
    if len(data) > limit:
        raise Invalid(
            f"weights: {len(data):,} bytes, more than the {limit:,} allowed; raise the limit or send a smaller model"
        )
    header, start = _header(data)
    header.pop("__metadata__", None)
    laid_out = sorted(((_spec(name, entry), _span(name, entry)) for name, entry in header.items()), key=_by_place)
    end = 0
    for spec, (begin, stop) in laid_out:
        if begin != end or stop - begin != 4 * spec.size:
            raise Corrupt(
                f"weights: tensor {spec.name!r} lies at {begin}..{stop} where {end}..{end + 4 * spec.size} is due"
            )
        end = stop
    if start + end != len(data):
        raise Corrupt(f"weights: {len(data) - start:,} bytes of numbers where the header promises {end:,}")
    vector = np.frombuffer(data, dtype="<f4", offset=start)
    vector.flags.writeable = False
    found = tuple(spec for spec, _ in laid_out)
    if signature is None or signature == found:
        return vector, found
    return _reordered(vector, found, signature), signature


def _by_place(item: tuple[TensorSpec, tuple[int, int]]) -> tuple[int, int]:
    return item[1]


def _header(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 2 <= length <= min(_HEADER_LIMIT, len(data) - 8):
        raise Corrupt(
            f"weights: {len(data):,} bytes that are not a safetensors file; its header would be {length:,} bytes long"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"weights: the safetensors header is not valid ({error})") from None
    if not isinstance(header, dict):
        raise Corrupt("weights: the safetensors header is not a table")
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands there twice")
    return table


def _spec(name: str, entry: Any) -> TensorSpec:
    if len(name) > _NAME_LIMIT or not name.isprintable():
        raise Corrupt(f"weights: tensor name {name[:80]!r} is not a printable name of at most {_NAME_LIMIT} characters")
    if not isinstance(entry, dict) or set(cast("dict[str, Any]", entry)) != {"dtype", "shape", "data_offsets"}:
        raise Corrupt(f"weights: tensor {name!r} is not described by dtype, shape and data_offsets")
    if entry["dtype"] != "F32":
        raise Invalid(
            f"weights: tensor {name!r} has dtype {str(entry['dtype'])[:20]!r}; only F32 is kept, convert it first"
        )
    shape = entry["shape"]
    if not (isinstance(shape, list) and all(type(extent) is int and extent >= 0 for extent in shape)):
        raise Corrupt(f"weights: tensor {name!r} has shape {str(shape)[:80]}, not a list of sizes")
    return parse(TensorSpec, {"name": name, "shape": shape}, f"weights: tensor {name[:80]!r}")


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    span = entry["data_offsets"]
    if not (isinstance(span, list) and len(span) == 2 and all(type(edge) is int and edge >= 0 for edge in span)):
        raise Corrupt(f"weights: tensor {name!r} has data_offsets {str(span)[:80]}, not two positions")
    return span[0], span[1]


def _reordered(vector: np.ndarray, found: Signature, wanted: Signature) -> np.ndarray:
    parts: dict[str, np.ndarray] = {}
    shapes = {spec.name: spec.shape for spec in found}
    start = 0
    for spec in found:
        parts[spec.name] = vector[start : start + spec.size]
        start += spec.size
    for spec in wanted:
        if shapes.get(spec.name) != spec.shape:
            there = list(shapes[spec.name]) if spec.name in shapes else "missing"
            raise Invalid(f"weights: tensor {spec.name!r} is {there} where {list(spec.shape)} is expected")
    if len(wanted) != len(found):
        raise Invalid(
            f"weights: {len(found)} tensors where {len(wanted)} are expected; these are another model's weights"
        )
    return np.concatenate([parts[spec.name] for spec in wanted])
