"""What a site keeps of a run on its disk: the fence, the newest weights, updates not yet known to have arrived.

Files appear whole or not at all while the machine runs, so an update counts for as long as that. What must outlive a
loss of power is flushed, and its CRC-32 tells a torn one: it guards the site's own disk against accidents, and is no
digest to know anything by. It is looked at once in a process's life, and not for what this very process kept.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import TypeAdapter, ValidationError

from atoll.durable import sync_folder
from atoll.errors import Corrupt, Invalid
from atoll.runtime.disk import BOOT, appearing, file_crc, mapped
from atoll.runtime.mark import Kept
from atoll.runtime.spares import Spares
from atoll.spec.document import Name, canonical, sha256

WORK = "work"  # the folder in a run's, in which its workers write
_SPARES = 3  # files to be written over: weights, and with feedback an update and what it lost
FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME: TypeAdapter[str] = TypeAdapter(Name)


def kept_runs(folder: Path) -> tuple[str, ...]:
    """Return the runs that have a folder in ``folder``; whatever else lies there is not a run's."""
    try:
        return tuple(sorted(path.name for path in folder.iterdir() if _is_name(path.name) and _is_folder(path)))
    except FileNotFoundError:
        return ()


def _is_name(text: str) -> bool:
    try:
        return bool(_NAME.validate_python(text))
    except ValidationError:
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


