"""A run's workers at one site: started for the first order, opened on the dataset, replaced when a rank dies."""

import logging
import threading
from functools import partial
from pathlib import Path

from atoll.errors import TaskFailed, Unavailable
from atoll.runtime import personal
from atoll.runtime.executor import Group
from atoll.runtime.fewer import Fewer
from atoll.runtime.incoming import Incoming
from atoll.runtime.kept import WORK
from atoll.runtime.member import OnStep
from atoll.runtime.place import Place
from atoll.runtime.reports import Reports
from atoll.runtime.sandbox import Grant
from atoll.runtime.written import ordered_into, take
from atoll.spec.compute import Compute
from atoll.spec.job import PredictJob, QueryJob, TrainJob
from atoll.spec.message import Assign
from atoll.spec.order import Ahead, Open, Order, Reply
from atoll.spec.pace import Pace

_SETUP = 180.0  # seconds a group has to import torch and open a dataset
log = logging.getLogger(__name__)


class Ranks:
    """Orders are the errand's thread's; others may `leave` and `interrupt`. ``over`` says that nobody wants the work.

    What was ordered `ahead` is waited for before the next order, and when the errand ends (`join`).

    What the ranks reply is the word of user code: whoever gives an order holds the reply to what it can be.
    """

    def __init__(self, place: Place, incoming: Incoming, reports: Reports, over: threading.Event) -> None:
        self._place, self._incoming, self._reports, self._over = place, incoming, reports, over
        self._turn = threading.Lock()  # one thread takes the group away; it is never held while a group ends
        self._group: Group | None = None
        self._busy = threading.Event()
        self._ahead: tuple[Ahead, threading.Thread] | None = None  # the newest, at work or done; the errand's thread's
        self._key = ""
        self._bundle = Path()
        self._fewer = Fewer()

    def order(self, a: Assign, order: Order, steps: int = 0) -> Reply:
        """Give the workers an order; ranks that die are replaced and the order is given again.

        A round for which not all ranks can be had is gone on with by fewer.

        Raises `Denied` for more ranks than the site takes and where they cannot be held as its owner wants, and
        `TaskFailed`, `Unavailable` when they died too often, and what fetching code and opening the dataset raise.
        """
        self._place.check_ranks(a)
        asked, order = order, ordered_into(self._work(a), order)
        self.join()
        self._ahead = None
        wanted, layouts = a.layout, self._fewer.layouts(a.layout, order)
        for attempt, layout in enumerate(layouts, 1):
            if layout != a.layout:
                a, order = self._fewer.cut(a, order, layout)
            if self._group is not None and (self._key != _key(a) or not self._group.whole):
                self._drop()  # the probe's, when the plan has another layout than was tried, or one that lost a rank
            opened = self._opened(a)
            try:
                group = self._started(a, opened)
                self._give(a, group, opened, _SETUP)
                patience = a.sync.wait.patience
                reply = self._give(a, group, order, patience, partial(self._told, a, steps))
            except Unavailable:
                if self._over.is_set() or attempt == len(layouts):
                    raise
            else:
                self._fewer.did(wanted, layout, order)
                take(asked, order, self._place.groups.confined)
                return reply
        raise AssertionError("unreachable")

    def _told(self, a: Assign, steps: int, step: int, pace: Pace | None) -> None:
        self._reports.progress(a, "training", step, steps, pace)

    def ahead(self, a: Assign, order: Ahead) -> None:
        """Have the workers begin the round after ``a``'s, for which an order is to come. Returns at once.

        Nothing depends on it but time: what goes wrong is met again by the round's own order, and told there.
        """
        group = self._group
        if group is None or (self._ahead is not None and self._ahead[0] == order):
            return  # nobody is there who has the dataset open, or it was ordered before an update was sent again
        self.join()
        inside = ordered_into(self._work(a), order)
        work = threading.Thread(target=self._go_ahead, args=(a, group, inside), daemon=True, name=f"ahead-{a.run}")
        self._ahead = order, work
        work.start()

    def _go_ahead(self, a: Assign, group: Group, order: Order) -> None:
        try:
            self._give(a, group, order, a.sync.wait.patience)
        except (TaskFailed, Unavailable) as error:
            log.info("run %s: not begun ahead: %s", a.run, error)

    def join(self) -> None:
        """Wait until nothing is done ahead any more: as long as the run's patience at most, or until `interrupt`."""
        if self._ahead is not None:
            self._ahead[1].join()

    def leave(self) -> Group | None:
        """Keep the workers warm for another run of the same code, unless they are at an order. Returns at once.

        Whoever comes last has waited for what is done ahead.

        ``over`` is set before. What is returned has no use any more and is to be closed, which takes seconds.
        """
        with self._turn:
            if self._busy.is_set():
                return None
            group, self._group = self._group, None
        return None if group is None else self._place.groups.give_back(self._key, group)

    def interrupt(self) -> None:
        """End the order under way, if any: it raises `Unavailable`. ``over`` is set before; takes seconds."""
        if self._busy.is_set():
            self._drop()

    def _drop(self) -> None:
        with self._turn:
            group, self._group = self._group, None
        if group is not None:
            group.close()

    def _opened(self, a: Assign) -> Open:
        """Return the order that opens the dataset; where no group has yet, its owner's rules are asked first."""
        assert a.task is not None, "a stage with a worker comes with code"
        assert not isinstance(a.job, QueryJob)
        entry = self._place.entry(a)
        if self._group is None:
            self._reports.progress(a, "starting")
            self._bundle = self._incoming.bundle(a)
            entry = self._place.opened(a)
        return Open(
            bundle=str(self._bundle),
            task=a.task,
            path=str(entry.path),
            format=entry.format,
            fingerprint=entry.dataset.fingerprint,
            data=a.job.data,
            seed=0 if isinstance(a.job, PredictJob) else a.job.seed,
            statistics=a.statistics,
            pretrained=self._place.pretrained(a),
            layout=a.layout,
            compute=a.job.compute if isinstance(a.job, TrainJob) else Compute(),
        )

    def _started(self, a: Assign, opened: Open) -> Group:
        group = self._group
        if group is None:
            self._key = _key(a)
            group = self._group = self._place.groups.take(self._key, a.layout, self._grant(a, opened))
        return group

    def _grant(self, a: Assign, opened: Open) -> Grant:
        """Return what workers see of this machine: this run's folder, code and dataset, and what its model needs."""
        home, work = self._place.home, self._work(a)
        work.mkdir(parents=True, exist_ok=True)
        own = personal.find(home, a) if not a.sync.keep_local else None
        more = [opened.pretrained.path if opened.pretrained is not None else None, own]
        readable = (opened.bundle, opened.path, work.parent, *more)
        return Grant(hidden=home, readable=tuple(Path(one) for one in readable if one is not None), folder=work)

    def _work(self, a: Assign) -> Path:
        return self._place.home / "runs" / a.run / WORK

    def _give(self, a: Assign, group: Group, order: Order, timeout: float, on_step: OnStep | None = None) -> Reply:
        """Have the group do an order. Busy is only who is at one: whoever answered last stays warm for the next run.

        A group that is of no more use is dropped while it still counts as busy, or the next run would be given it.
        """
        self._busy.set()
        usable = False
        try:
            if self._over.is_set():
                raise Unavailable("the run is over; submit the job again")
            reply = group.order(order, timeout, on_step)
            usable = True
            return reply
        except TaskFailed:
            usable = a.layout.ranks == 1  # of several, others may stand in the middle of a collective
            raise
        finally:
            if not usable:
                self._drop()
            self._busy.clear()


def _key(a: Assign) -> str:
    return f"{a.code} {a.layout.model_dump_json()} {a.user}"
