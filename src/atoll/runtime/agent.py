"""A site's long-running process: dials the hub, answers for the owner's policy, and runs errands.

The agent holds the gate and the journal; workers hold neither. When the link breaks it dials again with backoff and
the hub repeats what it still waits for.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from atoll.boundary.channel import Desk
from atoll.boundary.gate import SiteGate
from atoll.boundary.identity import Identity
from atoll.data.live import LiveCatalogue
from atoll.journal import Journal
from atoll.policy.load import LivePolicy
from atoll.runtime import heap
from atoll.runtime.dialling import keep_dialling
from atoll.runtime.errand import Errand
from atoll.runtime.executor import Executor
from atoll.runtime.groups import Groups
from atoll.runtime.kept import kept_runs
from atoll.runtime.place import Place
from atoll.spec.event import Event
from atoll.spec.fleet import Site
from atoll.spec.message import Ask, Assign, Decisions, Hello, Message, Notice, Release, Welcome

_POLL = 1.0  # seconds the agent listens before it looks whether it should stop
_END = 6.0  # seconds that all errands together have to end; a hub gives its sites 8
_RUNS = 10_000  # that a hello may name; the others are named once these are gone
log = logging.getLogger(__name__)


class Agent:
    """One site. `home` is its folder: site.yaml, policy.cedar, catalogue, journal, code, runs."""

    def __init__(self, site: Site, home: Path, executor: Executor) -> None:
        heap.keep_freed()
        self._journal = Journal(home / "journal.db", site.name)
        policy = LivePolicy(home / "policy.cedar", site.name)

        def record(*events: Event) -> object:
            return self._journal.append(*events, actor=site.name)

        self._gate = SiteGate(site.name, policy.rules, record)
        self._groups = Groups(executor, home / "workers")
        self._place = Place(site, home, self._gate, self._groups, LiveCatalogue(home))
        self._errands: dict[str, Errand] = {}
        self._ending: dict[str, Errand] = {}  # released, and not gone yet
        self._stop = threading.Event()

    def serve(self, address: str, proof: Callable[[], Identity | str], calm: Callable[[], None] = lambda: None) -> None:
        """Dial ``address`` and work until `stop`.

        ``proof`` gives, for each dial, the identity of a site that joined or the secret of one that the hub started;
        ``calm`` is called about once a second. Raises `Denied` when the hub does not admit this site.
        """
        keep_dialling(self._gate, address, proof, lambda: self._session(calm), self._stop)
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
        for errand in self._errands.values():
            errand.end(keep=True)
        until = time.monotonic() + _END
        for run, errand in [*self._errands.items(), *self._ending.items()]:
            if not errand.wait(max(0.0, until - time.monotonic())):
                log.warning("run %s: its work did not end in %g s; it ends with this process", run, _END)
        self._errands.clear()
        self._ending.clear()
        self._groups.close()
        self._gate.hang_up()
        self._journal.close()

    def _session(self, calm: Callable[[], None] = lambda: None) -> None:
        told = self._described()
        while not self._stop.is_set():
            calm()
            message = self._gate.listen(_POLL)
            if message is not None:
                self._handle(message)
            elif self._described() != told:  # the owner added or took away a dataset
                told = self._described()
                self._gate.say(Hello(site=told))

    def _described(self) -> Site:
        return self._place.site.model_copy(update={"datasets": self._place.catalogue.datasets()})

    def _handle(self, message: Message) -> None:
        match message:
            case Welcome():
                # The session is open: measure the link, and say again what is here, now with its price. Of the runs
                # that have a folder the hub releases those that ended while this site was away.
                self._gate.say(Hello(site=self._described(), link=self._gate.measure(), runs=self._kept()[:_RUNS]))
            case Ask():
                if any(request.job_kind != "query" for request in message.requests):
                    self._groups.warm()  # what a run will wait for
                decisions = tuple(self._gate.decide(request) for request in message.requests)
                self._gate.say(Decisions(number=message.number, decisions=decisions))
            case Assign():
                if message.run not in self._errands:
                    self._errands[message.run] = self._errand(message.run)
                self._errands[message.run].assign(message)
            case Release():
                self._release(message.run, message.made)
            case Notice():
                log.error("the hub says: %s", message.words)
            case _:
                log.warning("a message of kind %s is not for a site", message.kind)

    def _kept(self) -> tuple[str, ...]:
        return kept_runs(self._place.home / "runs")

    def _errand(self, run: str) -> Errand:
        return Errand(self._place, run, before=self._ending.get(run))

    def _release(self, run: str, made: bool) -> None:
        """End a run's work and drop what was kept of it, in its errand's own time, but for the personal tensors of a
        model that it made. A run that this process has not
        worked on has an errand only to drop its folder, which is one of those listed here: no other name is a path."""
        self._ending = {name: errand for name, errand in self._ending.items() if not errand.ended}
        errand = self._errands.pop(run, None)
        if errand is None and run in self._kept() and run not in self._ending:
            errand = self._errand(run)
        if errand is not None:
            errand.end(keep=False, made=made)
            self._ending[run] = errand
