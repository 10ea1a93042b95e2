"""Commands about people: users and their tokens, projects with quotas, what waits for a second person, logging in."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atoll.console.terminal import Json, of, say, secret

if TYPE_CHECKING:
    from atoll.spec.user import ApprovalView

PANEL = "Users"
UserName = Annotated[str, typer.Argument(metavar="NAME", help="The user's name.", show_default=False)]
Roles = Annotated[
    list[str], typer.Option("--role", help="viewer, scientist, operator, owner or auditor; may be given again.")
]
Projects = Annotated[
    list[str] | None, typer.Option("--project", help="A project; may be given again. By default: default.")
]
Approval = Annotated[str, typer.Argument(metavar="ID", help="As `atoll approvals` lists it.", show_default=False)]

app = typer.Typer()
user = typer.Typer(no_args_is_help=True, help="Who may use the hub, in which roles, by which tokens.")
project = typer.Typer(no_args_is_help=True, help="What the runs of a project may take.")
app.add_typer(user, name="user", rich_help_panel=PANEL)
app.add_typer(project, name="project", rich_help_panel=PANEL)


@user.command("add")
def user_add(
    context: typer.Context, name: UserName, role: Roles, project: Projects = None, as_json: Json = False
) -> None:
    """Make somebody a user of the hub; `atoll user token` then makes a token for them.

    Example: atoll user add ada --role scientist --project cardiology
    """
    from atoll.console.show import text

    with of(context).hub() as hub:
        if any(view.user.name == name for view in hub.people.users()):
            from atoll.errors import Invalid

            raise Invalid(f"user: {name!r} is one already; change the roles by: atoll user role {name} --role ...")
        found = hub.people.put(name, role, project or ["default"])
    of(context).emit(found, text(f"{name} is {', '.join(found.roles)}; make a token: atoll user token {name}"), as_json)


@user.command("role")
def user_role(
    context: typer.Context, name: UserName, role: Roles, project: Projects = None, as_json: Json = False
) -> None:
    """Give a user these roles and no others, from now on, and these projects where some are named.

    Example: atoll user role ada --role scientist --role operator
    """
    from atoll.console.show import text
    from atoll.errors import NotFound
    from atoll.spec.document import near_miss

    with of(context).hub() as hub:
        known = {view.user.name: view.user for view in hub.people.users()}
        if name not in known:
            raise NotFound(f"user: there is no {name!r}{near_miss(name, list(known))}; add one by: atoll user add")
        found = hub.people.put(name, role, project or known[name].projects)
    of(context).emit(found, text(f"{name} is {', '.join(found.roles)} now."), as_json)


@user.command("list")
def user_list(context: typer.Context, as_json: Json = False) -> None:
    """List the users with their roles, projects and the tokens that are good now.

    Example: atoll user list
    """
    from atoll.console import show_people

    with of(context).hub() as hub:
        found = hub.people.users()
    of(context).emit(found, show_people.users(found), as_json)


@user.command("remove")
def user_remove(context: typer.Context, name: UserName, as_json: Json = False) -> None:
    """Take a user out: their tokens open nothing any more. Their runs go on.

    Example: atoll user remove ada
    """
    from atoll.console.show import text

    with of(context).hub() as hub:
        hub.people.remove(name)
    of(context).emit({"removed": name}, text(f"{name} is no user any more."), as_json)


@user.command("token")
def user_token(
    context: typer.Context,
    name: UserName,
    hours: Annotated[float, typer.Option(help="How long it is good.", min=0.01, max=720)] = 12.0,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, submit, promote, deploy, export, erase, approve, administer, all; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write it to this file, which only you can read.", metavar="FILE")
    ] = None,
) -> None:
    """Print a token of a user, this once: give it to that user and to nobody else.

    A scope leaves it less than the user's roles would. The user runs `atoll login`, or sets ATOLL_TOKEN.

    Example: atoll user token ada --hours 8 --scope submit --out ada.token
    """
    from atoll import private
    from atoll.console.show import text

    with of(context).hub() as hub:
        token = hub.people.token(name, hours, tuple(scope or ["all"]))
    if out is not None:
        private.write(out, f"{token}\n".encode())
        say(f"The token of {name} is in {out}; it is good for {hours:g} hours.")
        return
    of(context).emit(token, text(token), as_json=False)
    say(f"For {name}, for {hours:g} hours; it is shown this once.")


@user.command("revoke")
def user_revoke(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="TOKEN|NAME", help="A token's id, or a user for all of theirs.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """End a token at once, by its id as `atoll user list` shows it, or all tokens of a user.

    Example: atoll user revoke ada
    """
    from atoll.console.show import text

    with of(context).hub() as hub:
        found = hub.people.revoke(what)
    of(context).emit({"revoked": found}, text(f"Revoked: {', '.join(found)}"), as_json)


@project.command("set")
def project_set(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What jobs call the project.", show_default=False)],
    at_once: Annotated[int | None, typer.Option("--runs-at-once", help="Runs under way.", min=1)] = None,
    per_day: Annotated[int | None, typer.Option("--runs-per-day", help="Runs within any 24 hours.", min=1)] = None,
    seconds: Annotated[
        float | None, typer.Option("--site-seconds", help="Seconds of sites' work within any 24 hours.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a project, or give one other bounds; what is left out is not bounded.

    Example: atoll project set cardiology --runs-at-once 4 --runs-per-day 50
    """
    from atoll.console import show_people
    from atoll.spec.document import parse
    from atoll.spec.user import Project

    asked = {"name": name, "runs_at_once": at_once, "runs_per_day": per_day, "site_seconds": seconds}
    with of(context).hub() as hub:
        found = hub.people.put_project(parse(Project, asked, "project set"))
        views = [view for view in hub.people.projects() if view.project.name == name]
    of(context).emit(found, show_people.projects(views), as_json)


