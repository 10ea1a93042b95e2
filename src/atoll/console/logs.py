"""The logs of a home, which grow with every start: what is too long is set aside before the next process writes on."""

import os
from pathlib import Path

LIMIT = 10_000_000  # bytes: of a log that is written on, and of the one that was set aside
_OF_HOME = ("hub/logs/*.log", "sites/*/agent.log", "sites/*/workers/*.log")
_OF_SITE = ("agent.log", "workers/*.log")


def trim_home(home: Path) -> None:
    """Set aside the long logs of a hub and of its home's sites; to be called before any of them starts."""
    _trim(home, _OF_HOME)


def trim_site(folder: Path) -> None:
    """The same for one site."""
    _trim(folder, _OF_SITE)


def _trim(folder: Path, patterns: tuple[str, ...]) -> None:
    for log in (log for pattern in patterns for log in folder.glob(pattern)):
        if not log.is_symlink() and log.stat().st_size > LIMIT:
            _set_aside(log)


def _set_aside(log: Path) -> None:
    """Keep the end of a log as `NAME.1`. It is moved within the file: on a full disk there is no room for a copy."""
    with log.open("r+b") as file:
        file.seek(-LIMIT, os.SEEK_END)
        end = file.read()
        file.seek(0)
        file.write(end)
        file.truncate()
    log.replace(log.with_name(f"{log.name}.1"))
