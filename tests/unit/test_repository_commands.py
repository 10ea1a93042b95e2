"""Every command that a page or a help text shows is one that the command line understands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from atoll.console.cli import USAGE, app, hoist

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
COMMAND = typer.main.get_command(app)


def shown() -> list[str]:
    """Return the commands in the pages, after a `$` or indented, and in the examples of the help texts."""
    found = [line for page in PAGES for line in re.findall(r"^(?:\$| +) (atoll .*)$", page.read_text(), re.MULTILINE)]
    return [*found, *(line for help_text in helps(COMMAND) for line in re.findall(r"Example: (atoll .*)", help_text))]


def helps(command: Any) -> list[str]:
    return [command.help or "", *(text for below in getattr(command, "commands", {}).values() for text in helps(below))]


def understand(words: list[str]) -> str:
    """Parse a command line to its end as the program would, and run nothing; return the command's path."""
    command: Any = COMMAND
    context = command.make_context("atoll", hoist(words))
    while rest := [*context._protected_args, *context.args]:  # what a group leaves to its commands
        _, command, rest = command.resolve_command(context, rest)
        context = command.make_context(command.name, rest, parent=context)
    return context.command_path


def test_every_command_that_is_shown_is_understood() -> None:
    commands = shown()
    assert len(commands) > 40
    for command in commands:
        assert understand(shlex.split(command, comments=True)[1:]).startswith("atoll ")


@pytest.mark.parametrize(
    "wrong", ["atoll depoly heart@1", "atoll run job.yaml --sett x=1", "atoll models shw x", "atoll predict"]
)
def test_a_command_that_is_none_would_be_found(wrong: str) -> None:
    with pytest.raises(USAGE):
        understand(wrong.split()[1:])