@project.command("list")
def project_list(context: typer.Context, as_json: Json = False) -> None:
    """List the projects with their bounds, and what their runs took within the last 24 hours.

    Example: atoll project list
    """
    from atoll.console import show_people

    with of(context).hub() as hub:
        found = hub.people.projects()
    of(context).emit(found, show_people.projects(found), as_json)


@app.command(rich_help_panel=PANEL)
def approvals(context: typer.Context, as_json: Json = False) -> None:
    """List what waits for a second person, and what was answered.

    Example: atoll approvals
    """
    from atoll.console import show_people

    with of(context).hub() as hub:
        found = hub.people.approvals()
    of(context).emit(found, show_people.approvals(found), as_json)


@app.command(rich_help_panel=PANEL)
def approve(context: typer.Context, approval: Approval, as_json: Json = False) -> None:
    """Agree to what another user asked for: it is shown, and then carried out as it was asked.

    Example: atoll approve ask-1a2b3c4d
    """
    _answer(context, approval, True, as_json)


@app.command(rich_help_panel=PANEL)
def reject(context: typer.Context, approval: Approval, as_json: Json = False) -> None:
    """Say no to what another user asked for, or withdraw what you asked for yourself.

    Example: atoll reject ask-1a2b3c4d
    """
    _answer(context, approval, False, as_json)


def _answer(context: typer.Context, name: str, approve: bool, as_json: bool) -> None:
    from atoll.console import show_people

    with of(context).hub() as hub:
        asked: ApprovalView = hub.people.approval(name)
        say(f"{asked.user} asks: {asked.words}")
        found = hub.people.answer(asked, approve)
    of(context).emit(found, show_people.approvals([found]), as_json)


@app.command(rich_help_panel=PANEL)
def login(
    context: typer.Context,
    url: Annotated[str, typer.Option("--hub", help="Where the hub's API answers.", metavar="http://127.0.0.1:PORT")],
) -> None:
    """Use a hub as the user of a token, from this home on: every later command is that user's.

    The token is asked for and not shown, read from standard input, from --token-file, or from ATOLL_TOKEN. A hub on
    another machine is reached through a tunnel: ssh -N -L 8000:127.0.0.1:8000 HOST

    Example: atoll login --hub http://127.0.0.1:8000
    """
    from atoll.console.login import log_in

    terminal = of(context)
    log_in(terminal.home, url, terminal.token() or secret("Token", "token"))
    with terminal.hub() as hub:
        found = hub.people.me()["user"]
    say(f"You are {found['name']} ({', '.join(found['roles'])}) at {url}; `atoll logout` ends it.")


@app.command(rich_help_panel=PANEL)
def logout(context: typer.Context) -> None:
    """Forget the login of this home, and use its own hub again.

    Example: atoll logout
    """
    from atoll.console.login import log_out

    say("Logged out." if log_out(of(context).home) else "This home is not logged in anywhere.")
