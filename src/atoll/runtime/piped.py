"""A layout's ranks behind pipes: how orders reach them and replies come back, and how a group goes on without one."""

import contextlib
import logging
import os
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.errors import Unavailable
from atoll.runtime import faults
from atoll.runtime.member import BEATS, GRACE, Member, OnStep, Rank, Talk
from atoll.runtime.pacing import joined
from atoll.runtime.sentences import Known
from atoll.spec.order import Form, Open, Order, Ready, Reply, Train
from atoll.spec.plan import Layout

SILENCE = 2.0  # seconds without a sign of life that make a rank a lost one, unless its site says otherwise
_TICK = 0.1  # seconds after which a silent group is looked at: is it to end, has a rank died
_LOSSES = 4  # ranks that an order may lose: code that ends itself does so again
log = logging.getLogger(__name__)


class PipedGroup:
    """One thread gives orders; any thread may close the group, which ends the order under way.

    A rank that is lost while the group trains does not end it. Where every rank holds the whole model the others go on
    at once, with its share of each batch; another takes its place as soon as it has read the examples (`again`). Where
    each holds a part, they wait for that one, which finds the lost part in its place's mirror.
    """

    def __init__(
        self,
        ranks: Sequence[Rank],
        meeting: Path,
        silence: float = SILENCE,
        again: Callable[[int], Rank] | None = None,
    ) -> None:
        """``meeting`` begins the names of files by which ranks find each other; ``again`` starts a rank for a place."""
        self._ranks, self._meeting, self._silence, self._again = ranks, meeting, silence, again
        self._closed = threading.Event()
        self._at_order, self._at_end = threading.Lock(), threading.Lock()
        self._members: list[Member] = []  # in the order of their ranks
        self._coming: list[Member] = []  # they read the examples, and are in no group yet
        self._gone: list[Rank] = []
        self._generation, self._broken = 0, False  # broken: none can go on until those that come are ready
        self._opened: Open | None = None
        self._known = Known()  # of the code that is open
        self.unfinished: Path | None = None  # the folder of a round that it could not go on with, though it is wanted

    @property
    def whole(self) -> bool:
        """Whether all of its layout's ranks are at work."""
        return not self._members or len(self._members) == len(self._ranks)

    def rest(self) -> None:
        """Hold nothing for it."""

    def lines(self, order: Order) -> bytes:
        """Return an order as each rank is told it."""
        return order.model_dump_json().encode() + b"\n"

    def order(self, order: Order, timeout: float, on_step: OnStep | None = None) -> Reply:
        talk = Talk(order, timeout, on_step, time.monotonic() + timeout)
        with self._at_order:
            try:
                if not self._members:
                    self._members = [Member(place, rank) for place, rank in enumerate(self._ranks)]
                    self._form(abort=False)
                lines = self.lines(order)
                if isinstance(order, Open) and order != self._opened:
                    self._known = Known.of(order)
                for member in self._members:
                    member.tell(lines, replies=1)
                if isinstance(order, Open):
                    self._opened = order
                self._converse(talk)
            except Unavailable:
                if isinstance(order, Train) and order.checkpoint is not None and not self._closed.is_set():
                    self.unfinished = Path(order.checkpoint)
                raise
            finally:
                if self._closed.is_set():
                    self._let_go()
        if talk.failed is not None:
            raise talk.failed
        first, *_ = self._members
        assert first.reply is not None, "all have answered"
        return first.reply.model_copy(update={"pace": joined(one.pace for one in self._members)})

    def _form(self, abort: bool, leavers: Sequence[Member] = ()) -> None:
        """Begin a generation of the members that there are, without the ``leavers``."""
        self._generation += 1
        meeting = str(self._meeting.with_name(f"{self._meeting.name}-{self._generation}"))
        beat = self._silence / BEATS
        formed = Form(generation=self._generation, rank=0, ranks=0, meeting=meeting, abort=abort, beat=beat)
        for rank, member in enumerate(self._members):
            member.reply, member.pace, member.awaited = None, None, 0
            told = formed.model_copy(update={"rank": rank, "ranks": len(self._members)})
            member.tell(told.model_dump_json().encode() + b"\n", replies=0)
        for member in leavers:
            member.tell(formed.model_dump_json().encode() + b"\n", replies=0)
            with contextlib.suppress(Unavailable):  # it went by itself
                member.send()

    def _converse(self, talk: Talk) -> None:
        """Carry the order to the ranks and their words back, until all have ended it or it is clear that not all will.

        Neither way blocks: a rank that was stopped reads nothing, and a long order is more than a pipe holds.
        """
        with selectors.DefaultSelector() as selector:
            told = False
            while self._broken or not all(member.reply is not None for member in self._members):
                if self._closed.is_set():
                    raise Unavailable("worker: its group was ended; the run is over or starts another")
                self._watch(selector)
                ready = selector.select(min(talk.left(), _TICK))
                for key, events in ready:
                    self._attend(key.data, events, talk)
                if not told and not any(member.unsent for member in self._members):
                    told = True
                    faults.reached("site", "ordered", talk.order.kind)
                for member in (*self._members, *self._coming):
                    if member not in self._members and member not in self._coming:
                        continue  # it went with one before it
                    if member.rank.ended() and not selector.select(0):
                        # Its pipe is held open by something that user code started.
                        self._lose(member, member.rank.died(), talk)
                    elif member.busy and member.silent(self._silence):
                        member.rank.kill()
                        self._lose(member, Unavailable(f"worker: a rank was silent for {self._silence:g} s"), talk)
                if talk.broken is not None and not self._broken and time.monotonic() - talk.broken > self._silence:
                    self._go_on(Unavailable("worker: ranks lost each other, and all of them live"), talk)

    def _watch(self, selector: selectors.BaseSelector) -> None:
        """Have the selector look at what may happen next."""
        wanted: dict[int, tuple[int, Member]] = {}
        for member in (*self._members, *self._coming):
            wanted[member.rank.replies] = selectors.EVENT_READ, member
            if member.unsent:
                wanted[member.rank.orders] = selectors.EVENT_WRITE, member
        for number, key in list(selector.get_map().items()):
            if number not in wanted or wanted[number][1] is not key.data:
                selector.unregister(number)
        for number, (events, member) in wanted.items():
            if number not in selector.get_map():
                selector.register(number, events, member)

    def _attend(self, member: Member, events: int, talk: Talk) -> None:
        if member not in self._members and member not in self._coming:
            return  # it was lost a moment ago
        try:
            if events & selectors.EVENT_WRITE:
                member.send()
                return
            heard = member.hear()
        except Unavailable as error:
            self._lose(member, error, talk)
            return
        for reply in heard:
            self._heed(member, reply, talk)

    def _heed(self, member: Member, reply: Reply, talk: Talk) -> None:
        inside = member in self._members
        if reply.sign == "leaving" and talk.losses < _LOSSES:  # user code can say so, too, and again and again
            talk.losses += 1
            self._replace(member, talk)
        if reply.sign == "broken" and reply.generation == self._generation:
            talk.broken = talk.broken or time.monotonic()  # a loss is seen in a moment, or a connection broke by itself
        if reply.sign is not None or reply.generation != (self._generation if inside else 0):
            return
        if reply.progress is not None:
            member.pace = reply.pace
            if talk.on_step is not None and member is self._members[0]:
                talk.on_step(reply.progress, joined(one.pace for one in self._members))
            return
        member.awaited -= 1
        if inside:
            self._answered(member, reply, talk)
        elif reply.failed is not None:
            log.warning("%s", self._known.told(reply.failed, talk.order))
            words = "worker: none takes the place of a lost rank; why is in the log of this site's worker"
            self._lose(member, Unavailable(words), talk)
        elif member.awaited <= 0:
            member.ready = True
            self._meet(talk, abort=False)

    def _answered(self, member: Member, reply: Reply, talk: Talk) -> None:
        """Take a word on the order, or on one before it that only opened the dataset."""
        if reply.failed is not None:
            talk.fail(self._known.failure(reply.failed, talk.order))
        elif member.awaited > 0:
            return
        member.reply, member.pace = reply, reply.pace

    def _lose(self, member: Member, error: Unavailable, talk: Talk) -> None:
        """Go on without a rank, or with another in its place. Raises the error where neither can be."""
        (self._coming if member in self._coming else self._members).remove(member)
        self._gone.append(member.rank)
        if talk.losses < _LOSSES and not any(one.place == member.place for one in (*self._coming, *self._members)):
            self._replace(member, talk)
        self._go_on(error, talk)

    def _go_on(self, error: Unavailable, talk: Talk) -> None:
        talk.losses, talk.broken = talk.losses + 1, None
        layout = self._opened.layout if self._opened is not None else None
        plain, all_here = layout is None or layout.plain, len(self._members) == len(self._ranks)
        lasting = all_here or (plain and bool(self._members))
        places = {one.place for one in (*self._members, *self._coming)}
        possible = lasting or (bool(places) if plain else len(places) == len(self._ranks))
        if not isinstance(talk.order, Train) or talk.failed is not None or talk.losses > _LOSSES or not possible:
            raise error
        log.warning("%s; %s", error, "the others go on" if lasting else "another takes its place")
        self._broken = not lasting
        self._meet(talk, abort=True)

    def _replace(self, member: Member, talk: Talk) -> None:
        """Start a rank that is to have a member's place, once it can be had."""
        if self._again is None or self._opened is None or not isinstance(talk.order, Train):
            return
        if any(one.place == member.place for one in self._coming):
            return
        try:
            other = Member(member.place, self._again(member.place))
        except Unavailable as error:
            log.warning("no rank takes the place of the one that is lost: %s", error)
            return
        self._coming.append(other)
        opened = self._opened.model_copy(update={"layout": None})
        other.tell(self.lines(opened) + self.lines(Ready()), replies=2)

    def _meet(self, talk: Talk, abort: bool) -> None:
        """Begin a new generation, if it can be begun now: with all that are ready, or without those that are not."""
        if self._broken and not all(one.ready for one in self._coming):
            return
        ready = [one for one in self._coming if one.ready]
        if not abort and not ready:
            return
        places = {one.place for one in ready}
        leavers = [one for one in self._members if one.place in places]  # they had notice
        self._gone += [one.rank for one in leavers]
        self._members = sorted([*ready, *(o for o in self._members if o not in leavers)], key=lambda one: one.place)
        self._coming = [one for one in self._coming if not one.ready]
        self._form(abort or self._broken, leavers)
        self._broken, talk.broken = False, None
        lines = self.lines(self._laid_out()) + self.lines(self._shared(talk.order))
        for member in self._members:
            member.tell(lines, replies=2)

    def _laid_out(self) -> Open:
        """Return the order that opens the dataset, for as many ranks as there are."""
        assert self._opened is not None, "who trains has a dataset open"
        layout = self._opened.layout
        if len(self._members) == len(self._ranks) or layout is None:
            return self._opened
        return self._opened.model_copy(update={"layout": Layout(data=len(self._members))})

    def _shared(self, order: Order) -> Order:
        """Return the order for as many ranks as there are: the shares that it tells are of the whole layout's."""
        if isinstance(order, Train) and len(self._members) < len(self._ranks):
            return order.model_copy(update={"shares": ()})
        return order

    def close(self) -> None:
        self._closed.set()
        # Whoever is at an order leaves it with the next tick, unless its caller's own `on_step` holds it up.
        free = self._at_order.acquire(timeout=GRACE)
        try:
            if free:
                self._let_go(replies=False)  # a worker ends when nobody can give it orders any more
            with self._at_end:
                deadline = time.monotonic() + GRACE
                for rank in self._all():
                    rank.end(deadline)
            if free:
                self._let_go()
        finally:
            if free:
                self._at_order.release()
        for path in self._meeting.parent.glob(f"{self._meeting.name}*"):
            with contextlib.suppress(IsADirectoryError, FileNotFoundError):  # user code could make a folder so named
                path.unlink()

    def _all(self) -> list[Rank]:
        return [*self._ranks, *(rank for rank in self._others() if rank not in self._ranks)]

    def _others(self) -> list[Rank]:
        return [*(one.rank for one in (*self._members, *self._coming)), *self._gone]

    def _let_go(self, replies: bool = True) -> None:
        """Close the pipes, once. Only who is at an order may: their numbers can be another file's at once."""
        for rank in self._all():
            if rank.orders >= 0:
                os.close(rank.orders)
                rank.orders = -1
            if replies and rank.replies >= 0:
                os.close(rank.replies)
                rank.replies = -1
