"""What sites were asked and have not answered yet: what their policies say, and what a probe of a task measures."""

import threading
from concurrent.futures import Future

from atoll.errors import AtollError, Invalid, LinkLost, Unavailable
from atoll.runtime.presence import Presence
from atoll.spec.event import Answer
from atoll.spec.message import Ask, Decisions
from atoll.spec.policy import Account, Decision, Request


class Questions:
    """Whoever asks waits for a future; a site's answer, its error, its leaving or the end of the run settles it."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence
        self._turn = threading.Lock()
        self._number = 0
        self._asked: dict[tuple[int, str], Future[tuple[Account, ...]]] = {}
        self._probes: dict[tuple[str, str], tuple[Future[Answer], str | None]] = {}

    def ask(self, site: str, requests: tuple[Request, ...], timeout: float) -> tuple[Account, ...]:
        """Put questions to a site's policy, which says also what it counts a run to cost. Raises `Unavailable` when no
        answer comes in time."""
        return self._ask(site, requests, timeout, explain=False)

    def accounts(self, site: str, requests: tuple[Request, ...], timeout: float) -> tuple[Account, ...]:
        """Have a site's policy answer rule by rule, for people: what is asked is not about to be done. Raises as `ask`
        does, and `Invalid` for answers to other questions."""
        found = self._ask(site, requests, timeout, explain=True)
        if len(found) != len(requests):
            raise Invalid(f"{site}: answered {len(found)} of {len(requests)} questions; update its agent")
        return found

    def _ask(self, site: str, requests: tuple[Request, ...], timeout: float, explain: bool) -> tuple[Account, ...]:
        future: Future[tuple[Account, ...]] = Future()
        with self._turn:
            self._number += 1
            key = (self._number, site)
            self._asked[key] = future
        self._presence.send(site, Ask(number=key[0], requests=requests, explain=explain))
        self._here(site)
        try:
            return future.result(timeout)
        except TimeoutError:
            raise Unavailable(f"{site}: its policy did not answer in {timeout:g} s; look at that site") from None
        finally:
            self._asked.pop(key, None)

    def decided(self, site: str, message: Decisions) -> None:
        """Take a policy's answers; in another party's name it gives none."""
        waiting = self._asked.pop((message.number, site), None)
        if waiting is not None:
            decisions = [_own(site, decision) for decision in message.decisions]
            rules = message.rules if len(message.rules) == len(decisions) else [()] * len(decisions)
            counted = message.guarantees if len(message.guarantees) == len(decisions) else [None] * len(decisions)
            told = zip(decisions, rules, counted, strict=True)
            waiting.set_result(tuple(Account(decision=d, rules=r, guarantee=g) for d, r, g in told))

    def expect_probe(self, run: str, site: str, code: str | None) -> "Future[Answer]":
        """Return where the answer to a probe of this run will be; until then the site may fetch ``code``."""
        future: Future[Answer] = Future()
        self._probes[run, site] = (future, code)
        self._here(site)
        return future

    def _here(self, site: str) -> None:
        """Once a question is written down, its site's leaving settles it; one that left before would leave it open."""
        if not self._presence.here(site):
            self.abandon(f"{site}: left; try again once it is back", site=site)

    def probing(self, run: str, site: str) -> bool:
        return (run, site) in self._probes

    def code(self, run: str, site: str) -> str | None:
        """Return the code that a probe under way at this site is of."""
        return self._probes.get((run, site), (None, None))[1]

    def measured(self, run: str, site: str, answer: Answer) -> bool:
        """Settle a probe with its answer; False when none was waiting."""
        future, _ = self._probes.pop((run, site), (None, None))
        if future is not None:
            future.set_result(answer)
        return future is not None

    def failed(self, run: str, site: str, error: AtollError) -> bool:
        """Settle a probe with an error; False when none was waiting."""
        future, _ = self._probes.pop((run, site), (None, None))
        if future is not None:
            future.set_exception(error)
        return future is not None

    def abandon(self, words: str, run: str | None = None, site: str | None = None) -> None:
        """Let nobody wait any longer for what this run, this site, or with neither anybody, was asked: `Unavailable`,
        for a site `LinkLost`, which may be asked again once it is back."""
        probes = [key for key in list(self._probes) if run in (None, key[0]) and site in (None, key[1])]
        asked = [key for key in list(self._asked) if run is None and site in (None, key[1])]
        gone = [self._probes.pop(key, (None, None))[0] for key in probes]
        for future in gone + [self._asked.pop(key, None) for key in asked]:
            if future is not None:
                future.set_exception(Unavailable(words) if site is None else LinkLost(words))


def _own(site: str, decision: Decision) -> Decision:
    if decision.party == site:
        return decision
    return Decision(allowed=False, party=site, reasons=(f"{site} refuses: it answered in another's name",))
