"""A rank's parts of tensors as bytes, each with where it lies in its whole: ranks of any layout find theirs among them.

The bytes are those of a safetensors file, so that anybody's tools read them. No pickle, and nothing is copied to look.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atoll.errors import Corrupt, TaskFailed
from atoll.inner.whole import here, lying
from atoll.spec.document import canonical

_ENTRY = "atoll"  # of the file's metadata
_LENGTH = 8  # bytes of the number of bytes in which the tensors are told
_ALIGNED = 4096  # a page, within which what is told may grow or shrink while the tensors stay where they are
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_TYPES = {name: kind for kind, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor: its own memory, where in the whole it begins, and the whole's shape."""

    value: torch.Tensor
    begins: tuple[int, ...]
    whole: tuple[int, ...]


Parts = Mapping[str, Part]
Places = dict[str, slice]  # of bytes in a file


def part_of(tensor: torch.Tensor, as_before: Part | None = None) -> Part:
    """Return what lies of a tensor at this rank, which takes long to find out: ``as_before`` where that is known."""
    if as_before is not None:
        return Part(here(tensor.detach()), as_before.begins, as_before.whole)
    value, where = lying(tensor)
    return Part(value, tuple(each.start for each in where), tuple(tensor.shape))


def packed(about: Mapping[str, Any], parts: Parts) -> list[memoryview]:
    """Return the bytes, in pieces: what is told of the tensors, with its length before it, and then each part's own
    memory. ``about`` is JSON values that go with them. Raises `TaskFailed` as `told`."""
    where = {
        name: [list(part.begins), list(part.whole)]
        for name, part in parts.items()
        if part.whole != tuple(part.value.shape)
    }
    kinds = {name: (part.value.dtype, tuple(part.value.shape)) for name, part in parts.items()}
    head, places = told({"about": about, "where": where}, kinds)
    values = (parts[name].value.detach() for name in places)
    pieces = [value.contiguous().reshape(-1).view(torch.uint8).numpy().data for value in values if value.numel()]
    return [memoryview(bytearray(head)), *pieces]


def told(said: Mapping[str, Any], kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, Places]:
    """Return the bytes in which tensors of these types and shapes are told, with their length before them, and where
    each tensor's own bytes begin and end in the file, in their order. ``said`` is JSON values that go with them.

    Raises `TaskFailed` for a type that has no name there.
    """
    entries: dict[str, Any] = {}
    at = 0
    # Widest first, as the format has it: each number then lies at a multiple of its width.
    for name, (kind, shape) in sorted(kinds.items(), key=lambda each: -each[1][0].itemsize):
        if kind not in _NAMES:
            words = str(kind).removeprefix("torch.")
            raise TaskFailed(f"model: {name[:80]!r} is of type {words}, of which nothing can be kept; use another type")
        size = math.prod(shape) * kind.itemsize
        entries[name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    words = json.dumps({"__metadata__": {_ENTRY: canonical(said).decode()}, **entries}).encode()
    words += b" " * (-(_LENGTH + len(words)) % _ALIGNED)
    head = len(words).to_bytes(_LENGTH, "little") + words
    begins = {name: entry["data_offsets"] for name, entry in entries.items()}
    return head, {name: slice(len(head) + begin, len(head) + end) for name, (begin, end) in begins.items()}


def about_of(words: bytes, name: str) -> dict[str, Any]:
    """Return what goes with the tensors, from the bytes in which they are told. Raises `Corrupt`."""
    return _read(words, name)[1]["about"]


def unpacked(buffer: memoryview, name: str) -> tuple[dict[str, Part], dict[str, Any]]:
    """Return the parts, which lie in the ``buffer`` itself, and what goes with them.

    Raises `Corrupt`, with the ``name`` of where they are from, for bytes that are no such file.
    """
    size = int.from_bytes(buffer[:_LENGTH], "little")
    if not 0 < size <= len(buffer) - _LENGTH:
        raise Corrupt(f"{name}: it is not whole; what it kept must be computed anew")
    entries, said = _read(bytes(buffer[_LENGTH : _LENGTH + size]), name)
    found: dict[str, Part] = {}
    try:
        for tensor, entry in entries.items():
            begins, whole = said["where"].get(tensor, ([0] * len(entry["shape"]), entry["shape"]))
            value = _value(buffer, _LENGTH + size, entry)
            ends = [begin + size for begin, size in zip(begins, value.shape, strict=True)]
            if not all(begin >= 0 and end <= of for begin, end, of in zip(begins, ends, whole, strict=True)):
                raise ValueError("a part lies beyond its whole")
            found[tensor] = Part(value, tuple(begins), tuple(whole))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Corrupt(f"{name}: its tensors cannot be read ({error}); what it kept must be computed anew") from None
    return found, said["about"]


def _read(words: bytes, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        entries = json.loads(words)
        said = json.loads(entries.pop("__metadata__")[_ENTRY])
        if isinstance(said["about"], dict) and isinstance(said["where"], dict):
            return entries, said
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    raise Corrupt(f"{name}: what it says of its tensors cannot be read; what it kept must be computed anew")


def _value(buffer: memoryview, first: int, entry: Mapping[str, Any]) -> torch.Tensor:
    kind, shape, (begin, end) = _TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    count = math.prod(shape)
    if min([0, *shape]) < 0 or begin < 0 or end - begin != count * kind.itemsize:
        raise ValueError("shapes and places differ")
    if not count:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(buffer, dtype=kind, count=count, offset=first + begin).reshape(shape)


def moves(places: Parts, found: Sequence[Parts]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return what is to be copied where (to, from), so that each place has all of its part.

    Raises `Corrupt` when something of a place is nowhere, or was of another type or shape.
    """
    return [move for name, place in places.items() for move in _moves(name, place, found)]


def _moves(name: str, place: Part, found: Sequence[Parts]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    parts = [each[name] for each in found if name in each]
    there = {(part.begins, part.value.shape): part for part in parts}  # copies are there several times, and count once
    left = place.value.numel()
    for part in there.values():
        if part.whole != place.whole or part.value.dtype != place.value.dtype:
            break
        common = [
            (max(mine, theirs), min(mine + size, theirs + other))
            for mine, size, theirs, other in zip(
                place.begins, place.value.shape, part.begins, part.value.shape, strict=True
            )
        ]
        if all(first < last for first, last in common):
            left -= math.prod(last - first for first, last in common)
            yield _cut(place, common), _cut(part, common)
    if left:
        raise Corrupt(f"tensor {name[:80]!r}: what is kept is not this model's; the round begins anew")


def _cut(part: Part, common: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return what is between the ``common`` first and last places of the whole: the part's own memory."""
    where = tuple(slice(first - at, last - at) for (first, last), at in zip(common, part.begins, strict=True))
    return part.value[where]
