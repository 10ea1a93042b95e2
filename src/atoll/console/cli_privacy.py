"""Commands about privacy budgets: set a dataset's, see what runs used of it, give back what a lost run reserved."""

from typing import Annotated

import typer

from atoll.console.cli_policy import At, DatasetName
from atoll.console.cli_sites import data
from atoll.console.terminal import Json, of

app = typer.Typer(invoke_without_command=True)


@app.callback()
def privacy(context: typer.Context, at: At = None, as_json: Json = False) -> None:
    """Show what of each dataset's privacy budget runs used and reserved, and what is left, at this home's sites.

    It reads each site's own journal, whether the site runs or not.

    Example: atoll privacy --site zurich
    """
    if context.invoked_subcommand is not None:
        return
    from atoll.console import budgets
    from atoll.console.document import site_folder, site_folders
    from atoll.errors import NotFound

    home = of(context).home
    folders = [site_folder(home, at)] if at is not None else list(site_folders(home).values())
    if not folders:
        raise NotFound(f"site: {home} has none; make one by: atoll site add NAME")
    found = [one for folder in folders for one in budgets.read(folder)]
    of(context).emit(found, budgets.shown(found), as_json)


@app.command("release")
def release(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run.", show_default=False)],
    at: At = None,
    as_json: Json = False,
) -> None:
    """Give back what a run reserved at a site and was not charged, where no hub says any more that the run is over.

    What it was charged stays used. If it goes on after all, it is refused here.

    Example: atoll privacy release heart-1a2b3c4d
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.errors import NotFound
    from atoll.journal import Journal
    from atoll.runtime.ledger import LiveLedger

    folder = site_folder(of(context).home, at)
    path = folder / "journal.db"
    if not path.is_file():
        raise NotFound(f"{path}: there is no journal yet; run a job first")
    with Journal(path, folder.name) as journal:
        ledger = LiveLedger(journal, lambda event: journal.append(event, actor="owner"))
        if not ledger.release(run):
            known = ", ".join(ledger.open_runs()) or "no run"
            raise NotFound(f"run: {run!r} has nothing reserved at {folder.name}; {known} has")
    told = {"site": folder.name, "released": run}
    of(context).emit(told, text(f"{run} has nothing reserved at {folder.name} any more."), as_json)


@data.command("budget")
def budget(
    context: typer.Context,
    name: DatasetName,
    epsilon: Annotated[float | None, typer.Option(help="What all runs together may use.", show_default=False)] = None,
    delta: Annotated[float | None, typer.Option(help="Likewise; below one over the rows.", show_default=False)] = None,
    unit: Annotated[
        str, typer.Option(help="Whom runs have to hide: each record, or the whole site; none: no budget.")
    ] = "record",
    at: At = None,
    as_json: Json = False,
) -> None:
    """Say how much of a dataset's privacy training may use, in place of what was said before.

    Each run that trains on it must then promise some, and is refused where it does not fit into what is left. Below
    what is used already, nothing is left.

    Example: atoll data budget heart --epsilon 8 --delta 1e-5
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.data.catalogue import Catalogue
    from atoll.errors import Invalid
    from atoll.spec.budget import Budget
    from atoll.spec.document import parse

    given = [amount is not None for amount in (epsilon, delta)]
    if any(given) if unit == "none" else not all(given):
        raise Invalid("budget: is an epsilon and a delta; give --epsilon 8 --delta 1e-5, or --unit none and neither")
    asked = None if unit == "none" else parse(Budget, {"unit": unit, "epsilon": epsilon, "delta": delta}, "budget")
    folder = site_folder(of(context).home, at)
    dataset = Catalogue(folder).set_budget(name, asked)
    words = "has no privacy budget" if asked is None else f"has a budget of {asked}"
    of(context).emit(dataset, text(f"{name} at {folder.name} {words}."), as_json)
