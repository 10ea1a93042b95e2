"""Updates of one stage on their way through a relay: spooled as they come, and made one when all are here.

The sum is made as the hub makes it: in fixed point, so that the order of arrival is nothing to it. Then it is one
update like a site's own, encoded by the plan's wire with what the last one lost, and kept until a later one shows that
it was merged. Whatever is lost with a relay is asked for again: the hub counts nothing that it does not have.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from atoll.boundary.channel import Source, Wanted
from atoll.errors import Denied, Invalid, LinkLost, Unavailable, Unfit
from atoll.runtime.brought import Watched, kinds
from atoll.runtime.kept import RunFolder
from atoll.runtime.outgoing import span
from atoll.runtime.spool import Spool
from atoll.runtime.summing import Brought, summed
from atoll.spec.event import Answer
from atoll.spec.job import TrainJob
from atoll.spec.message import Assign, Group, Parcel

_SHARE = 0.75  # of a quorum's deadline, for each relay on the way: what is left is for the sum and for what is above
_BACKOFF = (0.05, 2.0)  # seconds between two tries to pass a sum on: from, up to
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Stage:
    """One stage of the run as this relay sees it; `news` guards all that changes."""

    assign: Assign
    group: Group
    closes: float  # by `time.monotonic`: then it goes on with what is here
    brought: dict[str, Brought] = field(default_factory=dict[str, Brought])
    without: set[str] = field(default_factory=set[str])  # sites that bring nothing to this stage any more
    closed: bool = False  # the sum is being made, or was: what comes now is passed on by itself
    done: bool = False  # the sum was passed on, or there was none
    over: bool = False  # another stage began, or the run ended
    news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def place(self) -> tuple[int, int]:
        return self.assign.epoch, self.assign.position

    @property
    def sites(self) -> set[str]:
        return {answer.site for one in self.brought.values() for answer in one.answers}

    @property
    def whole(self) -> bool:
        return self.sites | self.without >= {*self.group.sites}

    def regroup(self, group: Group) -> None:
        with self.news:
            self.group = group
            self.without -= {*group.sites}
            self.news.notify_all()

    def end(self) -> None:
        with self.news:
            self.over = self.closed = True
            self.news.notify_all()


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
        self._folder, self._spool = RunFolder(folder), Spool(folder / "spool")
        self._turn = threading.Lock()  # over which stage it is
        self._summing = threading.Lock()  # one sum at a time: one of an earlier epoch may still be under way
        self._stage: _Stage | None = None

    def assigned(self, assign: Assign) -> None:
        """Take note of an assignment on its way to a site below: of a new stage, or once more of this one."""
        mine = ((number, one) for number, one in enumerate(assign.groups, 1) if one.relay == self._relay)
        depth, group = next(mine, (0, None))
        with self._turn:
            now, place = self._stage, (assign.epoch, assign.position)
            if now is not None and place < now.place:
                return
            if now is not None and group is not None and place == now.place and not now.done:
                now.regroup(group)
                return
            if now is not None:
                now.end()
            self._stage = None if group is None else self._begun(assign, group, depth)

    def _begun(self, assign: Assign, group: Group, depth: int) -> _Stage:
        self._spool.drop(lambda position, _: position < assign.position)
        wait = assign.sync.wait
        seconds = wait.deadline * _SHARE**depth if wait.kind == "quorum" else wait.patience
        stage = _Stage(assign, group, time.monotonic() + seconds)
        threading.Thread(target=self._work, args=(stage,), daemon=True, name=f"sum-{assign.run}").start()
        return stage

    def without(self, site: str) -> None:
        """A site brings nothing to this stage. Under a quorum the others go on; else the hub decides what becomes."""
        stage = self._stage
        if stage is not None and stage.assign.sync.wait.kind == "quorum":
            with stage.news:
                stage.without.add(site)
                stage.news.notify_all()

    def end(self, keep: bool) -> None:
        with self._turn:
            stage, self._stage = self._stage, None
        if stage is not None:
            stage.end()
        if not keep:
            self._folder.remove()

    # --- what comes in

    def sums(self, answers: tuple[Answer, ...]) -> bool:
        """Tell whether these answers' update is one to be summed here; else it is passed on as it is."""
        stage = self._stage
        if stage is None or stage.closed:
            return False
        asked = {*stage.group.sites}
        return all((one.epoch, one.position) == stage.place and one.site in asked for one in answers)

    def take(self, child: str, parcel: Parcel, answers: tuple[Answer, ...], frames: Wanted) -> None:
        """Receive an update for the sum; returning means that it is on disk. Raises `Unfit` in words that name tensor
        and reason, `LinkLost` where it came too late for the sum: sent again it is passed on."""
        stage = self._stage
        if stage is None:
            raise LinkLost(f"{child}: its stage is over here; it is asked for again")
        try:
            digest = self._received(stage.assign, child, parcel, answers, frames)
        except Invalid as error:
            raise Unfit(str(error)) from None
        with stage.news:
            if stage.closed:
                raise LinkLost(f"{child}: the sum went on without it; sent again it is passed on")
            stage.brought[child] = Brought(answers, digest)
            stage.news.notify_all()

    def _received(self, a: Assign, child: str, parcel: Parcel, answers: tuple[Answer, ...], frames: Wanted) -> str:
        first, last = span(a)
        _check(a, child, parcel, answers, last - first)
        watched = Watched(frames, child, a.signature, {*kinds(a.sync.wire)} <= {"clip"}, first)
        try:
            return self._spool.receive((a.position, child), watched, a.sync.wire, last - first, parcel.content)[0]
        except Invalid as error:
            raise Invalid(watched.told(error)) from None

    # --- what goes out

    def _work(self, stage: _Stage) -> None:
        """Wait until all are here, or for as long as this stage waits; make the sum, and pass it on."""
        with stage.news:
            stage.news.wait_for(lambda: stage.over or stage.whole, max(0.0, stage.closes - time.monotonic()))
            stage.closed = True
        wait = _BACKOFF[0]
        while stage.brought and not stage.over and not self._tried(stage):
            with stage.news:
                stage.news.wait_for(lambda: stage.over, wait)
            wait = min(2 * wait, _BACKOFF[1])
        stage.done = True

    def _tried(self, stage: _Stage) -> bool:
        """Try to pass the sum on; False where that is worth another try."""
        a = stage.assign
        try:
            with self._summing:
                if not stage.over:
                    brought = dict(sorted(stage.brought.items()))
                    self._send(*summed(self._folder, self._spool, a, stage.group, brought))
                    self._folder.settle(a.position)
        except (LinkLost, Unavailable, OSError) as error:
            log.info("run %s: the sum of stage %d: %s", a.run, a.position, error)
            return stage.over
        except (Denied, Invalid) as error:  # the hub's word on it; who is at fault it has journalled
            log.error("run %s: the sum of stage %d was not taken: %s", a.run, a.position, error)
            self._folder.doubt(a.position)
            stage.done = True  # before they are assigned again
            if not stage.over:
                self._again(stage.sites)
        except Exception as error:
            # The thread's own boundary: nothing may leave the hub waiting for a sum that never comes.
            log.exception("run %s: the sum of stage %d", a.run, a.position)
            if not stage.over:
                self._broken(a, error)
        return True


def _check(a: Assign, child: str, parcel: Parcel, answers: tuple[Answer, ...], size: int) -> None:
    """Raise `Invalid` for an update that the assignment cannot have asked for, as the hub does."""
    if (parcel.wire, parcel.size) != (kinds(a.sync.wire), size):
        raise Invalid(
            f"{child}: an update of {parcel.size} elements as {list(parcel.wire)} "
            f"where the plan has {size} as {list(kinds(a.sync.wire))}"
        )
    assert isinstance(a.job, TrainJob)
    most = a.job.batch * a.steps
    for answer in answers:
        if not 1 <= answer.examples <= most or answer.version != a.version:
            raise Invalid(
                f"{answer.site}: examples: {answer.examples}: stage 'train' has 1 to {most} there, from version "
                f"{a.version}; look at what answers for that site"
            )
