"""One run at one site: its assignments, one after another, in a thread of their own.

An errand always works on the newest assignment. Everything it has computed for the hub lies in the run's folder until
the next round shows that the hub has it, so that a lost link, a restarted hub or a restarted agent costs a resend and
no training.
"""

import errno
import logging
import queue
import threading

from atoll.errors import AtollError, Invalid, LinkLost, TaskFailed, Unavailable, Unfit
from atoll.outer.wire import recalls
from atoll.runtime import faults, personal
from atoll.runtime.executor import Group
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import RunFolder
from atoll.runtime.place import Place
from atoll.runtime.ranks import Ranks
from atoll.runtime.reports import Reports, disk_full
from atoll.runtime.stages import Stages
from atoll.spec.message import Assign
from atoll.spec.model import elements

_BACKOFF = (0.05, 2.0)  # seconds between two tries after a broken link, or on a full disk: from, up to
_LOOK = 0.5  # seconds between two looks whether an earlier errand of the run has ended
_LITTLE = 1 << 20  # bytes: marks, logs, what a worker needs beside its tensors
log = logging.getLogger(__name__)


class Errand:
    """The site's side of one run. ``before`` is an earlier errand of it that is still ending.

    Whatever waits in here (for a link, for room on the disk, for the errand before) waits until the hub's own patience
    with the run is over, at which it sends a release, or until the agent ends.
    """

    def __init__(self, place: Place, run: str, before: "Errand | None" = None) -> None:
        self._run, self._before = run, before
        self._inbox: queue.SimpleQueue[Assign | None] = queue.SimpleQueue()
        self._over, self._keep, self._made, self._home = threading.Event(), True, False, place.home
        self._folder, self._reports = RunFolder(place.home / "runs" / run), Reports(place)
        incoming = Incoming(place, self._folder, self._reports)
        self._ranks = Ranks(place, incoming, self._reports, self._over)
        self._stages = Stages(place, self._folder, incoming, self._ranks, self._reports, self._wanted)
        self._short = False  # the disk was full when this was last tried
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"errand-{run}")
        self._thread.start()

    def assign(self, assign: Assign) -> None:
        """Take an assignment. One from an earlier epoch or stage than another that was seen is let be."""
        self._inbox.put(assign)

    def end(self, keep: bool, made: bool = False) -> None:
        """Stop, in the middle of a step if need be; `keep` the folder when the run may come back. Returns at once.

        Where the run ``made`` a model, this site's own tensors of it stay.
        """
        self._keep, self._made = self._keep and keep, self._made or made
        self._over.set()
        spare = self._ranks.leave()  # now, so that the next run finds them
        self._inbox.put(None)
        # Ending workers takes seconds, which the agent's messages must not wait for.
        threading.Thread(target=self._interrupt, args=(spare,), daemon=True, name=f"end-{self._run}").start()

    def _interrupt(self, spare: Group | None) -> None:
        self._ranks.interrupt()
        if spare is not None:
            spare.close()

    def wait(self, timeout: float) -> bool:
        """Wait until its work has ended, and its folder is gone unless it is kept; False when it takes longer."""
        self._thread.join(timeout)
        return self.ended

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _work(self) -> None:
        while self._before is not None:  # two must never be at work in one folder
            if self._before.wait(_LOOK):
                self._before = None
        try:
            assign, wait = self._newest(None, 0.0), _BACKOFF[0]
            while assign is not None and not self._over.is_set():
                done = self._try(assign)
                assign, wait = self._newest(None if done else assign, wait), _BACKOFF[0] if done else 2 * wait
                wait = min(wait, _BACKOFF[1])
        finally:
            self._over.set()
            self._ranks.join()
            spare = self._ranks.leave()
            if spare is not None:
                spare.close()
            if not self._keep:
                faults.reached("site", "released", "run")
                self._drop()

    def _drop(self) -> None:
        """Drop the folder, once what is to outlive it is out of it; else it stays, for the hub's next release."""
        try:
            if self._made:
                personal.keep(self._home, self._run, self._folder)
        except OSError as error:
            words = "mend the disk: they are when this site dials the hub again"
            log.error("run %s: its personal tensors cannot be kept yet (%s); %s", self._run, error, words)
            return
        self._folder.remove()

    def _wanted(self) -> bool:
        """Tell whether what is at work is still the newest that was asked for."""
        return self._inbox.empty() and not self._over.is_set()

    def _newest(self, unfinished: Assign | None, wait: float) -> Assign | None:
        """Return the newest assignment, or None when the errand is over; with an unfinished one, after a while."""
        found: list[Assign | None] = [] if unfinished is None else [unfinished]
        try:
            found.append(self._inbox.get(timeout=None if unfinished is None else wait))
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        assigned = [assign for assign in found if assign is not None]
        if len(assigned) < len(found):
            return None
        # Of two that are equally new the later: a hub that repeats itself may know more.
        return max(reversed(assigned), key=lambda assign: (assign.epoch, assign.position))

    def _try(self, a: Assign) -> bool:
        """Do one assignment and tell the hub how it ended, in words it can show; False to try again.

        What was computed is kept, so that another try after a broken link is little more than sending it again.
        """
        try:
            if self._short and not self._folder.has_room(room(a, self._folder)):
                raise OSError(errno.ENOSPC, "no space left")  # as nothing may be computed only to be lost again
            self._short = False
            if self._fresh(a):
                faults.reached("site", "assigned", a.work)
                self._stages.do(a)
        except LinkLost as error:
            log.info("run %s, stage %d: %s", self._run, a.position, error)
            return False
        except Unfit as error:  # the hub goes on without it, or asks again; then no file is believed unread
            log.error("run %s, stage %d: not taken: %s", self._run, a.position, error)
            self._folder.doubt(a.position)
        except (AtollError, OSError) as error:
            return self._ended(a, error)
        except Exception as error:
            # The boundary of the run at this site: a fault of ours, too, must not leave the hub waiting for nothing.
            log.exception("run %s, stage %d", self._run, a.position)
            return self._ended(a, error)
        return True

    def _ended(self, a: Assign, error: Exception) -> bool:
        """Tell that an assignment came to nothing; False where it only waits for room on the disk."""
        if self._over.is_set():
            return True
        if self._full(a, error):
            if not self._short:
                log.error("run %s: the disk is full (%s); free some space and it goes on", self._run, error)
            self._short = True
            self._reports.waiting(a, "no disk space")
            return False
        log.info("run %s, stage %d: %s", self._run, a.position, error)
        self._reports.ended(a, error)
        return True

    def _fresh(self, a: Assign) -> bool:
        try:
            self._folder.open(a.epoch, a.position)
        except Invalid as error:
            log.warning("run %s: %s", self._run, error)
            return False
        return True

    def _full(self, a: Assign, error: Exception) -> bool:
        """Tell whether a full disk is behind an error. Workers write there too, and say only that they failed."""
        if disk_full(error):
            return True
        return isinstance(error, TaskFailed | Unavailable) and not self._folder.has_room(room(a, self._folder))


def room(a: Assign, folder: RunFolder) -> int:
    """Return about how many bytes an assignment may still have to write.

    The weights where they are to be fetched. For a round also an update, as it is encoded and what it lost where it is
    fed back, control variates, the tensors that stay here, two moments of an optimiser for all that is trained, and a
    site's own weights where they go on.
    """
    sync, vector = a.sync, 4 * elements(a.signature)
    size = _LITTLE + vector * (a.weights is not None and folder.fetched != a.weights)
    if a.work == "train":
        size += vector * (1 + 2 * recalls(sync.wire))
        vector //= 1 + sync.control  # with which half of what is exchanged is control variates
        size += vector * (sync.control + 2 * sync.keep_optimiser + sync.streaming)
        if sync.keep_local:  # the signature lacks them: before the first round they are taken for as large again
            size += (folder.local_bytes(a.position) or vector) * (1 + 2 * sync.keep_optimiser)
    return size
