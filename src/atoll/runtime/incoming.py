"""What comes in to a site for a run, code and weights: by digest, through the gate, verified before it is used."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from atoll.boundary.channel import Bytes, FrameLike
from atoll.errors import Corrupt, Denied, Invalid
from atoll.outer.down import follow, in_changes
from atoll.outer.wire import CHUNK, Chunk, decode, encoded_bytes
from atoll.registry.weights import head
from atoll.runtime.bundle import gathered, read_bundle, write_bundle
from atoll.runtime.disk import mapped
from atoll.runtime.kept import RunFolder
from atoll.runtime.place import Place
from atoll.runtime.reports import Reports
from atoll.spec.document import parse_json, sha256
from atoll.spec.message import Assign, Parcel
from atoll.spec.model import Bundle, elements

_BUNDLE_LIMIT = 8 << 20  # bytes of a code bundle
log = logging.getLogger(__name__)


class Incoming:
    """One run's."""

    def __init__(self, place: Place, folder: RunFolder, reports: Reports) -> None:
        self._place, self._folder, self._reports = place, folder, reports

    def bundle(self, a: Assign) -> Path:
        """Return the folder of the job's code, fetched once for each digest and verified before it is written."""
        assert a.code is not None, "a stage with a worker comes with code"
        folder = self._place.home / "code" / a.code.removeprefix("sha256:")
        found = read_bundle(folder, a.code)
        asked = Parcel(run=a.run, purpose="code", size=0, digest=a.code)
        request = self._place.crossing(a, "code", out=False, size=a.code_bytes, digest=a.code)
        if self._place.to_be_read(request):
            self._read(a, self._taken(a, self._place.gate.fetch_to_read(asked, request)) if found is None else found)
        if found is not None:
            self._place.allow_code(a)  # it came for another run, and its owner may have thought better of it
            return folder
        request = self._place.crossing(a, "code", out=False, size=a.code_bytes, digest=a.code)
        return write_bundle(self._taken(a, self._place.gate.fetch(asked, request)), folder)

    def _read(self, a: Assign, bundle: Bundle) -> None:
        """Keep code for the owner to read. Raises `Denied` where it may not run, whoever signed it, before it is."""
        assert a.task is not None, "code comes with the name of its task"
        self._place.reviews.meet(bundle)
        try:
            self._place.allow_code(a)
        except Denied as error:
            self._place.reviews.keep(bundle, f"{a.task.file}:{a.task.name}", a.job.name, a.user)
            mend = f"it is kept there to be read, and its owner lets it run by: atoll site approve {a.code}"
            raise Denied(f"{error}; {mend}") from None

    def _taken(self, a: Assign, come: tuple[Parcel, Iterator[FrameLike]]) -> Bundle:
        """Return code as it comes, verified."""
        parcel, frames = come
        data = gathered(frames, min(parcel.size, _BUNDLE_LIMIT))
        if sha256(data) != a.code:
            raise Corrupt(f"code of run {a.run}: its digest is not {str(a.code)[:19]}...; submit the job again")
        return parse_json(Bundle, data, "code")

    def weights(self, a: Assign) -> Path:
        """Return a file with the flat weights of the assignment, fetched when the last ones are others.

        Where the last ones are those of the version before, the hub may give only what has changed.
        """
        assert a.weights is not None, "a stage that uses a model comes with its weights"
        path, last = self._folder.weights(a.weights), self._folder.fetched
        if last == a.weights:
            return path
        self._reports.progress(a, "fetching weights")
        base = last if a.version and in_changes(a.sync) else None
        try:
            self._fetch(a, base)
        except (Corrupt, Invalid) as error:
            if base is None:
                raise
            log.warning("run %s: %s; fetching all of the weights", a.run, error)
            self._fetch(a, None)
        return path

    def _fetch(self, a: Assign, base: str | None) -> None:
        size, gate = elements(a.signature), self._place.gate
        asked = Parcel(run=a.run, purpose="weights", size=size, digest=a.weights, base=base)
        whole = self._place.crossing(a, "model", out=False, size=size * 4, digest=a.weights)
        if base is None:
            header, frames = gate.fetch(asked, whole)
        else:
            low, high = a.sync.span(size, a.version - 1)
            kinds, count = tuple(step.kind for step in a.sync.down), encoded_bytes(high - low, a.sync.down)
            change = self._place.crossing(a, "model", out=False, size=count, digest=a.weights, wire=kinds)
            header, frames = gate.fetch_change(asked, change, whole)
        pieces = _whole(a, frames) if header.base is None else self._followed(a, header.base, frames)
        with self._folder.new_weights(str(a.weights), 4 * size) as file:
            _write(file, pieces, a)

    def _followed(self, a: Assign, base: str, frames: Iterator[FrameLike]) -> Iterator[Bytes]:
        """Yield the weights piece by piece: those of ``base`` and, in what the round exchanged, what came of it.

        How that is encoded, and which elements it is of, the assignment says, not whoever sends it.
        """
        before = mapped(self._folder.weights(base))
        low, high = a.sync.span(before.size, a.version - 1)
        yield from _cut(before[:low])
        filled = low
        for frame in frames:
            if low + frame.offset != filled:
                raise _other(a)
            chunk = Chunk(frame.offset, frame.length, frame.data, frame.scales)
            yield follow(before[filled : min(filled + CHUNK, high)], chunk, a.sync.down, high - low).data.cast("B")
            filled += frame.length
        if filled != high:
            raise _other(a)
        yield from _cut(before[high:])


def _whole(a: Assign, frames: Iterator[FrameLike]) -> Iterator[Bytes]:
    size, filled = elements(a.signature), 0
    for frame in frames:
        if frame.offset != filled:
            raise _other(a)
        decode(Chunk(frame.offset, frame.length, frame.data, frame.scales), (), size)  # place, length, finite
        filled += frame.length
        yield frame.data


def _cut(vector: np.ndarray) -> Iterator[Bytes]:
    return (vector[start : start + CHUNK].data.cast("B") for start in range(0, vector.size, CHUNK))


def _write(file: BinaryIO, pieces: Iterator[Bytes], a: Assign) -> None:
    """Write weights as they come, hashed in the same pass: no second one, and no vector.

    Raises `Corrupt` for other numbers than the digest's, before anybody can take them for the weights.
    """
    hasher, filled = hashlib.sha256(head(a.signature)), 0
    for piece in pieces:
        hasher.update(piece)
        file.write(piece)
        filled += len(piece)
    if filled != 4 * elements(a.signature) or "sha256:" + hasher.hexdigest() != a.weights:
        raise _other(a)


def _other(a: Assign) -> Corrupt:
    return Corrupt(f"weights of run {a.run}: what came is not {str(a.weights)[:19]}...; submit the job again")
