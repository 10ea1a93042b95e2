"""By which way a relay's sites were given their work: what comes back of it must come by the same."""

import threading
from dataclasses import dataclass, field

from atoll.errors import Denied, LinkLost
from atoll.spec.event import Answer
from atoll.spec.message import Assign, Message, Relayed


def innermost(message: Relayed) -> tuple[str, Message]:
    """Return the site that a message is about, and what is said, however many relays there are on the way."""
    while isinstance(message.message, Relayed):
        message = message.message
    return message.site, message.message


@dataclass(slots=True)
class Routes:
    """The newest assignment of each site in each run, and the child that it went through: the site itself, or a relay
    that it is behind. May be asked from any thread."""

    _given: dict[str, dict[str, tuple[str, Assign]]] = field(default_factory=dict[str, dict[str, tuple[str, Assign]]])
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def note(self, child: str, site: str, assign: Assign) -> None:
        with self._turn:
            self._given.setdefault(assign.run, {})[site] = (child, assign)

    def forget(self, run: str, site: str | None = None) -> bool:
        """Forget a site's part in a run, or all of the run; tell whether nothing of it is left."""
        with self._turn:
            given = self._given.get(run, {})
            if site is not None:
                given.pop(site, None)
            if site is None or not given:
                self._given.pop(run, None)
            return run not in self._given

    def assigned(self, child: str, run: str, site: str) -> Assign:
        """Return what a site was given. Raises `LinkLost` where that was nothing yet, `Denied` for another's."""
        by, assign = self._given.get(run, {}).get(site, ("", None))
        if assign is None:
            raise LinkLost(f"{child}: run {run} gave {site} no work by way of this relay yet; try again")
        if by != child:
            raise Denied(f"{child}: speaks for {site!r}, which is not behind it; a site speaks for itself only")
        return assign

    def check(self, child: str, run: str, answers: tuple[Answer, ...]) -> None:
        """Raise as `assigned` unless each of these answers comes by the way that it was asked for by."""
        for answer in answers:
            self.assigned(child, run, answer.site)

    def children(self, sites: set[str]) -> set[str]:
        """Return by whom these sites are reached."""
        with self._turn:
            return {child for run in self._given.values() for site, (child, _) in run.items() if site in sites}
