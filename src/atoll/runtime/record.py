"""What journals tell: whether they are whole, what crossed each border, what happened to a run, what was live when."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from atoll.errors import Corrupt, Denied, Invalid, NotFound
from atoll.journal import Entry, Journal
from atoll.runtime import vouched
from atoll.runtime.view import Borders, JournalLine, line, traffic
from atoll.spec.event import Retained
from atoll.spec.model import Aliased, Deployed, Erased, Undeployed
from atoll.spec.record import Live
from atoll.spec.run import Traffic, Verdict

Watch = Callable[[str, int], None]  # told of whose journal so many entries are verified


def opened(home: Path, owner: str, *, write: bool = False) -> Journal:
    """Open the journal of a home's hub, or of one of its sites, whether it runs or not. Raises `NotFound`."""
    known = _owners(home)
    if owner not in known:
        raise NotFound(f"site: {home} has no journal of {owner!r}; there is {', '.join(known) or 'none yet'}")
    return Journal(_path(home, owner), owner, read_only=not write)


def _path(home: Path, owner: str) -> Path:
    return home / "hub" / "journal.db" if owner == "hub" else home / "sites" / owner / "journal.db"


def verified(home: Path, watch: Watch) -> list[Verdict]:
    """Verify the journals in a home from their files alone. Raises `NotFound` where there is none."""
    owners = _owners(home)
    if not owners:
        raise NotFound(f"{home}: there is no journal here yet; check --home")
    return [_verified(home, owner, watch) for owner in owners]


def _verified(home: Path, owner: str, watch: Watch) -> Verdict:
    try:
        with opened(home, owner) as journal:
            return vouched.verify(home, journal, lambda seq: watch(owner, seq))
    except (Corrupt, Invalid) as error:  # no journal any more: the others are verified all the same
        return _unreadable(_path(home, owner), error)


def _unreadable(path: Path, error: Corrupt | Invalid) -> Verdict:
    return Verdict(journal=str(path), entries=0, intact=False, words=str(error))


def _owners(home: Path) -> list[str]:
    hub = ["hub"] if (home / "hub" / "journal.db").is_file() else []
    return [*hub, *(path.parent.name for path in sorted((home / "sites").glob("*/journal.db")))]


def live(entries: Iterable[Entry], at: float) -> list[Live]:
    """Return what was deployed, and what bore an alias, at a time by the writer's clock: in the order of the journal,
    which no clock can change."""
    deployed, named = dict[str, Live](), dict[tuple[str, str], Live]()
    for entry in entries:
        if entry.time > at:
            continue
        since = {"since": entry.time, "entry": entry.seq, "actor": entry.actor}
        match entry.event:
            case Deployed() as event:
                one = {"name": event.deployment.name, "model": event.deployment.model, **since}
                deployed[event.deployment.name] = Live.model_validate(one)
            case Undeployed() as event:
                deployed.pop(event.name, None)
            case Aliased() as event:
                one = {"name": event.model, "model": f"{event.model}@{event.version}", "alias": event.alias, **since}
                named[event.model, event.alias] = Live.model_validate(one)
            case Erased() as event:
                gone = f"{event.model}@{event.version}"
                named = {key: one for key, one in named.items() if one.model != gone}
            case _:
                pass
    return [*deployed.values(), *named.values()]


def what_was_live(home: Path, at: float) -> list[Live]:
    """Return `live` of a home's hub. Raises `Corrupt` at an entry that was edited."""
    with opened(home, "hub") as journal:
        kinds = ("deployment.started", "deployment.stopped", "model.aliased", "model.erased")
        return live(journal.entries(kinds=kinds), at)


def retain(home: Path, owner: str, until: float, user: str) -> float:
    """Have a journal keep its entries until a time; return until when it did so far, or 0.

    Nothing in Atoll drops entries. Raises `Denied` for a time before the one that holds, `Invalid` for one gone by.
    """
    with opened(home, owner, write=True) as journal:
        before = max((_until(entry) for entry in journal.entries(kinds=("journal.retained",))), default=0.0)
        if until < before:
            raise Denied(f"until: the journal of {owner} is kept longer already; what was promised cannot be shortened")
        if until <= time.time():
            raise Invalid("until: this time has gone by; give a later one")
        if until > before:
            journal.append(Retained(until=until, user=user), actor=user)
        return before


def _until(entry: Entry) -> float:
    return entry.event.until if isinstance(entry.event, Retained) else 0.0


class Record:
    """The hub's journal, and those of the sites that live in its home. ``known`` raises `NotFound` for no run."""

    def __init__(self, journal: Journal, home: Path, borders: Borders, known: Callable[[str], object]) -> None:
        self._journal, self._home, self._borders, self._known = journal, home, borders, known

    def verify(self) -> list[Verdict]:
        """Verify the hub's journal and those of the sites that live in this home."""
        sites = [owner for owner in _owners(self._home) if owner != "hub"]
        return [self._own(), *(_verified(self._home, owner, lambda *_: None) for owner in sites)]

    def _own(self) -> Verdict:
        try:
            return vouched.verify(self._home, self._journal)
        except Corrupt as error:
            return _unreadable(self._journal.path, error)

    def traffic(self, run: str | None = None) -> list[Traffic]:
        """Sum what crossed each border, as the hub recorded it; a site's refusals are in that site's journal."""
        if run is not None:
            self._known(run)
        sums = self._borders.of(self._journal, run)
        for owner in _owners(self._home):
            if owner != "hub":
                with opened(self._home, owner) as journal:
                    own = self._borders.of(journal, run)
                # An owner's own record of its border is the better one.
                sums = {border: sum_ for border, sum_ in sums.items() if border[0] != owner} | own
        return traffic(sums)

    def explain(self, run: str) -> list[JournalLine]:
        """Tell everything the hub's journal has of a run, in words."""
        self._known(run)
        return [line(entry) for entry in self._journal.entries(run=run)]
