"""What an errand tells the hub besides its answers: how far it is, and in words how it ended."""

import logging
import sqlite3
import time

from atoll.boundary.gate import SiteGate
from atoll.errors import AtollError, Denied
from atoll.runtime.kept import FULL
from atoll.spec.message import WORDS_LIMIT, Assign, Failure, Progress, Refusal

_PROGRESS = 0.25  # seconds between two signs of progress
log = logging.getLogger(__name__)


class Reports:
    """One run's. What cannot be told because the link is broken is no reason to stop computing: it is let be."""

    def __init__(self, gate: SiteGate, site: str) -> None:
        self._gate, self._site = gate, site
        self._told = 0.0  # when progress was last sent

    def progress(self, a: Assign, state: str, step: int = 0, steps: int = 0) -> None:
        """Tell how far this is, but not so often that short rounds would be spent on telling it."""
        now = time.monotonic()
        if now - self._told < _PROGRESS:
            return
        self._told = now
        self._say(Progress(run=a.run, position=a.position, state=state, step=step, steps=steps))

    def waiting(self, a: Assign, words: str) -> None:
        """Tell what an assignment waits for; it is not lost."""
        self._say(Progress(run=a.run, position=a.position, state=f"waiting: {words}"))

    def ended(self, a: Assign, error: Exception) -> None:
        """Tell in words that an assignment came to nothing. `Denied` is the owner's last word, all else a failure."""
        if isinstance(error, Denied):
            self._say(Refusal(run=a.run, words=shortened(str(error))))
            return
        kind = type(error).__name__ if isinstance(error, AtollError) else "AtollError"
        if isinstance(error, OSError):
            kind = "Unavailable"
        words = _words(error)
        # Named here and once: the hub puts the name before words that do not begin with it.
        words = words if words.startswith((f"{self._site}:", f"{self._site} ")) else f"{self._site}: {words}"
        self._say(Failure(run=a.run, position=a.position, words=shortened(words), error=kind))

    def _say(self, message: Progress | Refusal | Failure) -> None:
        try:
            self._gate.say(message)
        except AtollError as error:  # a link that broke, or a hub in this process that will not hear it
            log.info("run %s: %s", message.run, error)


def shortened(words: str) -> str:
    """Cut a sentence to what a message may hold."""
    return words if len(words) <= WORDS_LIMIT else words[: WORDS_LIMIT - 3] + "..."


def disk_full(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, is a disk or a quota without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__
    return False


def _words(error: Exception) -> str:
    if isinstance(error, AtollError):
        return str(error)
    if isinstance(error, OSError):  # of the path only the last part: where a site keeps its files is its own affair
        name = str(error.filename or "disk").rpartition("/")[2]
        return f"{name}: {error.strerror or type(error).__name__}; mend the site's disk and submit the job again"
    # What a fault of ours says may quote the data, and this sentence travels.
    return f"fault in the agent ({type(error).__name__}); its words are in the agent's log, report them"
