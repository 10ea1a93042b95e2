"""The privacy ledger of a site's datasets: what runs reserved, were charged and gave back; the fold of its journal.

Each method that changes something returns the event to journal and changes nothing itself: `Ledger.after` folds it in.
So a site that dies between two steps has counted what its journal holds. A reservation counts whole until it is
released, a charge is written before what it pays for leaves, and nothing ever takes a charge back.

Runs add up by basic composition, epsilons and deltas each by themselves, which holds for runs that are chosen by what
earlier ones showed as long as the budget is fixed (Rogers et al., 2016), and whatever accountant counted each of them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from atoll.errors import Denied, Invalid
from atoll.spec.budget import (
    Budget,
    DatasetUse,
    Guarantee,
    PrivacyCharged,
    PrivacyEvent,
    PrivacyReleased,
    PrivacyReserved,
    RunUse,
)

_SLACK = 1 + 1e-9  # ten times 0.1 is a budget of 1
_ONE = math.nextafter(1.0, 0.0)  # the most that a delta can be


@dataclass(frozen=True, slots=True)
class Account:
    """One run's use of one dataset. What counts is what it reserved, and once it is over what it was charged."""

    reserved: Guarantee
    epsilon: float = 0.0  # charged so far
    delta: float = 0.0
    steps: int = 0  # of its mechanism, that these are of
    over: bool = False

    @property
    def counts(self) -> tuple[float, float]:
        return (self.epsilon, self.delta) if self.over else (self.reserved.epsilon, self.reserved.delta)