class RunFolder:
    """One run's folder at a site. Positions are stages of the run; everything in here is the site's own.

    Nothing is touched before `open`, so that one can be made for a run while its disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fetched: str | None = None
        self._seen: tuple[int, int] | None = None
        self._durable = 0  # the epoch on disk
        self._spares = Spares(path)
        self._known: dict[Path, int] = {}  # CRC of files that this process wrote or looked through

    def open(self, epoch: int, position: int) -> None:
        """Make the folder ready for an assignment. Raises `Invalid` for one older than one already seen: it comes from
        a hub that has been replaced.

        The epoch is on disk before anything is done in it, so that it outlives this process; within one epoch there is
        one hub, which never goes back.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._seen is None:
            self._durable = self._epoch()
            self._seen = (self._durable, 0)
        if (epoch, position) < self._seen:
            seen = f"epoch {self._seen[0]}, stage {self._seen[1]}"
            raise Invalid(f"assignment of epoch {epoch}, stage {position} came after {seen}; it is out of date")
        self._seen = (epoch, position)
        if epoch > self._durable:
            self._write("epoch", str(epoch))
            self._durable = epoch

    def has_room(self, size: int) -> bool:
        """Tell whether the disk takes ``size`` bytes more now, also under a quota: by taking them for a moment.

        What was kept to be written over is given back before.
        """
        trial = self.path / "room.part"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._spares.keep(0)
            if shutil.disk_usage(self.path).free < size:
                return False  # without taking what others may need meanwhile
            with trial.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            return error.errno not in FULL  # a disk that cannot tell is not known to be full
        finally:
            trial.unlink(missing_ok=True)
        return True

    def weights(self, digest: str) -> Path:
        return self.path / f"weights-{digest.removeprefix('sha256:')}.f32"

    @property
    def fetched(self) -> str | None:
        """The digest of the weights that are here, fetched, and so verified, by this very process; files of an earlier
        one are not."""
        return self._fetched

    @contextmanager
    def new_weights(self, digest: str, size: int) -> Iterator[BinaryIO]:
        """Open a file for ``size`` bytes of weights; left without an error, and so verified, it takes the place of the
        ones before. Their file becomes that of the next ones but one."""
        path = self.weights(digest)
        with appearing(path, over=self._spares.take(size)) as file:
            yield file
        self._fetched = digest
        for old in self.path.glob("weights-*"):
            if old.suffix == ".part":  # of a process that was killed
                old.unlink()
            elif old != path and old.suffix != ".spare":
                self._spares.add(old)
        self._spares.keep(_SPARES)

    @contextmanager
    def new_memory(self, path: Path, size: int) -> Iterator[BinaryIO]:
        """Open a file of an update with feedback, of about ``size`` bytes, which outlives a loss of power: `wire` or
        `residual`. It is written over one that has had its time."""
        with appearing(path, durable=True, over=self._spares.take(size)) as file:
            yield file

    def inputs(self, weights: str, *paths: Path | None) -> str:
        """Return the digest of what a round begins from: weights by theirs, and files of earlier rounds that this
        process has found to be what their marks say."""
        return sha256(canonical([weights, *(self._known[path] if path is not None else None for path in paths)]))

    def update(self, position: int) -> Path:
        return self.path / f"update-{position}.f32"

    def wire(self, position: int) -> Path:
        """Return where an update with feedback lies as it is sent, in frames (`atoll.runtime.frames`)."""
        return self.path / f"update-{position}.wire"

    def state(self, position: int) -> Path:
        return self.path / f"state-{position}.safetensors"

    def checkpoint(self, position: int) -> Path:
        """Return the folder in which the workers keep what they have of a round under way, for others to go on from."""
        return self.work / f"round-{position}"

    @property
    def work(self) -> Path:
        """The only folder of this machine that a run's workers write to. Nothing in it is believed as it lies there."""
        return self.path / WORK

    def last_state(self, position: int) -> Path | None:
        """Return the optimiser's state after the newest marked round before ``position``.

        Raises `Corrupt` when it is not what was written then. To begin with an older state, or with none, would train
        on to other weights than those of an undisturbed run without anybody knowing; and the round that made it cannot
        be done again, for its weights are gone. A state without a mark is of a round whose update never left, and so
        of nothing that the run knows.
        """
        number, mark = self._newest(position)
        crc = mark.state_crc if mark is not None else None
        return self._after("the inner optimiser's state", number, self.state(number), crc)

    def local(self, position: int) -> Path:
        return self.path / f"local-{position}.safetensors"

    def last_local(self, position: int | None = None) -> Path | None:
        """Return the personal tensors after the newest marked round, before ``position`` where that is given.

        Raises `Corrupt` as `last_state` does: nobody else has them.
        """
        number, mark = self._newest(position)
        crc = mark.local_crc if mark is not None else None
        return self._after("what stays of the model", number, self.local(number), crc)

    def local_bytes(self, position: int) -> int:
        """Return how large the personal tensors before ``position`` are; 0 where there are none, or none any more."""
        path = self.local(self._newest(position)[0])
        return path.stat().st_size if path.is_file() else 0

    def _newest(self, position: int | None) -> tuple[int, Kept | None]:
        earlier: list[tuple[int, Kept | None]] = [(0, None)]
        earlier += [(number, mark) for number, mark in self._marks() if position is None or number < position]
        return max(earlier, key=lambda one: (one[0], one[1] is not None))

    def _after(self, what: str, number: int, path: Path, crc: int | None) -> Path | None:
        if crc is not None and not self._is_whole(path, crc):
            raise Corrupt(f"{what} after stage {number} is not what was kept; submit the job again")
        return path if crc is not None else None

    def residual(self, position: int) -> Path:
        return self.path / f"residual-{position}.f32"

    def last_residual(self, base: int | None, size: int) -> np.ndarray:
        """Return what the update of stage ``base``, the newest one that the hub merged, lost on the wire.

        float32 of ``size``; zeros when none was merged yet. Raises `Corrupt` when it is not what was written then: with
        zeros in its place that loss would be for good, and the weights others than those of an undisturbed run.
        """
        if base is None:
            return np.broadcast_to(np.float32(0), size)  # takes no memory
        mark, path = self._mark(base), self.residual(base)
        if mark is None or mark.residual_crc is None or not self._is_whole(path, mark.residual_crc):
            raise Corrupt(
                f"what the update of stage {base} lost on the wire is not what was kept, and the next one needs it; "
                "submit the job again"
            )
        return mapped(path)

    def control(self, position: int) -> Path:
        return self.path / f"control-{position}.safetensors"

    def last_control(self, base: int | None) -> Path | None:
        """Return the site's control variates after stage ``base``, the newest one that the hub merged with its update.

        None when none was merged yet. Raises `Corrupt` when it is not what was written then: the hub's are the mean of
        what it counted, and would not be any more.
        """
        if base is None:
            return None
        mark, path = self._mark(base), self.control(base)
        if mark is None or mark.control_crc is None or not self._is_whole(path, mark.control_crc):
            raise Corrupt(f"the control variates after stage {base} are not what was kept; submit the job again")
        return path

    def drop_uncounted(self, base: int | None, later: bool) -> None:
        """Drop residuals and control variates that nothing can begin from any more: all but those of ``base``, the
        newest stage merged.

        Those of a round that went on without this site are none of its past. ``later``: they are kept as long as they
        come after ``base``, for the hub may still merge them.
        """
        for _, number, path in self._files("residual", "control"):
            if number != base and not (later and number > (-1 if base is None else base)):
                self._drop(path)

    def begin(self, position: int) -> None:
        """Forget what an earlier try made of this round: it is trained anew."""
        for path in (self._mark_file(position), self.update(position), self.wire(position), self.residual(position)):
            self._drop(path)

    def private(self) -> int:
        """Return how many steps of the run's private mechanism what is kept can rest on."""
        return max((mark.private for _, mark in self._marks()), default=0)

    def keep(self, position: int, kept: Kept) -> None:
        """Mark the update of this position as whole; it is written before its mark.

        An update is not flushed: after a loss of power the round is trained again to the same bits. An optimiser's
        state is, and its mark, and what the update lost on the wire: once the hub has the update no other round can
        make them again.
        """
        lasting = [(self.state(position), kept.state_crc), (self.control(position), kept.control_crc)]
        lasting.append((self.local(position), kept.local_crc))
        for path, crc in lasting:
            if crc is not None:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                self._known[path] = crc
        if kept.residual_crc is not None:  # whoever wrote it has flushed it
            self._known[self.residual(position)] = kept.residual_crc
        durable = any(crc is not None for crc in (kept.residual_crc, *(crc for _, crc in lasting)))
        self._write(self._mark_file(position).name, json.dumps(asdict(kept)), durable)
        shutil.rmtree(self.checkpoint(position), ignore_errors=True)
        if kept.residual_crc is not None:  # it is sent as it was encoded
            self._drop(self.update(position))

    def kept(self, position: int) -> Kept | None:
        """Return the mark of an update from an earlier try, when all that it marks for the hub and for the next update
        is here and whole."""
        mark = self._mark(position)
        if mark is None or mark.boot != BOOT or not self._sent(position, mark).is_file():
            return None
        needed = ((self.residual(position), mark.residual_crc), (self.control(position), mark.control_crc))
        return mark if all(crc is None or self._is_whole(path, crc) for path, crc in needed) else None

    def foreign(self, run: str) -> int | None:
        """Return the newest stage that left something to go on from which was not made of the same as this ``run``
        (`Origin.run`); None where all was."""
        return max((number for number, mark in self._marks() if mark.lasts and mark.run != run), default=None)

    def doubt(self, position: int) -> None:
        """Have this position's update made again if it is asked for again, and every other file looked through before
        it is used: the hub found something wrong."""
        self._known.clear()
        self._drop(self._mark_file(position))

    def settle(self, position: int) -> None:
        """The hub has this update: drop what only earlier rounds needed.

        The state that it began from stays with the one that it made, so that it could be done again. What it was
        corrected by stays, with its mark, until the next one is encoded: the hub may go on without this one.
        """
        for _, _, path in self._files("round", folder=self.work):  # of rounds that the hub ended without this site
            shutil.rmtree(path, ignore_errors=True)
        files = list(self._files("state", "local", "update"))
        marks = [number for _, number, path in files if path.suffix == ".json" and number < position]
        before = max((number for number in marks if self._mark(number) is not None), default=position)
        for kind, number, path in files:
            match kind:
                case "update":
                    needed = number >= before or self.residual(number).exists() or self.control(number).exists()
                    if number < position and not (needed and path == self._mark_file(number)):
                        self._drop(path)
                case _ if number < before:
                    self._drop(path)
                case _:
                    pass

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _marks(self) -> list[tuple[int, Kept]]:
        found = [(number, self._mark(number)) for _, number, path in self._files("update") if path.suffix == ".json"]
        return [(number, mark) for number, mark in found if mark is not None]

    def _files(self, *kinds: str, folder: Path | None = None) -> Iterator[tuple[str, int, Path]]:
        """Yield the files of these kinds, each with its kind and its position. One look at the folder: a small round
        would notice more. In the one that workers write to there may be anything."""
        folder = folder or self.path
        for name in os.listdir(folder) if folder.is_dir() else ():
            kind, _, rest = name.partition("-")
            position = rest.partition(".")[0]
            if kind in kinds and not name.endswith(".spare") and position.isdecimal():
                yield kind, int(position), folder / name

    def _mark(self, position: int) -> Kept | None:
        try:
            return Kept(**json.loads(self._mark_file(position).read_text()))
        except (OSError, ValueError, TypeError):  # not there, or cut short by a loss of power
            return None

    def _mark_file(self, position: int) -> Path:
        return self.path / f"update-{position}.json"

    def _sent(self, position: int, kept: Kept) -> Path:
        """Return the file that is sent."""
        return self.update(position) if kept.residual_crc is None else self.wire(position)

    def _is_whole(self, path: Path, crc: int) -> bool:
        """Tell whether a file is here as its mark says; one that this process did not write is looked through once."""
        try:
            if path not in self._known:
                self._known[path] = file_crc(path)
            return self._known[path] == crc and path.is_file()
        except FileNotFoundError:
            return False

    def _drop(self, path: Path) -> None:
        self._known.pop(path, None)
        if path.suffix == ".wire" or path.name.startswith("residual-"):
            self._spares.add(path)
        else:
            path.unlink(missing_ok=True)

    def _epoch(self) -> int:
        try:
            return int((self.path / "epoch").read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise Corrupt(f"the epoch kept of run {self.path.name} is no number; submit the job again") from None

    def _write(self, name: str, text: str, durable: bool = True) -> None:
        with appearing(self.path / name, durable) as file:
            file.write(text.encode())
        if durable:
            sync_folder(self.path)
