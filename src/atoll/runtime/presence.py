"""Who is here: the sites' sessions, what sites say of themselves, and the runs that are told of it.

A site's coming or going and the word of it to its runs are one turn, in one order for all. So no run believes in a
site that has left, or waits for one that is here, however the ends and beginnings of sessions and a plan fall together.
"""

import hmac
import logging
import threading
from collections.abc import Callable

from atoll.boundary.channel import HEARTBEAT, Send
from atoll.errors import Denied, LinkLost
from atoll.runtime.conductor import Conductor
from atoll.runtime.quarantine import Quarantine
from atoll.runtime.reports import shortened
from atoll.runtime.tree import Tree
from atoll.spec.document import sha256
from atoll.spec.event import Barred, Connected, Disconnected, Joined, Lost, Quarantined
from atoll.spec.fleet import Fleet, Link, Site
from atoll.spec.message import Hello, Message, Notice, Welcome
from atoll.spec.run import SiteProgress

_QUARANTINE = "in quarantine"
_SHOWN = 100  # runs that are over whose last progress is kept, for their views
log = logging.getLogger(__name__)


class Presence:
    """Sessions by site. Every method may be called from any thread."""

    def __init__(
        self,
        conductor: Conductor,
        quarantine: Quarantine,
        tree: Tree,
        changed: Callable[[str], None],
        region: str = "here",
    ) -> None:
        self._conductor, self._quarantine, self._changed = conductor, quarantine, changed
        self._tree = tree
        self.region = region
        self._turn = threading.RLock()
        self._secrets: dict[str, str] = {}  # site -> digest of its secret
        self._sessions: dict[str, Send] = {}
        self._here: dict[str, tuple[Site, Link]] = {}
        self._known: dict[str, Site] = {}  # also who has just left: its last words are still judged
        self._progress: dict[str, dict[str, SiteProgress]] = {}

    # --- who may come in ----------------------------------------------------------------------------------------

    def trust(self, site: str, secret_digest: str) -> None:
        """Admit a site by the digest of its secret, in place of the one before."""
        self._secrets[site] = secret_digest

    def admits(self, site: str, secret: str) -> bool:
        known = self._secrets.get(site)
        return known is not None and hmac.compare_digest(known, sha256(secret.encode()))

    # --- coming and going ---------------------------------------------------------------------------------------

    def opened(self, site: str, send: Send) -> bool:
        """Begin a session; the site is here once it says hello. True when it took the place of an open one."""
        with self._turn:
            again = site in self._sessions  # not known to be dead yet: its work is given to this one
            if again:
                self._left(site, "it began another session")
            self._sessions[site] = send
        send(Welcome(heartbeat=HEARTBEAT, region=self.region))
        return again

    def closed(self, site: str, send: Send, words: str) -> bool:
        """End a session. False when a newer one has taken its place already."""
        with self._turn:
            if self._sessions.get(site) != send:
                return False
            del self._sessions[site]
            self._left(site, words)
        return True

    def hello(self, site: str, message: Hello) -> None:
        """Take what a site says of itself; with the first word of a session it is here, and its runs go on with it."""
        if message.site.name != site:
            raise Denied(f"{site}: says it is {message.site.name!r}; a site speaks for itself only")
        with self._turn:
            if site not in self._sessions:
                log.info("%s: a hello of a session that has ended", site)
                return
            link = message.link and message.link.model_copy(update={"site": site})
            link = link or self._here.get(site, (message.site, Link(site=site)))[1]
            new = site not in self._here
            joined = self._joining(site) if new else []
            self._here[site], self._known[site] = (message.site, link), message.site
            self._conductor.post(Connected(site=message.site, link=link), *joined, actor=site)
        if new and (barred := self._quarantine.words(site)):
            self.send(site, Notice(words=shortened(barred)))

    def _joining(self, site: str) -> list[Joined]:
        """Return what tells a site's runs that it is here for them; in quarantine it is for none."""
        runs, barred = self._runs(site), self._quarantine.words(site)
        for run in runs:
            self.note(run, site, SiteProgress(connected=True, state=_QUARANTINE if barred else "waiting"))
        return [] if barred else [Joined(run=run, site=site) for run in runs]

    def bar(self, event: Quarantined) -> None:
        """Have a site's runs do without it, once its quarantine is folded. `gather` tells those that come later."""
        with self._turn:
            barred = [Barred(run=run, site=event.site, words=event.words) for run in self._runs(event.site)]
            for one in barred:
                self.note(one.run, event.site, SiteProgress(connected=self.here(event.site), state=_QUARANTINE))
            if barred:
                self._conductor.post(*barred)
        self.send(event.site, Notice(words=shortened(event.words)))

    def release(self, site: str) -> None:
        """Have a site's runs go on with it, once its release is folded."""
        with self._turn:
            joined = self._joining(site) if self.here(site) else []
            if joined:
                self._conductor.post(*joined)

    def _left(self, site: str, words: str) -> None:
        if self._here.pop(site, None) is None or self._conductor.closing:
            return
        lost = [Lost(run=run, site=site) for run in self._runs(site)]
        for event in lost:
            self.note(event.run, site, SiteProgress(state="lost"))
        self._conductor.post(Disconnected(site=site, words=words), *lost, actor=site)

    def gather(self, run: str) -> None:
        """Tell a run that has just been planned or resumed which of its sites are here.

        To be called once it is folded: who came or left before is told of here, who does so later is told of by then.
        """
        with self._turn:
            if run not in self._conductor.here:  # another hub's, and it waits for `resume`
                return
            sites = self._conductor.states[run].everyone
            self._progress.pop(run, None)  # probes are over, also those of sites that the plan leaves out
            told: list[Barred | Joined] = []
            for site in sites:
                here, barred = self.here(site), self._quarantine.words(site)
                state = _QUARANTINE if barred else "waiting" if here else "lost"
                self.note(run, site, SiteProgress(connected=here, state=state))
                if barred:
                    told.append(Barred(run=run, site=site, words=barred))
                elif here:
                    told.append(Joined(run=run, site=site))
            if told:
                self._conductor.post(*told)

    def _runs(self, site: str) -> list[str]:
        """Return the runs under way here that this site has a part in; `gather` tells those that are being planned."""
        states = [self._conductor.states.get(run) for run in list(self._conductor.here)]
        return [state.run for state in states if state and state.phase == "running" and site in state.everyone]

    # --- who is here --------------------------------------------------------------------------------------------

    def here(self, site: str) -> bool:
        return site in self._here

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._here))

    def known(self, site: str) -> Site | None:
        return self._known.get(site)

    def fleet(self) -> Fleet:
        """Return the sites that are here and may have data: all but relays, which `relays` are."""
        return self._fleet(relays=False)

    def relays(self) -> Fleet:
        return self._fleet(relays=True)

    def _fleet(self, relays: bool) -> Fleet:
        with self._turn:
            present = [self._here[name] for name in sorted(self._here) if self._tree.is_relay(name) == relays]
        return Fleet(sites=tuple(site for site, _ in present), links=tuple(link for _, link in present))

    def send(self, site: str, message: Message) -> None:
        """Push a message; a site that is gone gets it again when it comes back, so a lost link is not an error."""
        send = self._sessions.get(site)
        if send is not None:
            try:
                send(message)
            except LinkLost:
                log.info("%s went away before a %s reached it", site, message.kind)

    # --- how far they are ---------------------------------------------------------------------------------------

    def note(self, run: str, site: str, progress: SiteProgress) -> None:
        """Keep what a run's view shows of a site: for every run under way, and for the newest that are over."""
        with self._turn:
            if run not in self._progress:
                over = [name for name in self._progress if self._over(name)]
                for name in over[: max(0, len(over) - _SHOWN)]:
                    del self._progress[name]
            self._progress.setdefault(run, {})[site] = progress
        self._changed(run)

    def progress(self, run: str) -> dict[str, SiteProgress]:
        with self._turn:
            return dict(self._progress.get(run, {}))

    def _over(self, run: str) -> bool:
        state = self._conductor.states.get(run)
        return state is None or state.over
