"""By which way a relay's sites were given their work: what comes back of it must come by the same."""

import threading
from dataclasses import dataclass, field

from atoll.errors import Denied, LinkLost, Unfit
from atoll.spec.event import Answer
from atoll.spec.message import Assign, Message, Parcel, Relayed


def unwrapped(message: Relayed) -> tuple[tuple[str, ...], Message]:
    """Return the way of a message below this relay, which ends with the site that it is about, and what is said."""
    way = [message.site]
    while isinstance(message.message, Relayed):
        message = message.message
        way.append(message.site)
    return tuple(way), message.message


def wrapped(way: tuple[str, ...], message: Message) -> Relayed:
    """Return a message as it comes by a way below this relay."""
    for site in reversed(way):
        message = Relayed(site=site, message=message)
    assert isinstance(message, Relayed), "a way has a site at its end"
    return message


def maker(answers: tuple[Answer, ...]) -> str:
    """Return whose an update is: of the site that it is of, or of the relay that made it one of several."""
    return answers[0].via[0] if answers[0].via else answers[0].site


@dataclass(slots=True)
class Routes:
    """The newest assignment of each site in each run, and the way that it went. May be asked from any thread."""

    _given: dict[str, dict[str, tuple[tuple[str, ...], Assign]]] = field(
        default_factory=dict[str, dict[str, tuple[tuple[str, ...], Assign]]]
    )
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def note(self, way: tuple[str, ...], assign: Assign) -> None:
        """``way`` begins with the child of this relay and ends with the site, which are one where that dials it."""
        with self._turn:
            self._given.setdefault(assign.run, {})[way[-1]] = (way, assign)

    def forget(self, run: str, site: str | None = None) -> bool:
        """Forget a site's part in a run, or all of the run; tell whether nothing of it is left."""
        with self._turn:
            given = self._given.get(run, {})
            if site is not None:
                given.pop(site, None)
            if site is None or not given:
                self._given.pop(run, None)
            return run not in self._given

    def goes(self, way: tuple[str, ...], run: str) -> bool:
        """Tell whether this is the way by which its site was given work in a run."""
        return self._way(run, way[-1]) == way

    def _way(self, run: str, site: str) -> tuple[str, ...]:
        given = self._given.get(run, {}).get(site)
        return given[0] if given is not None else ()

    def assigned(self, child: str, run: str, site: str) -> Assign:
        """Return what a site was given. Raises `LinkLost` where that was nothing yet, `Denied` for another's."""
        given = self._given.get(run, {}).get(site)
        if given is None:
            raise LinkLost(f"{child}: run {run} gave {site} no work by way of this relay yet; try again")
        if given[0][0] != child:
            raise Denied(f"{child}: speaks for {site!r}, which is not behind it; a site speaks for itself only")
        return given[1]

    def check(self, child: str, parcel: Parcel, answers: tuple[Answer, ...]) -> None:
        """Raise as `assigned` unless each of these answers comes by the way that it was asked for by, and `Unfit` for
        relays on it that cannot have made this update of several."""
        for answer in answers:
            self.assigned(child, parcel.run, answer.site)
        if len({answer.site for answer in answers}) < len(answers):
            raise Unfit(f"{child}: a sum holds a site twice; update the relay")
        for answer in answers:
            way, via = self._way(parcel.run, answer.site), answer.via
            at = way.index(via[0]) if via and via[0] in way[:-1] else len(way)
            one = bool(parcel.answers) == bool(via) and via[:1] == answers[0].via[:1]
            if not one or via != way[at : at + len(via)]:
                raise Unfit(f"{child}: says that {answer.site}'s update came by {list(via)}; it did not")

    def up_to(self, run: str, site: str, name: str) -> tuple[str, ...]:
        """Return the way to who is on the way to a site, or is that site itself."""
        way = self._way(run, site)
        return way[: way.index(name) + 1] if name in way else (name,)

    def children(self, sites: set[str]) -> set[str]:
        """Return by whom these sites are reached."""
        with self._turn:
            return {way[0] for run in self._given.values() for site, (way, _) in run.items() if site in sites}
