"""The command that runs a relay."""

from typing import Annotated

import typer

from atoll.console.terminal import of, say, secret

app = typer.Typer(no_args_is_help=True, help="Run a relay, which aggregates for the sites behind it.")


@app.callback()
def relay() -> None:
    """Run a relay, which aggregates for the sites behind it."""


@app.command("start")
def relay_start(
    context: typer.Context,
    token: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOKEN]",
            help="From `atoll site invite NAME --relay HOST:PORT`; - reads it from standard input.",
            show_default=False,
        ),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--site", help="Which of this home's sites; by default its only one.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address that its port is bound to; 0.0.0.0 for every one.")
    ] = "0.0.0.0",  # noqa: S104 - others dial it, which is what a relay is for
    port: Annotated[int, typer.Option(help="The port that sites dial, as in the invitation.", min=1, max=65535)] = 7444,
) -> None:
    """Join a hub as a relay: sites invited behind it dial it, and their updates go on as one. Until Ctrl-C.

    Make its site first (`atoll site add NAME`); it has no datasets. Asked for, the token is not shown.

    Example: atoll relay start --home /srv/alps --port 7444
    """
    from atoll.console.document import site_folder
    from atoll.console.logs import trim_site

    folder = site_folder(of(context).home, at)
    given = secret("Token", "token") if token in (None, "-") else token
    from atoll.runtime.relaying import relay as start

    try:
        trim_site(folder)
        start(folder, given, host, port)
    except KeyboardInterrupt:
        say("The relay has left.")