@dataclass(frozen=True, slots=True)
class Ledger:
    """Every account, by dataset and run."""

    accounts: Mapping[tuple[str, str], Account] = field(default_factory=dict[tuple[str, str], Account])

    def used(self, dataset: str) -> tuple[float, float]:
        """Return the epsilon and delta of a dataset that are used or reserved."""
        counts = [account.counts for (name, _), account in self.accounts.items() if name == dataset]
        return math.fsum(epsilon for epsilon, _ in counts), math.fsum(delta for _, delta in counts)

    def use(self, site: str, dataset: str, budget: Budget | None) -> DatasetUse:
        """Return what became of a dataset's budget, for people."""
        runs = {run: account for (name, run), account in self.accounts.items() if name == dataset}
        taken, taken_delta = self.used(dataset)
        used = math.fsum(account.epsilon for account in runs.values())
        return DatasetUse(
            site=site,
            dataset=dataset,
            budget=budget,
            epsilon=used,
            delta=min(math.fsum(account.delta for account in runs.values()), _ONE),
            reserved=max(0.0, taken - used),
            left=max(0.0, budget.epsilon - taken) if budget is not None else None,
            left_delta=max(0.0, budget.delta - taken_delta) if budget is not None else None,
            runs=tuple(
                RunUse(
                    run=run,
                    reserved=account.reserved,
                    epsilon=account.epsilon,
                    delta=account.delta,
                    steps=account.steps,
                    over=account.over,
                )
                for run, account in runs.items()
            ),
        )

    def reserved(self, dataset: str, run: str) -> Guarantee | None:
        """Return what a run that goes on has reserved."""
        account = self.accounts.get((dataset, run))
        return account.reserved if account is not None and not account.over else None

    def overdrawn(self, dataset: str, run: str, asked: Guarantee | None, budget: Budget | None) -> dict[str, str]:
        """Return what of a run, that has reserved nothing yet, does not fit into the budget, each with why in words.

        Without a budget all fits. Where there is one, a run that promises nothing uses more than any has.
        """
        if budget is None:
            return {}
        about = f"privacy of {dataset}"
        if asked is None:
            return {
                "promise": f"{about}: it has a budget of epsilon {budget.epsilon:g}, and {run} promises nothing; "
                "set privacy: {epsilon, delta}, or clip and noise on the wire"
            }
        if budget.unit == "site" and asked.unit == "record":
            return {"unit": f"{about}: its budget is of the site, and {run} hides single records only; hide the site"}
        epsilon, delta = self.used(dataset)
        return {
            name: f"{about}: {run} needs {name} {more:g}, and of {most:g} there is {max(0.0, most - used):g} left; "
            "use more noise or fewer steps"
            for name, used, more, most in (
                ("epsilon", epsilon, asked.epsilon, budget.epsilon),
                ("delta", delta, asked.delta, budget.delta),
            )
            if math.fsum((used, more)) > most * _SLACK
        }

    def reserve(self, dataset: str, run: str, asked: Guarantee, budget: Budget | None) -> PrivacyReserved | None:
        """Return the reservation to journal; None where this run has this very one already.

        A run is written down without a budget, too: one that is set later knows of it. Raises `Denied` for a promise
        about another unit than the budget's and for what does not fit into what is left of it; `Invalid` for a run that
        has another reservation, or is over.
        """
        before = self.accounts.get((dataset, run))
        if before is not None:
            if before.over or before.reserved != asked:
                said = "is over" if before.over else f"reserved epsilon {before.reserved.epsilon:g}"
                raise Invalid(f"privacy of {dataset}: {run} {said}; submit the job again")
            return None
        if short := self.overdrawn(dataset, run, asked, budget):
            raise Denied(next(iter(short.values())))
        return PrivacyReserved(dataset=dataset, run=run, guarantee=asked)

    def charge(self, dataset: str, run: str, epsilon: float, delta: float, steps: int = 0) -> PrivacyCharged | None:
        """Return what to journal before something that brings a run's use to this in all leaves; None where so much
        is charged already. Raises `Denied` where the run has not reserved it."""
        account = self._open(dataset, run)
        if epsilon <= account.epsilon and delta <= account.delta and steps <= account.steps:
            return None
        for name, used, most in (
            ("epsilon", epsilon, account.reserved.epsilon),
            ("delta", delta, account.reserved.delta),
        ):
            if not 0 <= used <= most * _SLACK:
                raise Denied(
                    f"privacy of {dataset}: {run} would use {name} {used:g} and reserved {most:g}; it stops here"
                )
        most = (max(epsilon, account.epsilon), max(delta, account.delta), max(steps, account.steps))
        return PrivacyCharged(dataset=dataset, run=run, epsilon=most[0], delta=most[1], steps=most[2])

    def release(self, dataset: str, run: str) -> PrivacyReleased | None:
        """Return what to journal when a run has ended, in whatever way; None where it is over or reserved nothing."""
        account = self.accounts.get((dataset, run))
        return PrivacyReleased(dataset=dataset, run=run) if account is not None and not account.over else None

    def after(self, event: PrivacyEvent) -> "Ledger":
        """Return the ledger with one more entry of its journal; raise `Invalid` for one that cannot follow."""
        key = (event.dataset, event.run)
        match event:
            case PrivacyReserved():
                if key in self.accounts:
                    raise Invalid(f"privacy of {event.dataset}: {event.run} reserves twice; verify the journal")
                account = Account(event.guarantee)
            case PrivacyCharged():
                before = self._account(*key)  # over, too: whoever released it crossed with what left
                if event.epsilon < before.epsilon or event.delta < before.delta:
                    raise Invalid(f"privacy of {event.dataset}: {event.run} is charged less; verify the journal")
                account = replace(before, epsilon=event.epsilon, delta=event.delta, steps=event.steps)
            case PrivacyReleased():
                account = replace(self._account(*key), over=True)
        return Ledger({**self.accounts, key: account})

    def _open(self, dataset: str, run: str) -> Account:
        account = self._account(dataset, run)
        if account.over:
            raise Denied(f"privacy of {dataset}: {run} is over, so nothing of it may leave; submit the job again")
        return account

    def _account(self, dataset: str, run: str) -> Account:
        account = self.accounts.get((dataset, run))
        if account is None:
            raise Denied(f"privacy of {dataset}: {run} reserved nothing, so nothing of it may leave; submit it again")
        return account


def folded(events: Iterable[PrivacyEvent]) -> Ledger:
    """Return the ledger that a journal's entries come to."""
    ledger = Ledger()
    for event in events:
        ledger = ledger.after(event)
    return ledger
