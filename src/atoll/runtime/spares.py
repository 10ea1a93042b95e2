"""Files that nobody needs any more, kept to be written over: a page that is there costs a fifth of a new one."""

import threading
from pathlib import Path


class Spares:
    """The spare files of one folder, also those that an earlier process left. Nothing in them is ever read as it is.

    Every method may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        self._turn = threading.Lock()
        self._files = sorted(folder.glob("*.spare"))

    def add(self, path: Path) -> None:
        """Take over a file that nobody reads or maps; one that is gone already is none."""
        spare = path.with_name(path.name + ".spare")
        with self._turn:
            try:
                path.rename(spare)
            except FileNotFoundError:
                return
            if spare not in self._files:
                self._files.append(spare)

    def take(self, size: int) -> Path | None:
        """Hand out the file nearest to ``size`` bytes, unless it is not half or more than twice that."""
        with self._turn:
            sizes = {path: path.stat().st_size for path in self._files if path.exists()}
            near = min(sizes, key=lambda path: abs(sizes[path] - size), default=None)
            if near is None or not size <= 2 * sizes[near] <= 4 * size:
                return None
            self._files.remove(near)
        return near

    def keep(self, count: int) -> None:
        """Remove all but the ``count`` newest."""
        with self._turn:
            while len(self._files) > count:
                self._files.pop(0).unlink(missing_ok=True)
