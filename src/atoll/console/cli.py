"""The command line `atoll`: its global options, its commands by topic, and how every error ends."""

import errno
import signal
import sys
import traceback
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

import atoll
from atoll.console import (
    cli_audit,
    cli_cluster,
    cli_code,
    cli_jobs,
    cli_models,
    cli_policy,
    cli_pretrained,
    cli_privacy,
    cli_relay,
    cli_sites,
    cli_users,
)
from atoll.console.terminal import CANCELLED, Terminal, say
from atoll.errors import AtollError, Invalid, Unavailable

# Every mistake in a command line. Typer has no public name for it.
USAGE = cast("type[Exception]", typer.BadParameter.__bases__[0])
app = typer.Typer(
    name="atoll",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
about = typer.Typer()
cli_sites.app.add_typer(cli_audit.app, name="audit", rich_help_panel=cli_audit.PANEL)
cli_sites.app.add_typer(cli_policy.app, name="policy", rich_help_panel=cli_sites.PANEL)
cli_sites.app.add_typer(cli_privacy.app, name="privacy", rich_help_panel=cli_sites.PANEL)
cli_sites.app.add_typer(cli_relay.app, name="relay", rich_help_panel=cli_sites.PANEL)
cli_sites.app.add_typer(cli_cluster.app, name="cluster", rich_help_panel=cli_sites.PANEL)
cli_sites.app.add_typer(cli_pretrained.app, name="pretrained", rich_help_panel=cli_sites.PANEL)
for topic in (cli_jobs.app, cli_models.app, cli_sites.app, cli_users.app, cli_code.app, about):
    app.add_typer(topic)  # in the order of the help


@app.callback()
def options(
    context: typer.Context,
    home: Annotated[Path, typer.Option(help="Where Atoll keeps its state.", metavar="DIR")] = Path(".atoll"),
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(help="A user's token, to use the hub as that user; or set ATOLL_TOKEN.", metavar="FILE"),
    ] = None,
) -> None:
    """One AI system over machines that belong to different owners: job, plan, run, model, deployment.

    Begin with: atoll run job.yaml
    """
    context.obj = Terminal(home, debug, token_file)
    if debug:
        import logging

        logging.basicConfig(level=logging.INFO)


@about.command(rich_help_panel="Other")
def version() -> None:
    """Print the version.

    Example: atoll version
    """
    sys.stdout.write(f"atoll {atoll.__version__}\n")


def main() -> NoReturn:
    """The entry point of the program `atoll`."""
    signal.signal(signal.SIGTERM, _end)
    execute(sys.argv[1:])


def execute(arguments: Sequence[str]) -> NoReturn:
    """Run one command and leave with its exit code; a person's mistake is one sentence, never a traceback."""
    given = hoist(arguments)
    try:
        code = typer.main.get_command(app)(args=given, prog_name="atoll", standalone_mode=False)
    except USAGE as error:
        _fail(error, _usage(error), Invalid.exit_code, given)
    except typer.Abort:  # a question that nobody answered
        sys.exit(CANCELLED)
    except AtollError as error:
        _fail(error, str(error), error.exit_code, given)
    except OSError as error:
        _fail(error, _disk(error), Unavailable.exit_code, given)
    except Exception as error:  # noqa: BLE001 - the process boundary: a fault of ours must still end in a sentence
        _fail(error, f"{type(error).__name__}: {error}; run again with --debug to see where", 1, given)
    sys.exit(code or 0)  # what a command left with by typer.Exit


def hoist(arguments: Sequence[str]) -> list[str]:
    """Move the global options to the front, so that they may stand anywhere: `atoll run job.yaml --debug`."""
    front: list[str] = []
    others: list[str] = []
    items = iter(arguments)
    for item in items:
        if item == "--":
            others += [item, *items]
        elif item in ("--home", "--token-file"):
            front += [item, *islice(items, 1)]
        elif item == "--debug" or item.startswith(("--home=", "--token-file=")):
            front.append(item)
        else:
            others.append(item)
    return front + others


def _fail(error: Exception, words: str, code: int, given: Sequence[str]) -> NoReturn:
    if "--debug" in given:
        traceback.print_exception(error)
    if words:
        say(f"error: {words}")
    sys.exit(code)


def _usage(error: Any) -> str:
    """One sentence for a command line that is none; "" where its help has been printed already."""
    words = str(error.format_message()).strip().rstrip(".")
    return f"{words}; see `{error.ctx.command_path if error.ctx else 'atoll'} --help`" if words else ""


def _disk(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "disk: no space is left; free some, then run `atoll resume`"
    return f"{error.filename or 'system'}: {error.strerror or error}; check that it exists and may be used"


def _end(number: int, frame: object) -> NoReturn:
    """A polite kill ends like a finished command: the hub closes, its sites stop, its runs can be resumed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
