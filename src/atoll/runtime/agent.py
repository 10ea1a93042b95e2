"""A site's long-running process: dials the hub, answers for the owner's policy, and runs errands.

The agent holds the gate and the journal; workers hold neither. When the link breaks it dials again with backoff and
the hub repeats what it still waits for.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from atoll.boundary.channel import Desk
from atoll.boundary.gate import SiteGate
from atoll.boundary.identity import Identity
from atoll.data.live import LiveCatalogue
from atoll.errors import AtollError, Unavailable
from atoll.journal import Journal
from atoll.policy.load import LivePolicy
from atoll.runtime import heap
from atoll.runtime.concealing import Concealing
from atoll.runtime.dialling import keep_dialling
from atoll.runtime.errand import Errand
from atoll.runtime.executor import Executor
from atoll.runtime.groups import Groups
from atoll.runtime.kept import kept_runs
from atoll.runtime.ledger import LiveLedger
from atoll.runtime.peers import Peers
from atoll.runtime.place import Place
from atoll.runtime.reports import shortened
from atoll.runtime.reviews import Reviews
from atoll.runtime.witnessing import EVERY, Witness
from atoll.spec.event import Event
from atoll.spec.fleet import Site
from atoll.spec.message import Ask, Assign, Decisions, Hello, Message, Notice, Refusal, Release, SumTold, Welcome
from atoll.spec.record import Attest, Attested, Cosigned

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

        self._record = record
        self._gate = SiteGate(site.name, policy.rules, record)
        self._groups = Groups(executor, home / "workers")
        key, runs = self._journal.signer, home / "runs"
        self._concealing = Concealing(site.name, key, Peers(home), runs, self._gate.say)
        ledger, reviews = LiveLedger(self._journal, record), Reviews(home, self._journal, record)
        catalogue = LiveCatalogue(home)
        self._place = Place(site, home, self._gate, self._groups, catalogue, self._concealing, ledger, reviews)
        self._errands: dict[str, Errand] = {}
        self._ending: dict[str, Errand] = {}  # released, and not gone yet
        self._witness, self._hub = Witness(home / "witness", self._journal), "hub"  # as what its journal is remembered
        self._look = math.inf  # when the hub's journal is looked at next
        self._dispute = ""  # why nothing is done for this hub
        self._stop = threading.Event()

    def serve(self, address: str, proof: Callable[[], Identity | str], calm: Callable[[], None] = lambda: None) -> None:
        """Dial ``address`` and work until `stop`.

        ``proof`` gives, for each dial, the identity of a site that joined or the secret of one that the hub started;
        ``calm`` is called about once a second. Raises `Denied` when the hub does not admit this site.
        """

        def proven() -> Identity | str:
            found = proof()
            self._hub = found.peer.hub if isinstance(found, Identity) else "hub"
            return found

        keep_dialling(self._gate, address, proven, lambda: self._session(calm), self._stop)
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
        told, self._look, self._dispute = self._described(), math.inf, ""
        while not self._stop.is_set():
            calm()
            if time.monotonic() > self._look:
                self._look_at_journal()
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
                self._gate.beyond = message.region
                self._look_at_journal()  # before a hub that hears hello gives us work
                # The session is open: measure the link, and say again what is here, now with its price. Of the runs
                # that have a folder, or privacy reserved, the hub releases those that ended while this site was away.
                runs = tuple(dict.fromkeys((*self._place.ledger.open_runs(), *self._kept())))[:_RUNS]
                self._gate.say(Hello(site=self._described(), link=self._gate.measure(), runs=runs))
            case Ask():
                if not message.explain and any(request.job_kind != "query" for request in message.requests):
                    self._groups.warm()  # what a run will wait for
                if any(request.promise and not request.promise.empty for request in message.requests):
                    threading.Thread(target=self._answer, args=(message,), daemon=True, name="counting").start()
                else:
                    self._gate.say(self._answers(message))
            case Assign() if self._dispute:
                self._gate.say(Refusal(run=message.run, words=shortened(f"{self._place.site.name}: {self._dispute}")))
            case Assign():
                if message.run not in self._errands:
                    self._errands[message.run] = self._errand(message.run)
                self._errands[message.run].assign(message)
            case Release():
                self._release(message.run, message.made)
                self._look_at_journal()  # how it ended is witnessed
            case _:
                self._handle_word(message)

    def _handle_word(self, message: Message) -> None:
        """Take what gives the site no work."""
        match message:
            case Notice():
                log.error("the hub says: %s", message.words)
            case SumTold():
                self._concealing.heard(message)
            case Attest() | Attested() | Cosigned():
                self._witnessed(message)
            case _:
                log.warning("a message of kind %s is not for a site", message.kind)

    def _look_at_journal(self) -> None:
        self._look = time.monotonic() + EVERY
        if (asked := self._witness.ask(self._hub)) is not None:
            self._gate.say(asked)

    def _witnessed(self, message: Attest | Attested | Cosigned) -> None:
        """Show the hub our journal, and take a look at its own. For a hub that changed its journal nothing is done."""
        judged = self._witness.heard(self._hub, "hub", message)
        if judged.answer is not None:
            self._gate.say(judged.answer)
        if judged.dispute is not None:
            file = self._witness.file(self._hub)
            self._dispute = f"{judged.dispute.words}; ask the hub's owner why, and remove {file} to accept it as it is"
            log.error("%s", self._dispute)
            try:
                self._record(judged.dispute)
            except Unavailable as error:  # no room on the disk: nothing is done for this hub all the same
                log.error("%s", error)

    def _answer(self, asked: Ask) -> None:
        """Answer in a thread of its own what takes seconds to count, so that other runs' messages need not wait."""
        try:
            self._gate.say(self._answers(asked))
        except AtollError as error:  # the link is lost, and with it who asked
            log.info("question %d: %s", asked.number, error)

    def _answers(self, asked: Ask) -> Decisions:
        answer = self._place.account if asked.explain else self._place.answer
        accounts = tuple(answer(request) for request in asked.requests)
        return Decisions(
            number=asked.number,
            decisions=tuple(account.decision for account in accounts),
            rules=tuple(account.rules for account in accounts) if asked.explain else (),
            guarantees=tuple(account.guarantee for account in accounts),
        )

    def _kept(self) -> tuple[str, ...]:
        return kept_runs(self._place.home / "runs")

    def _errand(self, run: str) -> Errand:
        return Errand(self._place, run, before=self._ending.get(run))

    def _release(self, run: str, made: bool) -> None:
        """End a run's work and drop what was kept of it, in its errand's own time, but for the personal tensors of a
        model that it made. A run that this process has not
        worked on has an errand only to drop its folder, which is one of those listed here: no other name is a path."""
        self._ending = {name: errand for name, errand in self._ending.items() if not errand.ended}
        self._concealing.drop(run)
        errand = self._errands.pop(run, None)
        if errand is None and run in self._kept() and run not in self._ending:
            errand = self._errand(run)
        if errand is not None:
            errand.end(keep=False, made=made)
            self._ending[run] = errand
        try:
            self._place.ledger.release(run)
        except Unavailable as error:  # no room on the disk: it counts as used until the hub is dialled again
            log.error("run %s: what it reserved is not given back yet: %s", run, error)
