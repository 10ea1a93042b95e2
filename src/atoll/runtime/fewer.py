"""By which layout a run goes on at a site that cannot have all of its ranks any more, until it can again."""

import logging

from atoll.spec.message import Assign
from atoll.spec.order import Order, Probe, Train
from atoll.spec.plan import Layout

_ATTEMPTS = 3  # how often an order is given anew to fresh workers after a rank died
log = logging.getLogger(__name__)


class Fewer:
    """One run's. A round for which all ranks could not be had twice is begun by fewer, and those that follow are.

    All are asked for again in the next round, then after two, four and so on: a cluster takes long to say no.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None  # that it came down to
        self._rounds, self._pause = 0, 0  # before all are asked for again, and so many the last time

    def layouts(self, wanted: Layout, order: Order) -> list[Layout]:
        """Return the layouts to try for an order, one after the other."""
        now = wanted if self._layout is None or isinstance(order, Probe) else self._layout
        if not isinstance(order, Train):
            return [now] * _ATTEMPTS  # what it is tried with is what is planned, and an answer needs no more
        least = now.fewer or now
        if self._layout is None:
            return [*[now] * (_ATTEMPTS - 1), least]
        self._rounds -= 1
        return [wanted if self._rounds < 0 else now, now, least]

    def cut(self, a: Assign, order: Order, layout: Layout) -> tuple[Assign, Order]:
        """Return an assignment and its order under another layout than they were made for."""
        log.warning("run %s: not all of %s ranks can be had; it goes on by %s", a.run, a.layout.ranks, layout.ranks)
        if isinstance(order, Train):  # the shares that it tells are of the whole layout's
            order = order.model_copy(update={"shares": ()})
        return a.model_copy(update={"layout": layout}), order

    def did(self, wanted: Layout, layout: Layout, order: Order) -> None:
        """Hear by which layout an order was done."""
        if not isinstance(order, Train):
            return
        if layout == wanted:
            self._layout, self._pause = None, 0
        elif self._layout is None or self._rounds < 0 or layout != self._layout:
            self._layout, self._rounds = layout, self._pause
            self._pause = max(2 * self._pause, 1)
