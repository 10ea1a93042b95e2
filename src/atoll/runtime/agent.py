"""A site's long-running process: dials the hub, answers for the owner's policy, and runs errands.

The agent holds the gate and the journal; workers hold neither. When the link breaks it dials again with backoff and
the hub repeats what it still waits for.
"""

import logging
import random
import threading
from pathlib import Path

from atoll.boundary.channel import Desk
from atoll.boundary.gate import SiteGate
from atoll.data.catalogue import Catalogue
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.journal import Journal
from atoll.policy.load import LivePolicy
from atoll.runtime.errand import Errand
from atoll.runtime.executor import Executor
from atoll.runtime.groups import Groups
from atoll.spec.event import Event
from atoll.spec.fleet import Site
from atoll.spec.message import Ask, Assign, Decisions, Failure, Hello, Message, Refusal, Release, Welcome

_POLL = 1.0  # seconds the agent listens before it looks whether it should stop
_BACKOFF = (0.1, 5.0)  # seconds between two attempts to dial: from, up to
log = logging.getLogger(__name__)


class Agent:
    """One site. `home` is its folder: site.yaml, policy.cedar, catalogue, journal, code, runs."""

    def __init__(self, site: Site, home: Path, executor: Executor) -> None:
        self._site, self._home = site, home
        self._catalogue = Catalogue(home)
        self._journal = Journal(home / "journal.db", site.name)
        policy = LivePolicy(home / "policy.cedar", site.name)

        def record(*events: Event) -> object:
            return self._journal.append(*events, actor=site.name)

        self._gate = SiteGate(site.name, policy.rules, record)
        self._groups = Groups(executor, home / "workers")
        self._errands: dict[str, Errand] = {}
        self._stop = threading.Event()

    def serve(self, address: str, secret: str, token: str | None = None) -> None:
        """Dial ``address`` and work until `stop`. Raises `Denied` when the hub does not admit this site."""
        wait = _BACKOFF[0]
        while not self._stop.is_set():
            try:
                self._gate.dial(address, secret, token)
                token = None  # it was for the first time; the secret is known now
                wait = _BACKOFF[0]
                self._session()
            except LinkLost as error:
                log.info("%s; dialling again in %.1f s", error, wait)
                self._stop.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads the sites, guards nothing
                wait = min(2 * wait, _BACKOFF[1])
        self.close()

    def serve_desk(self, desk: Desk) -> None:
        """Work for a hub in this process until `stop`."""
        self._gate.attach(desk)
        try:
            self._session()
        finally:
            self.close()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """End every worker and the session; nothing of this site is left running."""
        self._stop.set()
        for errand in list(self._errands.values()):
            errand.end(keep=True)
        self._errands.clear()
        self._groups.close()
        self._gate.hang_up()
        self._journal.close()

    def _session(self) -> None:
        told = self._described()
        while not self._stop.is_set():
            message = self._gate.listen(_POLL)
            if message is not None:
                self._handle(message)
            elif self._described() != told:  # the owner added or took away a dataset
                told = self._described()
                self._gate.say(Hello(site=told))

    def _described(self) -> Site:
        return self._site.model_copy(update={"datasets": self._catalogue.datasets()})

    def _handle(self, message: Message) -> None:
        match message:
            case Welcome():
                # The session is open: measure the link, and say again what is here, now with its price.
                self._gate.say(Hello(site=self._described(), link=self._gate.measure()))
            case Ask():
                decisions = tuple(self._gate.decide(request) for request in message.requests)
                self._gate.say(Decisions(number=message.number, decisions=decisions))
            case Assign():
                self._assign(message)
            case Release():
                errand = self._errands.pop(message.run, None)
                if errand is not None:
                    errand.end(keep=False)
            case _:
                log.warning("a message of kind %s is not for a site", message.kind)

    def _assign(self, assign: Assign) -> None:
        try:
            errand = self._errands.get(assign.run)
            if errand is None:
                errand = Errand(self._site, self._home, self._gate, self._groups, assign.run)
                self._errands[assign.run] = errand
            errand.assign(assign)
        except Invalid as error:
            log.warning("%s", error)
        except Denied as error:
            self._gate.say(Refusal(run=assign.run, words=str(error)))
        except (AtollError, OSError) as error:
            kind = type(error).__name__ if isinstance(error, AtollError) else "Unavailable"
            self._gate.say(Failure(run=assign.run, position=assign.position, words=str(error), error=kind))
