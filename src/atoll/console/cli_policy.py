"""Commands about rules and grants: check a file, explain a job, try rules on the past, grant and withdraw a purpose."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.console.cli_jobs import JobFile
from atoll.console.cli_sites import data
from atoll.console.terminal import Json, Overrides, of, say

app = typer.Typer(no_args_is_help=True, help="Check rules, explain them, and try them on the past.")
PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Rules in Cedar.", show_default=False)]
DatasetName = Annotated[str, typer.Argument(metavar="NAME", help="What jobs call the dataset.", show_default=False)]
Purpose = Annotated[str, typer.Argument(metavar="PURPOSE", help="What for.", show_default=False)]
At = Annotated[str | None, typer.Option("--site", help="The site; by default this home's only one.")]


@app.command()
def check(file: PolicyFile, as_json: Json = False) -> None:
    """Check a policy file against Atoll's schema before it is put in force, and warn of rules that may do nothing.

    A mistake is an error. A trap, above all a forbid that forbids nothing where it should, is a warning.

    Example: atoll policy check zurich.cedar
    """
    import json
    import sys

    from atoll.policy.load import load
    from atoll.policy.traps import traps

    rules = load(file, "check")
    found = traps(rules.policy.text)
    if as_json:
        sys.stdout.write(json.dumps({"file": str(file), "rules": rules.ids, "warnings": found}, indent=2) + "\n")
        return
    say(f"{file}: {len(rules.ids)} rules fit the schema: {', '.join(rules.ids)}")
    for words in found:
        say(f"warning: {words}")


@app.command()
def explain(context: typer.Context, job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what would happen to a job, rule by rule, at every point where a policy is asked. Nothing runs.

    The hub's rules and those of each site that has the data answer as they are now. A site decides again when it
    comes to it, by its rules of then.

    Example: atoll policy explain job.yaml
    """
    from atoll.console import rulings
    from atoll.console.document import load_job

    loaded = load_job(job, overrides or [])
    with of(context).hub(sites=True) as hub:
        found = hub.foresee(*loaded)
    of(context).emit(found, rulings.foreseen(found), as_json)


@app.command("dry-run")
def dry_run(
    context: typer.Context,
    file: PolicyFile,
    at: At = None,
    hub: Annotated[bool, typer.Option("--hub", help="Rules for this home's hub, not for a site.")] = False,
    run: Annotated[str | None, typer.Option(help="Only on this run; by default on all.")] = None,
    as_json: Json = False,
) -> None:
    """Try rules on the past: which runs would have been refused, or allowed, had they been in force.

    It reads the journal of a site of this home, or of its hub, as far as it tells what was asked. Nothing is changed.

    Example: atoll policy dry-run stricter.cedar --site zurich
    """
    from atoll.console import rulings
    from atoll.console.document import site_folder
    from atoll.errors import Invalid, NotFound
    from atoll.journal import Journal
    from atoll.policy.load import load
    from atoll.policy.replay import replay

    if hub and at is not None:
        raise Invalid(f"--site {at}: goes with a site's rules, and --hub with the hub's; give one of them")
    folder = of(context).home / "hub" if hub else site_folder(of(context).home, at)
    path = folder / "journal.db"
    if not path.is_file():
        raise NotFound(f"{path}: there is no journal yet; run a job first")
    with Journal(path, folder.name, read_only=True) as journal:
        entries = journal.entries(kinds=("decision", "crossing"), run=run)
        found = replay(((entry.time, entry.event) for entry in entries), load(file, folder.name))
    of(context).emit(found, rulings.replayed(found), as_json)


@data.command("grant")
def grant(
    context: typer.Context,
    name: DatasetName,
    purpose: Purpose,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="The grant's last day; by default it does not end.")
    ] = None,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Grant a dataset for a purpose, or give a grant another end. It holds from the next question on.

    Example: atoll data grant heart cardiology-research --until 2027-01-31
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.console.terms import end_of
    from atoll.data.catalogue import Catalogue

    folder = site_folder(of(context).home, at)
    dataset = Catalogue(folder).grant(name, purpose, end_of(until) if until else None)
    ends = f"until {dataset.until[purpose]:%Y-%m-%d %H:%M %Z}" if purpose in dataset.until else "without an end"
    of(context).emit(dataset, text(f"{name} at {folder.name} is granted for {purpose} {ends}."), as_json)


@data.command("require")
def require(
    context: typer.Context,
    name: DatasetName,
    steps: Annotated[
        list[str] | None, typer.Argument(metavar="[STEP]...", help="clip=1.0, int8; none: nothing.")
    ] = None,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Say what each update made of a dataset must pass through before it leaves, in place of what was said before.

    No job can do without: a plan adds it to the job's wire, and the site lets no other update out.

    Example: atoll data require heart clip=1.0 int8
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.console.terms import required
    from atoll.data.catalogue import Catalogue

    folder = site_folder(of(context).home, at)
    dataset = Catalogue(folder).require(name, required(steps or ()))
    what = f"updates pass through {', '.join(steps)}" if steps else "nothing is required of updates"
    of(context).emit(dataset, text(f"{name} at {folder.name}: {what}."), as_json)


@data.command("keep")
def keep(
    context: typer.Context,
    name: DatasetName,
    regions: Annotated[list[str] | None, typer.Argument(metavar="[REGION]...", help="None: anywhere.")] = None,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Say to which regions what is learned from a dataset may go. The hub says itself in which one it is.

    Example: atoll data keep heart ch eu
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.data.catalogue import Catalogue

    folder = site_folder(of(context).home, at)
    dataset = Catalogue(folder).keep_in(name, regions or ())
    where = f"only in {', '.join(regions)}" if regions else "anywhere"
    of(context).emit(dataset, text(f"{name} at {folder.name}: what is learned from it may go {where}."), as_json)


@data.command("withdraw")
def withdraw(context: typer.Context, name: DatasetName, purpose: Purpose, at: At = None, as_json: Json = False) -> None:
    """Take a grant back. A run for that purpose is refused at its next question, in mid-run too.

    Example: atoll data withdraw heart cardiology-research
    """
    from atoll.console.document import site_folder
    from atoll.console.show import text
    from atoll.data.catalogue import Catalogue

    folder = site_folder(of(context).home, at)
    dataset = Catalogue(folder).withdraw(name, purpose)
    of(context).emit(dataset, text(f"{name} at {folder.name} is not granted for {purpose} any more."), as_json)
