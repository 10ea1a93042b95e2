"""What a site keeps of a run on its disk: the fence, the newest weights, updates not yet known to have arrived."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from atoll.errors import Invalid


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Kept:
    """What goes with a computed update: the weights it started from, and what the answer says of it."""

    weights: str
    update: str  # digest of the update's file
    examples: int
    loss: float | None
    seconds: float


class RunFolder:
    """One run's folder at a site. Positions are stages of the run; everything in here is the site's own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._fetched: str | None = None
        fence = path / "epoch"
        self._seen: tuple[int, int] = (int(fence.read_text()) if fence.exists() else 0, 0)

    def fence(self, epoch: int, position: int) -> None:
        """Refuse an assignment older than one already seen: it comes from a hub that has been replaced.

        The epoch outlives this process; within one epoch there is one hub, which never goes back.
        """
        if (epoch, position) < self._seen:
            seen = f"epoch {self._seen[0]}, stage {self._seen[1]}"
            raise Invalid(f"assignment of epoch {epoch}, stage {position} came after {seen}; it is out of date")
        if epoch > self._seen[0]:
            self._write("epoch", str(epoch))
        self._seen = (epoch, position)

    def weights(self, digest: str) -> Path:
        return self.path / f"weights-{digest.removeprefix('sha256:')}.f32"

    def has_weights(self, digest: str) -> bool:
        """Tell whether these were fetched, and so verified, by this very process; files of an earlier one are not."""
        return self._fetched == digest

    def put_weights(self, digest: str, vector: np.ndarray) -> None:
        """Store verified weights in place of the ones before."""
        path = self.weights(digest)
        part = path.with_suffix(".part")
        vector.tofile(part)
        os.replace(part, path)
        self._fetched = digest
        for old in self.path.glob("weights-*.f32"):
            if old != path:
                old.unlink()

    def update(self, position: int) -> Path:
        return self.path / f"update-{position}.f32"

    def state(self, position: int) -> Path:
        return self.path / f"state-{position}.safetensors"

    def last_state(self, position: int) -> Path | None:
        """Return the optimiser's state after the newest round before ``position``."""
        found = [(int(path.stem.split("-")[1]), path) for path in self.path.glob("state-*.safetensors")]
        earlier = [item for item in found if item[0] < position]
        return max(earlier)[1] if earlier else None

    def keep(self, position: int, kept: Kept) -> None:
        """Mark the update of this position as whole; it is written before its mark, which has its digest.

        Neither is flushed: after a loss of power the digest tells, and the round is trained again to the same bits.
        """
        (self.path / f"update-{position}.json").write_text(json.dumps(asdict(kept)))

    def kept(self, position: int) -> Kept | None:
        """Return the mark of an update that is here, whole, from an earlier try."""
        try:
            kept = Kept(**json.loads((self.path / f"update-{position}.json").read_text()))
            return kept if file_digest(self.update(position)) == kept.update else None
        except (OSError, ValueError, TypeError):
            return None

    def settle(self, position: int) -> None:
        """The hub has this update: drop what only earlier rounds needed. The last state stays to go on from."""
        for path in (*self.path.glob("update-*"), *self.path.glob("state-*.safetensors")):
            number = int(path.name.split("-")[1].split(".")[0])
            if number < position - 1 or (path.name.startswith("update") and number < position):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, text: str) -> None:
        part = self.path / f"{name}.part"
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / name)
