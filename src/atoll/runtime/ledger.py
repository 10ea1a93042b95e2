"""A site's privacy ledger at work: what a run reserves before it opens anything, and is charged before anything leaves.

The ledger is the fold of the site's journal, and is folded on before each decision: an owner may have released a run
from another process meanwhile. What is decided is journalled, on the disk, before it is acted upon.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from atoll.errors import Denied, Invalid
from atoll.journal import Entry
from atoll.policy.ledger import Ledger
from atoll.policy.promises import so_far
from atoll.spec.budget import Budget, Guarantee, PrivacyCharged, PrivacyEvent, PrivacyReleased, PrivacyReserved

KINDS = ("privacy.reserved", "privacy.charged", "privacy.released")


class Reading(Protocol):
    """A journal."""

    def entries(self, after: int = 0, kinds: Collection[str] = ()) -> Iterator[Entry]: ...


class LiveLedger:
    """Any thread may ask. ``record`` writes an event to the journal, and returns once it is on the disk."""

    def __init__(self, journal: Reading, record: Callable[[PrivacyEvent], object]) -> None:
        self._journal, self._record = journal, record
        self._turn = threading.Lock()
        self._folded, self._ledger = 0, Ledger()

    @property
    def ledger(self) -> Ledger:
        """The ledger as the journal has it now."""
        with self._turn:
            return self._now()

    def reserve(self, dataset: str, run: str, asked: Guarantee, budget: Budget | None) -> None:
        """Have a run's use reserved, unless it is. Raises `Denied` in words that tell what is left."""
        with self._turn:
            try:
                event = self._now().reserve(dataset, run, asked, budget)
            except Invalid as error:  # for this run here it is the last word, and others go on
                raise Denied(str(error)) from None
            if event is not None:
                self._record(event)

    def charge(self, dataset: str, run: str, steps: int, unit: str) -> None:
        """Have a run charged, unless it is, for all of its mechanism's steps so far, which were counted in this
        ``unit``. Returning means that what they made may leave. Raises `Denied` where so many, or those of such a unit,
        were not reserved."""
        whole = self.ledger.reserved(dataset, run)
        if whole is not None and unit != whole.unit:
            raise Denied(
                f"privacy of {dataset}: {run} reserved steps that hide a {whole.unit}, and what is to leave hides a "
                f"{unit or 'nothing'}; submit the job again"
            )
        if whole is not None and steps > whole.mechanism.steps:
            raise Denied(
                f"privacy of {dataset}: {run} reserved {whole.mechanism.steps} steps, and with those that were taken "
                f"again this would be step {steps}; submit the job again"
            )
        used = (0.0, 0.0) if whole is None else (so_far(whole, steps), whole.delta)  # the sum may take a while
        with self._turn:
            event = self._now().charge(dataset, run, *used, steps)
            if event is not None:
                self._record(event)

    def open_runs(self) -> tuple[str, ...]:
        """Return the runs that have something reserved."""
        return tuple(sorted({run for (_, run), account in self.ledger.accounts.items() if not account.over}))

    def release(self, run: str) -> bool:
        """Give back what a run that is over reserved and was not charged; tell whether it had reserved anything."""
        with self._turn:
            ledger = self._now()
            ended = [ledger.release(dataset, name) for dataset, name in ledger.accounts if name == run]
            for event in ended:
                if event is not None:
                    self._record(event)
        return any(event is not None for event in ended)

    def _now(self) -> Ledger:
        # One kind at a time, which the journal has an index of; what is asked in each round must not read all of it.
        new = (entry for kind in KINDS for entry in self._journal.entries(after=self._folded, kinds=(kind,)))
        for entry in sorted(new, key=lambda entry: entry.seq):
            if isinstance(entry.event, PrivacyReserved | PrivacyCharged | PrivacyReleased):
                self._ledger = self._ledger.after(entry.event)
            self._folded = entry.seq
        return self._ledger
