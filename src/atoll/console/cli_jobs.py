"""Commands about jobs and runs: plan, run, resume, watch, cancel, query, what-if."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.console.terminal import Json, Overrides, Watch, exit_code, of, say

if TYPE_CHECKING:
    from atoll.console.client import Client
    from atoll.spec.job import Job
    from atoll.spec.model import Bundle
    from atoll.spec.run import RunView

PANEL = "Jobs"
JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job document (YAML).", show_default=False)]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `atoll runs` lists it.", show_default=False)]

app = typer.Typer()
runs = typer.Typer(invoke_without_command=True)
app.add_typer(runs, name="runs", rich_help_panel=PANEL)
sweep = typer.Typer(no_args_is_help=True)
app.add_typer(
    sweep, name="sweep", rich_help_panel=PANEL, help="Trials of a search for better values of a job's fields."
)


@app.command(rich_help_panel=PANEL)
def run(context: typer.Context, job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Plan a job, show the plan, carry it out, show the result. Ctrl-C cancels it.

    Example: atoll run job.yaml --set sync.period=20
    """
    from atoll.console.document import load_job

    loaded = load_job(job, overrides or [])  # before anything starts: most mistakes are in the document
    with of(context).hub(sites=True) as hub:
        view = _carry_out(hub, *loaded, as_json)
        _finish(context, view, as_json)


