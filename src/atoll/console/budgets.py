"""What runs used of datasets' privacy budgets: read from a site's own files, and as a table."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType

from atoll.console.show import number, table, text
from atoll.data.catalogue import Catalogue
from atoll.journal import Journal
from atoll.policy.ledger import Ledger
from atoll.runtime.ledger import LiveLedger
from atoll.spec.budget import Budget, DatasetUse

_WIDTH = 20


def read(folder: Path) -> list[DatasetUse]:
    """Return each dataset of the site in ``folder`` that has a budget, or of which a run used some."""
    catalogue, path = Catalogue(folder), folder / "journal.db"
    ledger = Ledger()
    if path.is_file():
        with Journal(path, folder.name, read_only=True) as journal:
            ledger = LiveLedger(journal, lambda event: None).ledger
    budgets: dict[str, Budget | None] = {name: None for name, _ in ledger.accounts}
    for dataset in catalogue.datasets():
        name, budget = catalogue.counted(dataset.name)
        if budget is not None or name in budgets:
            budgets[name] = budget
    return [ledger.use(folder.name, name, budget) for name, budget in sorted(budgets.items())]


def shown(found: Sequence[DatasetUse]) -> RenderableType:
    """A row for each dataset, with a bar of what is used, reserved and left, and one for each of its runs."""
    rows = [(one.dataset, one.site, _unit(one), *_amounts(one), _bar(one)) for one in found]
    columns = ("dataset", "site", "unit", ">budget", ">used", ">reserved", ">left", "")
    tables = [table("Privacy (epsilon)", columns, rows, "no dataset has a budget, and no run promised anything")]
    runs = [
        (one.dataset, one.site, run.run, "over" if run.over else "goes on", number(run.epsilon), str(run.reserved))
        for one in found
        for run in one.runs
    ]
    if runs:
        tables.append(table("Runs", ("dataset", "site", "run", "", ">used", "reserved"), runs))
    return Group(*tables)


def _unit(one: DatasetUse) -> str:
    return one.budget.unit if one.budget is not None else "-"


def _amounts(one: DatasetUse) -> tuple[str, ...]:
    budget = number(one.budget.epsilon) if one.budget is not None else "none"
    return (budget, number(one.epsilon), number(one.reserved), number(one.left))


def _bar(one: DatasetUse) -> object:
    if one.budget is None:
        return ""
    ends = [min(1.0, part / one.budget.epsilon) for part in (one.epsilon, one.epsilon + one.reserved)]
    used, taken = (math.ceil(_WIDTH * end) for end in ends)
    return text("█" * used + "▒" * (taken - used) + "·" * (_WIDTH - taken), "red" if one.left == 0 else "")
