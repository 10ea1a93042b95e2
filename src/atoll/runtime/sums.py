"""The hub's part in secure sums: it passes on what the sites say to each other, and takes the masks off the sum.

All of it is in memory. When the hub dies, or a site of the sum begins anew, the sum is begun once more under a higher
epoch: the sites keep what they trained, and only mask and send it again.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from atoll.errors import Corrupt, Denied, Invalid, Unavailable
from atoll.outer.secret import Circle, Hidden, check_keys, unmasking
from atoll.runtime.concealing import terms_of
from atoll.runtime.peers import check_signed
from atoll.runtime.state import State
from atoll.spec.event import Answer, Broken, Event, Restarted
from atoll.spec.job import TrainJob
from atoll.spec.message import Message, SumSaid, SumTold
from atoll.spec.secret import Agreed, Dealt, Everyone, Inbox, Keys, Signed, Terms, There, Told, Unsealed

_TRIES = 4  # at one round's sum
_SEAL = 15.0  # seconds that sites have for their shares, where the round's rule does not wait for all
_OPEN = 30.0  # seconds that those who are here have for each of the last two steps
_LOOK = 0.05  # seconds between two looks whether they still are
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sum:
    terms: Terms
    all: bool  # whether every site is waited for
    lapsed: bool = False  # whether the round goes on without those who are late
    keys: dict[str, Keys] = field(default_factory=dict[str, Keys])
    circle: Circle | None = None
    dealt: dict[str, Dealt] = field(default_factory=dict[str, Dealt])
    sealed: bool = False  # all shares that will be are here, and at their holders
    there: tuple[str, ...] | None = None
    agreed: dict[str, Agreed] = field(default_factory=dict[str, Agreed])
    unsealed: dict[str, Unsealed] = field(default_factory=dict[str, Unsealed])


class Sums:
    """The newest sum of each run under way. Any thread may call."""

    def __init__(
        self, tell: Callable[[str, Message], None], here: Callable[[str], bool], post: Callable[[Event], None]
    ) -> None:
        """``tell(site, message)`` reaches a site that is ``here(site)``; ``post`` hands an event to the run."""
        self._tell, self._here, self._post = tell, here, post
        self._turn = threading.Condition()
        self._sums: dict[str, _Sum] = {}
        self._tries: dict[tuple[str, int], int] = {}

    def begin(self, state: State) -> tuple[str, ...]:
        """Return whose updates the current stage is to add up: those who have not left the run."""
        assert state.plan is not None
        assert isinstance(state.job, TrainJob)
        sites = state.members
        with self._turn:
            found = self._sums.get(state.run)
            if found is not None and (found.terms.position, found.terms.attempt) == (state.position, state.epoch):
                return found.terms.sites
            terms = terms_of(state.run, state.position, state.epoch, sites, state.plan.sync, state.job)
            self._sums[state.run] = _Sum(terms, state.rule == "all")
            self._tries = {
                key: count for key, count in self._tries.items() if key[0] != state.run or key[1] >= state.position
            }
            return sites

    def heard(self, site: str, message: SumSaid) -> None:
        """Take a site's word. Of a sum that is over, or that it has no part in, it is let go."""
        if message.said.site != site:
            raise Denied(f"{site}: speaks for {message.said.site!r}; a site speaks for itself only")
        with self._turn:
            found = self._sums.get(message.run)
            terms = found.terms if found is not None else None
            if found is None or terms is None or site not in terms.sites:
                log.info("%s: a word of a secure sum of run %s that it is not in", site, message.run)
                return
            if (terms.position, terms.attempt) != (message.position, message.attempt):
                log.info("%s: a word of a secure sum of run %s that is over", site, message.run)
                return
            match message.said:
                case Keys() as keys:
                    check_keys(terms, keys, check_signed)  # here the site is named, and no other one fails by it
                    self._keys(found, site, keys)
                case Dealt() as dealt:
                    self._dealt(found, site, dealt)
                case Agreed() as agreed if found.there is not None and site in found.there:
                    found.agreed[site] = agreed
                case Unsealed() as unsealed if found.there is not None and site in found.there:
                    found.unsealed[site] = unsealed
                case _:
                    log.info("%s: signs for a secure sum of run %s before it was asked to", site, message.run)
            self._turn.notify_all()

    def lapsed(self, run: str, position: int) -> None:
        """Hear that a round goes on without those who are late: so does its sum."""
        with self._turn:
            found = self._sums.get(run)
            if found is not None and found.terms.position == position:
                found.lapsed = True
                self._offer(found)

    def forget(self, run: str) -> None:
        """Drop what is kept of a run that is over."""
        with self._turn:
            self._sums.pop(run, None)
            self._tries = {key: count for key, count in self._tries.items() if key[0] != run}
            self._turn.notify_all()

    def _keys(self, found: _Sum, site: str, keys: Keys) -> None:
        if found.circle is None:
            found.keys[site] = keys
            self._offer(found)
        elif found.circle.keys.get(site) == keys:  # its link was lost, and what it was told perhaps with it
            self._say(found, site, Everyone(keys=tuple(found.circle.keys.values())))
            if found.sealed:
                self._say(found, site, Inbox(sealed=_inbox(found, site)))
        elif site in found.circle.keys:
            self._again(found, f"{site} has begun anew, and lost its secrets")

    def _dealt(self, found: _Sum, site: str, dealt: Dealt) -> None:
        if found.circle is None or site not in found.circle.keys or found.sealed:
            return
        if dealt.sealed.keys() != set(found.circle.near[site]):  # its masks and its neighbours' would not cancel out
            raise Invalid(f"{site}: dealt shares to others than its neighbours in the sum; look at what answers there")
        found.dealt.setdefault(site, dealt)
        self._seal(found)

    def _offer(self, found: _Sum) -> None:
        """Tell all who gave keys of each other, once all have, or after the deadline enough. From here on nobody else
        is in the sum."""
        due = found.terms.enough if found.lapsed else len(found.terms.sites)
        if found.circle is not None or len(found.keys) < due:
            return
        found.circle = Circle.of(found.terms, found.keys.values())
        for site in found.keys:
            self._say(found, site, Everyone(keys=tuple(found.keys.values())))
        if not found.all:
            timer = threading.Timer(_SEAL, self._late, (found,))
            timer.daemon = True
            timer.start()

    def _late(self, found: _Sum) -> None:
        with self._turn:
            if self._sums.get(found.terms.run) is found and not found.sealed:
                self._seal(found, late=True)

    def _seal(self, found: _Sum, late: bool = False) -> None:
        """Pass shares on once all are here; ``late``: those that are, if with them the sum can be opened at all."""
        assert found.circle is not None
        if len(found.dealt) < len(found.circle.keys) and not late:
            return
        if len(found.dealt) < found.terms.enough:
            self._again(found, f"{len(found.dealt)} of {len(found.circle.keys)} sites dealt shares in {_SEAL:g} s")
            return
        found.sealed = True
        for site in found.dealt:
            self._say(found, site, Inbox(sealed=_inbox(found, site)))

    # --- the sum ------------------------------------------------------------------------------------------------

    def unmasked(self, state: State, answers: Sequence[Answer]) -> Hidden | None:
        """Return the masks that are left on the sum of these answers' updates; None where it is begun once more."""
        with self._turn:
            found = self._sums.get(state.run)
            if found is None or (found.terms.position, found.terms.attempt) != (state.position, state.epoch):
                return None  # it was begun anew meanwhile
            circle, there = found.circle, tuple(sorted(answer.site for answer in answers))
            if circle is None or not found.sealed or not set(there) <= found.dealt.keys():
                self._again(found, "an update came from outside of the sum")
                return None
            if len(there) < found.terms.enough:
                self._again(found, f"{len(there)} updates are there, and {found.terms.enough} hide each other")
                return None
            found.there = there
            for site in there:
                self._say(found, site, There(sites=there))
            if not self._waited(found, found.agreed):
                return None
            if any(len(found.agreed.keys() & {*circle.holders(site)}) < circle.threshold for site in found.dealt):
                self._again(found, f"{len(found.agreed)} of {len(there)} sites have signed whose updates are there")
                return None
            for site in there:
                self._say(found, site, Signed(agreed=tuple(found.agreed.values())))
            if not self._waited(found, found.unsealed):
                return None
            try:
                masks = unmasking(circle, found.dealt, there, tuple(found.unsealed.values()))
            except Corrupt as error:
                self._again(found, str(error))
                return None
            return Hidden(found.terms, masks)

    def _waited(self, found: _Sum, said: dict[str, Agreed] | dict[str, Unsealed]) -> bool:
        """Wait until all whose updates are there have said it, but for those who have left since; False when the sum is
        over meanwhile."""
        assert found.there is not None
        until = time.monotonic() + _OPEN
        while time.monotonic() < until and self._sums.get(found.terms.run) is found:
            if all(site in said or not self._here(site) for site in found.there):
                break
            self._turn.wait(_LOOK)
        return self._sums.get(found.terms.run) is found

    def failed(self, state: State, words: str) -> None:
        """Hear that a sum is none, and have it begun once more."""
        with self._turn:
            found = self._sums.get(state.run)
            if found is not None and (found.terms.position, found.terms.attempt) == (state.position, state.epoch):
                self._again(found, words)

    def _again(self, found: _Sum, words: str) -> None:
        """Have the round's sum begun anew under a higher epoch, unless that was tried too often."""
        terms = found.terms
        del self._sums[terms.run]
        key = terms.run, terms.position
        self._tries[key] = tries = self._tries.get(key, 0) + 1
        log.warning("run %s: the secure sum of stage %d is begun anew: %s", terms.run, terms.position, words)
        if tries < _TRIES:
            self._post(Restarted(run=terms.run, missing=terms.sites))
        else:
            told = f"secure sum: it failed {tries} times, at last because {words}"
            self._post(Broken(run=terms.run, site="hub", words=told, error=Unavailable.__name__))

    def _say(self, found: _Sum, site: str, told: Told) -> None:
        terms = found.terms
        self._tell(site, SumTold(run=terms.run, position=terms.position, attempt=terms.attempt, told=told))


def _inbox(found: _Sum, site: str) -> dict[str, str]:
    return {dealer: dealt.sealed[site] for dealer, dealt in found.dealt.items() if site in dealt.sealed}
