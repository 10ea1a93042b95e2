"""What comes in to a site for a run, code and weights: by digest, through the gate, verified before it is used."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from atoll.boundary.channel import FrameLike
from atoll.errors import Corrupt
from atoll.outer.wire import Chunk, decode
from atoll.registry.weights import head
from atoll.runtime.bundle import gathered, laid_out, write_bundle
from atoll.runtime.kept import RunFolder
from atoll.runtime.place import Place
from atoll.runtime.reports import Reports
from atoll.spec.document import parse_json, sha256
from atoll.spec.message import Assign, Parcel
from atoll.spec.model import Bundle

_BUNDLE_LIMIT = 8 << 20  # bytes of a code bundle


class Incoming:
    """One run's."""

    def __init__(self, place: Place, folder: RunFolder, reports: Reports) -> None:
        self._place, self._folder, self._reports = place, folder, reports

    def bundle(self, a: Assign) -> Path:
        """Return the folder of the job's code, fetched once for each digest and verified before it is written."""
        assert a.code is not None, "a stage with a worker comes with code"
        folder = self._place.home / "code" / a.code.removeprefix("sha256:")
        if laid_out(folder, a.code):
            return folder
        request = self._place.crossing(a, "code", out=False, size=a.code_bytes, digest=a.code)
        asked = Parcel(run=a.run, purpose="code", size=0, digest=a.code)
        parcel, frames = self._place.gate.fetch(asked, request)
        data = gathered(frames, min(parcel.size, _BUNDLE_LIMIT))
        if sha256(data) != a.code:
            raise Corrupt(f"code of run {a.run}: its digest is not {a.code[:19]}...; submit the job again")
        return write_bundle(parse_json(Bundle, data, "code"), folder)

    def weights(self, a: Assign) -> Path:
        """Return a file with the flat weights of the assignment, fetched when the last ones are others."""
        assert a.weights is not None, "a stage that uses a model comes with its weights"
        path = self._folder.weights(a.weights)
        if self._folder.has_weights(a.weights):
            return path
        self._reports.progress(a, "fetching weights")
        size = sum(spec.size for spec in a.signature)
        request = self._place.crossing(a, "model", out=False, size=size * 4, digest=a.weights)
        asked = Parcel(run=a.run, purpose="weights", size=size, digest=a.weights)
        _, frames = self._place.gate.fetch(asked, request)
        with self._folder.new_weights(a.weights) as file:
            self._write(file, frames, a)
        return path

    def _write(self, file: BinaryIO, frames: Iterator[FrameLike], a: Assign) -> None:
        """Write the frames of the weights as they come, hashed in the same pass: no second one, and no vector.

        Raises `Corrupt` for other numbers than the digest's, before anybody can take them for the weights.
        """
        size = sum(spec.size for spec in a.signature)
        hasher, filled = hashlib.sha256(head(a.signature)), 0
        other = Corrupt(f"weights of run {a.run}: what came is not {str(a.weights)[:19]}...; submit the job again")
        for frame in frames:
            decode(Chunk(frame.offset, frame.length, frame.data, frame.scales), (), size)  # place, length, finite
            if frame.offset != filled:
                raise other
            hasher.update(frame.data)
            file.write(frame.data)
            filled += frame.length
        if filled != size or "sha256:" + hasher.hexdigest() != a.weights:
            raise other