@app.command(rich_help_panel=PANEL)
def plan(context: typer.Context, job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show what would be done: the candidates, their prices, what policy removed, and why one is chosen.

    Example: atoll plan job.yaml --json
    """
    from atoll.console import show
    from atoll.console.document import load_job

    loaded = load_job(job, overrides or [])
    with of(context).hub(sites=True) as hub:
        found = hub.plan(*loaded)
    of(context).emit(found, show.plan(found), as_json)


@app.command(rich_help_panel=PANEL)
def resume(context: typer.Context, as_json: Json = False) -> None:
    """Go on with the runs that an ended hub left behind, to their ends. Deployments come back with `atoll hub start`.

    Example: atoll resume
    """
    from rich.console import Group

    from atoll.console import show

    with of(context).hub(sites=True) as hub:
        names = hub.resume()
        if not names:
            say("No run was interrupted.")
        views = [_follow(hub, name, as_json) for name in names]
        resting = [view.name for view in hub.deployments() if view.state == "stopped"]
    if resting:
        say(f"Not started here: {', '.join(resting)}; deployments live with a hub, start one with `atoll hub start`.")
    of(context).emit(views, Group(*(show.outcome(view) for view in views)), as_json)
    raise typer.Exit(max((exit_code(view) for view in views), default=0))


@runs.callback()
def list_runs(context: typer.Context, as_json: Json = False) -> None:
    """List the runs; `atoll runs show RUN` tells all about one.

    Example: atoll runs
    """
    if context.invoked_subcommand is not None:
        return
    from atoll.console import show

    with of(context).hub() as hub:
        views = hub.runs()
    of(context).emit(views, show.runs(views), as_json)


@runs.command("show")
def show_run(context: typer.Context, run: Run, as_json: Json = False) -> None:
    """Show one run: its plan, its progress, its result.

    Example: atoll runs show heart-1
    """
    from atoll.console import show

    with of(context).hub() as hub:
        view = hub.run(run)
    of(context).emit(view, show.run(view), as_json)


@sweep.command("show")
def show_sweep(context: typer.Context, run: Run, as_json: Json = False) -> None:
    """Show a sweep's trials: their values, how far each came, and which is the best.

    Example: atoll sweep show heart-1a2b3c4d
    """
    from atoll.console import show
    from atoll.errors import Invalid

    with of(context).hub() as hub:
        view = hub.run(run)
    if view.sweep is None:
        among = f"; it is trial {view.trial.number} of {view.trial.sweep}" if view.trial else ""
        raise Invalid(f"run: {run!r} is no sweep{among or '; its job has no field sweep'}")
    of(context).emit(view.sweep, show.outcome(view) if view.over else show.progress(view, most=0), as_json)


@app.command(rich_help_panel=PANEL)
def cancel(context: typer.Context, run: Run, as_json: Json = False) -> None:
    """Cancel a run: its sites stop working on it and nothing is published.

    Example: atoll cancel heart-1
    """
    from atoll.console import show

    with of(context).hub() as hub:
        view = hub.cancel(run)
    of(context).emit(view, show.outcome(view), as_json)


@app.command(rich_help_panel=PANEL)
def query(
    context: typer.Context,
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT of aggregates.", show_default=False)],
    purpose: Annotated[str, typer.Option(help="What the answer is for; owners grant data by purpose.")] = "statistics",
    sites: Annotated[str | None, typer.Option(help="Only these sites, separated by commas.")] = None,
    as_json: Json = False,
) -> None:
    """Ask one aggregate of a dataset: answered at each site, merged here; no row leaves a site.

    Example: atoll query "SELECT sex, count(*), avg(age) FROM heart GROUP BY sex" --purpose cardiology-research
    """
    from atoll.console.document import query_job

    named = [part.strip() for part in sites.split(",") if part.strip()] if sites else None
    job = query_job(sql, purpose, sites=named)
    with of(context).hub(sites=True) as hub:
        view = _carry_out(hub, job, None, as_json, quiet=True)
        _finish(context, view, as_json)


@app.command(rich_help_panel=PANEL)
def capacity(
    context: typer.Context,
    job: JobFile,
    overrides: Overrides = None,
    sites: Annotated[int, typer.Option(help="So many more sites like the slowest.", min=0)] = 0,
    bandwidth: Annotated[float, typer.Option(help="Links so many times as fast.")] = 1.0,
    parameters: Annotated[float, typer.Option(help="A model so many times as big.")] = 1.0,
    as_json: Json = False,
) -> None:
    """What if: the price of a job's plan with more sites, more nodes, faster links, a bigger model.

    Example: atoll capacity job.yaml --sites 4 --bandwidth 10
    """
    from atoll.console import show
    from atoll.console.document import load_job
    from atoll.planner.capacity import Change
    from atoll.spec.document import parse

    loaded = load_job(job, overrides or [])
    change = parse(Change, {"sites": sites, "bandwidth": bandwidth, "parameters": parameters}, "capacity")
    with of(context).hub(sites=True) as hub:
        found = hub.capacity(*loaded, change)
    of(context).emit(found, show.capacity(found), as_json)


def _carry_out(hub: "Client", job: "Job", bundle: "Bundle | None", as_json: bool, quiet: bool = False) -> "RunView":
    """Submit a job and watch its run to the end; Ctrl-C cancels it and waits until its sites have let go."""
    from atoll.spec.job import run_name

    name = run_name(job)
    try:
        return _watch(hub, hub.submit(job, bundle, name), as_json, quiet)
    except KeyboardInterrupt:
        say(f"Cancelling {name}.")
        return hub.withdraw(job, bundle, name)


def _follow(hub: "Client", run: str, as_json: bool) -> "RunView":
    """Watch a run to its end; Ctrl-C cancels it."""
    try:
        return _watch(hub, run, as_json)
    except KeyboardInterrupt:
        say(f"Cancelling {run}.")
        return hub.stop(run)


def _watch(hub: "Client", run: str, as_json: bool, quiet: bool = False) -> "RunView":
    with Watch(stderr=as_json) as watch:
        return hub.wait(run, None if quiet else watch)


def _finish(context: typer.Context, view: "RunView", as_json: bool) -> None:
    from atoll.console import show

    of(context).emit(view, show.outcome(view), as_json)
    if view.state == "interrupted":
        say("The run was interrupted and is kept; go on with `atoll resume`.")
    raise typer.Exit(exit_code(view))
