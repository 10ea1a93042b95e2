"""What every command shares: the home, the choice between tables and JSON, and how a run is watched."""

import getpass
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.errors import Invalid, named

# Typer needs these names at import; everything heavy is imported inside the commands, so that --help stays instant.
if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from atoll.console.client import Client
    from atoll.spec.run import RunView

Json = Annotated[bool, typer.Option("--json", help="Print JSON only; progress goes to standard error.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the document, for example sync.period=20."),
]
FILE_WIDTH = 1_000_000  # where the output is no terminal: each line as long as its words
LINE_SECONDS = 1.0  # between two progress lines where the output is no terminal
FAILED, CANCELLED, UNAVAILABLE = 4, 130, 5  # exit codes of a run that did not finish (4: as TaskFailed)


@dataclass(frozen=True, slots=True)
class Terminal:
    """The global options of one command."""

    home: Path
    debug: bool
    token_file: Path | None = None

    def token(self) -> str | None:
        """Return the token of the user who this command is for, where one is given."""
        from atoll.console.login import given_token

        return given_token(self.token_file)

    @contextmanager
    def hub(self, sites: bool = False) -> "Iterator[Client]":
        """Reach the home's hub, started here for this command if none runs."""
        from atoll.console.client import connect

        client = connect(self.home, sites, self.token())
        try:
            yield client
        finally:
            client.close()

    def emit(self, value: Any, shown: "RenderableType", as_json: bool) -> None:
        """Print what was asked for: as JSON, or as rich shows it."""
        if as_json:
            sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
        else:
            from rich.text import Text

            console().print(shown, soft_wrap=isinstance(shown, Text))  # a token or a link is copied in one piece


def of(context: typer.Context) -> Terminal:
    """Return the options given before the command."""
    return context.find_object(Terminal) or Terminal(Path(".atoll"), debug=False)


def console(stderr: bool = False) -> "Console":
    """A rich console without markup or highlighting: what it prints comes from documents, as text."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = FILE_WIDTH
    return made


def say(words: str) -> None:
    """Tell the person something that is not the command's result."""
    from atoll.console.show import text

    console(stderr=True).print(text(words), soft_wrap=True)


def plain(value: Any) -> Any:
    """Return documents, and lists and tables of them, as JSON values."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def rest(hub: "Client | None" = None) -> None:
    """Stay until Ctrl-C: a service in the foreground. A ``hub`` that stays takes up its home's deployments again."""
    try:
        for view in hub.redeploy() if hub is not None else ():
            say(f"Deployment {view.name}: {view.model} {view.words or f'answers at {view.url}'}")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


def secret(prompt: str, field: str) -> str:
    """Ask for what nobody else should see; where standard input is no terminal, read its first line."""
    if sys.stdin.isatty():
        return getpass.getpass(f"{prompt} (not shown): ").strip()
    line = sys.stdin.readline().strip()
    if not line:
        raise Invalid(f"{field}: none on standard input; paste it there, or give it as a word of the command")
    return line


class Watch:
    """Shows each view of a run: a live frame on a terminal, a line now and then elsewhere."""

    def __init__(self, stderr: bool) -> None:
        from rich.live import Live

        self._console = console(stderr)
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._planned = False
        self._line = ("", 0.0)

    def __enter__(self) -> "Watch":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __call__(self, view: "RunView") -> None:
        from atoll.console import show

        if view.plan is not None and not self._planned:
            self._planned = True
            self._console.print(show.plan(view.plan))
        if self._console.is_terminal:
            self._live.update(show.progress(view))
            return
        line, now = show.progress_line(view), time.monotonic()
        if line != self._line[0] and now - self._line[1] >= LINE_SECONDS:
            self._line = (line, now)
            self._console.print(line, soft_wrap=True)


def exit_code(view: "RunView") -> int:
    """Return what the shell learns of how a run ended."""
    if view.state == "failed" and view.error:
        return named(view.error, view.words).exit_code
    return {"finished": 0, "cancelled": CANCELLED, "interrupted": UNAVAILABLE}.get(view.state, FAILED)
