"""Updates of one stage on their way through a relay: spooled as they come, and made one when all are here.

The sum is made as the hub makes it: in fixed point, so that the order of arrival is nothing to it. Then it is one
update like a site's own, encoded by the plan's wire with what the last one lost, and kept until a later one shows that
it was merged. Whatever is lost with a relay is asked for again: the hub counts nothing that it does not have.
"""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from atoll.boundary.channel import Source, Wanted
from atoll.errors import Denied, Invalid, LinkLost, Unavailable, Unfit
from atoll.runtime.brought import Watched, check_trained, kinds
from atoll.runtime.gathered import Gathered
from atoll.runtime.kept import RunFolder
from atoll.runtime.outgoing import span
from atoll.runtime.routes import maker
from atoll.runtime.spool import Spool
from atoll.runtime.summing import Brought, summed
from atoll.spec.event import Answer
from atoll.spec.job import TrainJob
from atoll.spec.message import Assign, Branch, Parcel

_SHARE = 0.75  # of a quorum's deadline, for each relay on the way: what is left is for the sum and for what is above
_BACKOFF = (0.05, 2.0)  # seconds between two tries to pass a sum on, or to have another one made: from, up to
log = logging.getLogger(__name__)


class Gathering:
    """One run's at a relay. ``send`` takes a sum to the hub, ``again`` has these sites bring theirs anew, and
    ``broken(assign, error)`` tells the hub that the run cannot go on here."""

    def __init__(
        self,
        relay: str,
        folder: Path,
        send: Callable[[Parcel, Source], None],
        again: Callable[[set[str]], None],
        broken: Callable[[Assign, Exception], None],
    ) -> None:
        self._relay, self._send, self._again, self._broken = relay, send, again, broken
        self._folder, self._spooled = RunFolder(folder), folder / "spool"
        self._turn = threading.Lock()  # over which stage it is
        self._summing = threading.Lock()  # one sum at a time: one of an earlier epoch may still be under way
        self._opening = threading.Lock()
        self._opened: Spool | None = None
        self._gone = False  # the run is over, and no folder is to be made for it
        self._stage: Gathered | None = None
        self._refused = 0  # sums in a row that the hub did not take
        self._warned = False  # that the rounds of this run take longer than a sum waits

    def assigned(self, assign: Assign) -> None:
        """Take note of an assignment on its way to a site below: of a new stage, or once more of this one."""
        mine = ((number, one) for number, one in enumerate(assign.branches, 1) if one.relay == self._relay)
        depth, branch = next(mine, (0, None))
        with self._turn:
            now, place = self._stage, (assign.epoch, assign.position)
            if now is not None and place < now.place:
                return
            if now is not None and branch is not None and place == now.place and not now.done:
                anew = now.renew(branch)
            else:
                anew = set[str]()
                if now is not None:
                    now.end()
                self._stage = None if branch is None else self._begun(assign, branch, depth)
        if anew:
            self._again(anew)

    def _begun(self, assign: Assign, branch: Branch, depth: int) -> Gathered:
        wait = assign.sync.wait
        seconds = wait.deadline * _SHARE**depth if wait.kind == "quorum" else wait.patience
        stage = Gathered(assign, branch, time.monotonic() + seconds)
        threading.Thread(target=self._work, args=(stage,), daemon=True, name=f"sum-{assign.run}").start()
        return stage

    def without(self, site: str, position: int | None = None) -> None:
        """A site brings nothing to the stage at ``position``, or to whichever it is. Under a quorum the others go on;
        else the hub decides what becomes."""
        stage = self._stage
        if stage is None or stage.assign.sync.wait.kind != "quorum" or position not in (None, stage.assign.position):
            return
        stage.leave_out(site)

    def end(self, keep: bool) -> None:
        with self._turn:
            stage, self._stage = self._stage, None
        if stage is not None:
            stage.end()
        if not keep:
            with self._opening:
                self._gone = True
            self._folder.remove()

    # --- what comes in

    def take(self, child: str, parcel: Parcel, answers: tuple[Answer, ...], frames: Wanted) -> bool:
        """Receive an update for the sum: True means that it is on disk; False, that it is to be passed on as it is.

        Raises `Unfit` in words that name tensor and reason, `LinkLost` where it came too late for the sum, or where a
        part of it is here: sent again it is passed on. `Unavailable` and `OSError` when the disk has no room.
        """
        stage = self._stage
        if stage is None or not stage.asks(answers):
            return False
        name = maker(answers)
        stream = stage.begin(child, name, answers)
        if stream is None:
            return True
        try:
            ready = partial(stage.check, child, name, stream, answers)
            digest = self._received(stage.assign, name, parcel, answers, frames, ready)
        except Invalid as error:
            raise Unfit(str(error)) from None
        stage.add(child, name, stream, Brought(tuple(_trained(answer) for answer in answers), digest))
        return True

    def _received(
        self,
        a: Assign,
        name: str,
        parcel: Parcel,
        answers: tuple[Answer, ...],
        frames: Wanted,
        ready: Callable[[], None],
    ) -> str:
        first, last = span(a)
        _check(a, name, parcel, answers, last - first)
        watched = Watched(frames, name, a.signature, {*kinds(a.sync.wire)} <= {"clip"}, first)
        try:
            spool, wanted = self._spool(), (a.sync.wire, last - first, parcel.content)
            return spool.receive((a.position, name), watched, *wanted, ready)[0]
        except Invalid as error:
            raise Invalid(watched.told(error)) from None

    def _spool(self) -> Spool:
        """Return where updates are kept. Raises `OSError` while the disk has no room for as much as its folder."""
        with self._opening:
            if self._gone:
                raise LinkLost(f"{self._relay}: the run is over here")
            if self._opened is None:
                self._opened = Spool(self._spooled)
            return self._opened

    # --- what goes out

    def _work(self, stage: Gathered) -> None:
        """Wait until all are here, or for as long as this stage waits; make the sum, and pass it on."""
        self._tidy(stage.assign)
        with stage.news:
            seconds = max(0.0, stage.closes - time.monotonic())
            stage.news.wait_for(lambda: stage.over or stage.whole, seconds)
            stage.closed = True
        if not (stage.brought or stage.over or self._warned or stage.whole):
            self._warned = True
            words = "no update came in %.0f s, after which each goes on alone; raise sync.wait.deadline"
            log.warning("run %s: stage %d: " + words, stage.assign.run, stage.assign.position, seconds)
        wait = _BACKOFF[0]
        while stage.brought and not stage.over and not self._tried(stage):
            stage.wait(wait)
            wait = min(2 * wait, _BACKOFF[1])
        stage.done = True

    def _tidy(self, a: Assign) -> None:
        try:
            self._spool().drop(lambda position, _: position < a.position)
        except (LinkLost, OSError) as error:  # the next stage's turn comes
            log.info("run %s: updates that are spent stay for now (%s)", a.run, error)

    def _tried(self, stage: Gathered) -> bool:
        """Try to make the sum and to pass it on; False where that is worth another try."""
        a, taken = stage.assign, True
        try:
            with self._summing:
                branch, brought = stage.to_sum()
                if brought and not stage.over:
                    taken = self._passed_on(a, *summed(self._folder, self._spool(), a, branch, brought))
        except (LinkLost, Unavailable, OSError) as error:
            log.info("run %s: the sum of stage %d: %s", a.run, a.position, error)
            return stage.over
        except Exception as error:
            # The thread's own boundary: nothing may leave the hub waiting for a sum that never comes. Of updates that
            # cannot be summed the words name the one, as the hub's do where it sums them itself.
            log.exception("run %s: the sum of stage %d", a.run, a.position)
            if not stage.over:
                self._broken(a, error)
        if not taken:
            self._ask_again(stage)
        return True

    def _passed_on(self, a: Assign, parcel: Parcel, frames: Source) -> bool:
        """Send a sum; False for one that is not taken, of which whoever is at fault is journalled."""
        try:
            self._send(parcel, frames)
        except (Denied, Invalid) as error:
            log.error("run %s: the sum of stage %d was not taken: %s", a.run, a.position, error)
            self._folder.doubt(a.position)
            self._refused += 1
            return False
        self._refused = 0
        self._folder.settle(a.position)
        return True

    def _ask_again(self, stage: Gathered) -> None:
        """Have those that were in a sum bring theirs anew, after a while that grows: it may not be taken again."""
        stage.wait(min(_BACKOFF[0] * 2 ** min(self._refused, 10), _BACKOFF[1]))
        stage.done = True  # before they are assigned again
        if not stage.over:
            self._again(stage.sites)


def _check(a: Assign, name: str, parcel: Parcel, answers: tuple[Answer, ...], size: int) -> None:
    """Raise `Invalid` for an update that the assignment cannot have asked for, as the hub does."""
    if (parcel.wire, parcel.size) != (kinds(a.sync.wire), size):
        raise Invalid(
            f"{name}: an update of {parcel.size} elements as {list(parcel.wire)} "
            f"where the plan has {size} as {list(kinds(a.sync.wire))}"
        )
    assert isinstance(a.job, TrainJob)
    for answer in answers:
        check_trained(answer, a.job.batch, a.steps, a.sync)
        if answer.version != a.version:
            raise Invalid(f"{answer.site}: an update of version {answer.version}, where {a.version} was given out")


def _trained(answer: Answer) -> Answer:
    """Return what a train round's answer has, without what a site may have put in besides: the parcel of a sum holds
    thousands of them."""
    kept = ("site", "position", "epoch", "version", "examples", "steps", "loss", "seconds", "via")
    return Answer.model_validate({name: getattr(answer, name) for name in kept})
