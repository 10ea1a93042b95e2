"""What a site keeps for good of runs with personal tensors: for each model its own, in a file named by the run.

A model's jobs find them here. They leave the run's folder when the hub says that a model came of the run, or when such
a job is there before that word is; the oldest go once there are many, and the owner may take any away.
"""

import logging
import os
from pathlib import Path

from atoll.durable import sync_folder
from atoll.errors import Corrupt, Invalid, NotFound
from atoll.runtime.kept import RunFolder
from atoll.spec.message import Assign
from atoll.spec.model import Signature, fits

MOST = 100  # runs
log = logging.getLogger(__name__)


def keep(home: Path, run: str, folder: RunFolder) -> None:
    """Take the newest personal tensors out of a run's folder, which may go afterwards; not after an `OSError`.

    A site whose own are torn says so in its log, and again in words when they are asked for.
    """
    place = _place(home, run)
    try:
        path = folder.last_local()
    except Corrupt as error:
        if not place.is_file():  # they are, where an agent was killed between taking them out and dropping the folder
            log.error(
                "run %s: its personal tensors are not kept (%s); jobs about its model cannot run here", run, error
            )
        return
    if path is None:
        return
    place.parent.mkdir(exist_ok=True)
    os.replace(path, place)  # flushed when it was kept
    sync_folder(place.parent)
    kept = sorted(place.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
    for old in kept[:-MOST]:
        old.unlink(missing_ok=True)


def find(home: Path, a: Assign) -> Path | None:
    """Return this site's personal tensors for the model of an assignment, None for a model that has none.

    Raises `NotFound` when the site does not have them, `Corrupt` when those of a run that still ends here are torn.
    Whoever reads the file verifies it by its own digest.
    """
    if not a.keep_local:
        return None
    if a.made_by is not None:
        place = _place(home, a.made_by)
        if place.is_file() or _taken_early(home, a.made_by, place):
            return place
    raise NotFound(
        f"this site has no tensors of its own ({', '.join(a.keep_local)}) for the model, of run {a.made_by}; "
        "name sites that trained it in data.sites, or train it here"
    )


def _taken_early(home: Path, run: str, place: Path) -> bool:
    """Keep those of a run whose folder is still here: the model's job has overtaken the run's release, or its end.

    They get a second name, for the run may still be at work with the first, or drop it at any instant.
    """
    try:
        path = RunFolder(home / "runs" / run).last_local()
        if path is not None:
            place.parent.mkdir(exist_ok=True)
            os.link(path, place)
    except (Corrupt, FileExistsError, FileNotFoundError):
        if not place.is_file():  # the run has not ended meanwhile
            raise
    return place.is_file()


def check_stays(a: Assign, signature: Signature) -> None:
    """Raise `Invalid` for a signature, without control variates, that names a tensor which is to stay at its site."""
    for spec in signature:
        if fits(spec.name, a.sync.keep_local):
            raise Invalid(f"tensor {spec.name} stays at its site (sync.keep_local), so it is neither sent nor taken")


def _place(home: Path, run: str) -> Path:
    return home / "personal" / f"{run}.safetensors"
