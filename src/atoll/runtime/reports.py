"""What an errand tells the hub besides its answers: how far it is, and in words how it ended."""

import logging
import sqlite3
import time

from atoll.errors import AtollError, Denied, NotFound, TaskFailed
from atoll.runtime.kept import FULL
from atoll.runtime.pacing import Balance, told
from atoll.runtime.place import Place
from atoll.runtime.private import silent
from atoll.spec.document import WORDS_LIMIT
from atoll.spec.job import TrainJob
from atoll.spec.message import Assign, Failure, Progress, Refusal
from atoll.spec.pace import Pace
from atoll.spec.policy import Request

_PROGRESS = 0.25  # seconds between two signs of progress
log = logging.getLogger(__name__)


class Reports:
    """One run's. What cannot be told because the link is broken is no reason to stop computing: it is let be."""

    def __init__(self, place: Place) -> None:
        self._place, self._gate, self._site = place, place.gate, place.site.name
        self._told = 0.0  # when progress was last sent
        self.balance = Balance()  # of the round under way: whom it names is told with each pace

    def progress(self, a: Assign, state: str, step: int = 0, steps: int = 0, pace: Pace | None = None) -> None:
        """Tell how far this is, but not so often that short rounds would be spent on telling it."""
        now = time.monotonic()
        if now - self._told < _PROGRESS:
            return
        self._told = now
        plain = Progress(run=a.run, position=a.position, state=state, step=step, steps=steps)
        kept = pace is None or silent(a)
        if kept or not self._say_pace(a, plain.model_copy(update={"pace": told(pace, self.balance)})):
            self._say(plain)

    def _say_pace(self, a: Assign, message: Progress) -> bool:
        """Tell progress with a pace; False where the owner's rules keep it here, since it is a metric like others.

        It is one crossing of the run however often it is told: the journal has the first one's bytes.
        """
        try:
            self._gate.say(message, self._asked(a, len(message.model_dump_json())))
        except (Denied, NotFound):
            return False
        except AtollError as error:
            log.info("run %s: %s", message.run, error)
        return True

    def may_tell_paces(self, a: Assign) -> bool:
        """Tell whether the owner's rules let a pace out, where it goes with something that is decided by itself."""
        if silent(a):
            return False
        try:
            return self._gate.decide(self._asked(a, 0)).allowed
        except (Denied, NotFound):
            return False

    def _asked(self, a: Assign, size: int) -> Request:
        assert isinstance(a.job, TrainJob), "who trains has a pace"
        return self._place.crossing(a, "metric", out=True, size=size, rows=a.job.batch, round=None)

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
        if isinstance(error, TaskFailed) and silent(a):
            # At which row a task fails is in no promise's noise, and so is the line. The owner reads why.
            log.warning("run %s: %s", a.run, words)
            words = (
                error.bare or f"the task failed at '{a.work}'; its job hides the data: why is in the site's log alone"
            )
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
