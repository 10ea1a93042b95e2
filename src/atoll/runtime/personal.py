"""What a site keeps for good of runs with personal tensors: for each model its own, in a file named by the run.

A model's jobs find them here. They leave the run's folder only when the hub says that a model came of the run, and the
oldest go once there are many; the owner may take any away.
"""

import logging
import os
from pathlib import Path

from atoll.errors import AtollError, Invalid, NotFound
from atoll.runtime.kept import RunFolder
from atoll.spec.message import Assign
from atoll.spec.model import Signature, fits

MOST = 100  # runs
log = logging.getLogger(__name__)


def keep(home: Path, run: str, folder: RunFolder) -> None:
    """Take the newest personal tensors out of a run's folder, which is about to go. Nothing is raised: a site that
    cannot keep them says so in its log, and again in words when they are asked for."""
    try:
        path = folder.last_local()
        if path is None:
            return
        place = _place(home, run)
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)  # flushed when it was kept
        _sync(place.parent)
        kept = sorted(place.parent.glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
        for old in kept[:-MOST]:
            old.unlink(missing_ok=True)
    except (AtollError, OSError) as error:
        log.error("run %s: its personal tensors are not kept (%s); jobs about its model cannot run here", run, error)


def find(home: Path, a: Assign) -> Path | None:
    """Return this site's personal tensors for the model of an assignment, None for a model that has none.

    Raises `NotFound` when the site does not have them. Whoever reads the file verifies it by its own digest.
    """
    if not a.keep_local:
        return None
    place = _place(home, a.made_by) if a.made_by is not None else None
    if place is None or not place.is_file():
        raise NotFound(
            f"this site has no tensors of its own ({', '.join(a.keep_local)}) for the model, of run {a.made_by}; "
            "name sites that trained it in data.sites, or train it here"
        )
    return place


def check_stays(a: Assign, signature: Signature) -> None:
    """Raise `Invalid` for a signature that names a tensor which is to stay at its site."""
    for spec in signature:
        if fits(spec.name, a.sync.keep_local):
            raise Invalid(f"tensor {spec.name} stays at its site (sync.keep_local), so it is neither sent nor taken")


def _place(home: Path, run: str) -> Path:
    return home / "personal" / f"{run}.safetensors"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
