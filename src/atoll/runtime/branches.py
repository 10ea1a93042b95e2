"""Sites that come to the hub through relays: their sessions within a relay's, and whose updates a relay is to sum.

A relay is believed about the sites that were invited to be behind it and about no other; who is, is the journal's word.
"""

import logging
import threading
from collections.abc import Callable

from atoll.boundary.channel import Desk, Send
from atoll.errors import Denied, Invalid
from atoll.runtime.quarantine import Quarantine
from atoll.runtime.reports import shortened
from atoll.runtime.state import State
from atoll.runtime.tree import Tree
from atoll.spec.event import Answer
from atoll.spec.message import Branch, Closed, Message, Opened, Relayed

log = logging.getLogger(__name__)


class Branches:
    """Every method may be called from any thread. ``tell(relay, message)`` reaches a relay, if it is here."""

    def __init__(self, tree: Tree, tell: Callable[[str, Message], None], desk: Desk) -> None:
        self._tree, self._tell, self._desk = tree, tell, desk
        self._turn = threading.Lock()
        self._open: dict[str, tuple[str, Send]] = {}  # site -> the relay that it came by, and what reaches it

    def heard(self, relay: str, message: Relayed, barred: str) -> None:
        """Take what a relay says of a site behind it; ``barred`` is why nothing of it counts, or ""."""
        site, said = message.site, message.message
        if barred or self._tree.behind(site) != relay:
            self._turn_away(relay, site, barred or f"{site}: was not invited to be behind {relay}")
        elif isinstance(said, Opened):
            self._begin(relay, site)
        elif isinstance(said, Closed):
            self.close(site, said.words)
        elif not self.here(site):
            self._turn_away(relay, site, f"{site}: has no session here; dial again")
        else:
            try:
                self._desk.heard(site, said)
            except (Denied, Invalid) as error:  # of one site: the relay and the others go on
                self.close(site, str(error))
                self._turn_away(relay, site, str(error))

    def _begin(self, relay: str, site: str) -> None:
        def send(message: Message) -> None:
            self._tell(relay, Relayed(site=site, message=message))

        with self._turn:
            self._open[site] = (relay, send)
        self._desk.opened(site, send)

    def close(self, site: str, words: str) -> None:
        """End a session that goes through a relay, if there is one."""
        with self._turn:
            _, send = self._open.pop(site, ("", None))
        if send is not None:
            self._desk.closed(site, send, words)

    def lost(self, relay: str, words: str) -> None:
        """End the sessions of all who are behind a relay; of those behind these in turn the desk is told by itself."""
        with self._turn:
            gone = [site for site, (by, _) in self._open.items() if by == relay]
        for site in gone:
            self.close(site, f"with the relay {relay}: {words}")

    def here(self, site: str) -> bool:
        """Tell whether a site has a session through a relay."""
        return site in self._open

    def carries(self, site: str, send: Send) -> bool:
        """Tell whether this very session goes through a relay."""
        return self._open.get(site, ("", None))[1] == send

    def _turn_away(self, relay: str, site: str, words: str) -> None:
        log.info("%s", words)
        self._tell(relay, Relayed(site=site, message=Closed(words=shortened(words))))

    # --- in whose name a relay brings and fetches

    def speaker(self, caller: str, site: str | None) -> str:
        """Return for whom a caller brings or fetches: a site behind it, or itself unless it is a relay, whose name in a
        stage is that of its sum. Raises `Denied`."""
        site = site or caller
        if site != caller and caller not in self._tree.way(site):
            raise Denied(f"{caller}: answers for {site!r}, which is not behind it; a site speaks for itself only")
        if self._tree.is_relay(site):
            raise Denied(f"{site}: is a relay, which has no part of its own in a run; submit the job again without it")
        return site

    def maker(self, caller: str, answers: tuple[Answer, ...]) -> str:
        """Return which relay made a sum that a caller brings: itself, or one behind it. Raises `Denied` unless it is
        one of sites behind that one, each once, each by relays on its way."""
        sites, maker = [answer.site for answer in answers], answers[0].via[:1]
        if len({*sites}) < len(sites):
            raise Denied(f"{caller}: a sum holds a site twice; update the relay")
        for answer in answers:
            way = self._tree.way(answer.site)
            at = way.index(maker[0]) if maker and maker[0] in way else len(way)
            if caller not in way[: at + 1] or not answer.via or answer.via != way[at : at + len(answer.via)]:
                raise Denied(f"{caller}: says that {answer.site}'s update came by {list(answer.via)}; it did not")
        return maker[0]


def summable(state: State) -> bool:
    """Tell whether updates of the current stage may be summed on their way: not where the merge takes single ones, and
    a buffer waits for single ones."""
    if state.work != "train" or state.plan is None or state.rule == "buffer":
        return False
    return state.plan.sync.singles is None


def on_way(tree: Tree, state: State, site: str, quarantine: Quarantine) -> tuple[Branch, ...]:
    """Return whose updates each relay on a site's way is to sum in this stage: of those that the hub would take. A
    relay that is not named passes them on one by one; so does one whose sum is here, for it makes one in a stage."""
    way = tree.way(site)
    if not way or not summable(state):
        return ()
    silent = (one for one in state.members if state.idle(one) and one not in state.spoiled | state.failed)
    waited = [one for one in silent if not quarantine.words(one)]
    return tuple(
        Branch(
            relay=relay,
            sites=tuple(one for one in waited if relay in tree.way(one)),
            counted=state.sums.get(relay),
        )
        for relay in way
        if not has_sum(state, relay)
    )


def has_sum(state: State, relay: str) -> bool:
    """Tell whether a relay's sum for the current stage is here, by itself or within another's; or what it brought
    while it was a site, which has the name that a sum would have."""
    return any(relay in (answer.site, *answer.via) for answer in (*state.arrived, *state.merging))
