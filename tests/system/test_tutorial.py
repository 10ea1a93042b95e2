"""The tutorial does what it says: a stranger writes its files and runs its commands, in order, in an empty home.

A block whose first line names a file is that file, or an addition to it. In a console block, what follows a `$` runs;
the lines below it are promised, `...` stands for others, and a promised `error:` means exit code 2. A command whose
comment says "until Ctrl-C" goes on in a terminal of its own, with the last invitation pasted into it. RUN is a name
that one would copy from what `atoll runs` prints.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
SECONDS = 60  # for one command, on a busy machine
FILE = re.compile(r"(?:#|//) (add to )?(\S+\.\w+)\n")


@dataclass(slots=True)
class Command:
    words: str
    promised: list[str] = field(default_factory=list)

    @property
    def stays(self) -> bool:
        return "until Ctrl-C" in self.words.partition("#")[2]


def blocks(page: str) -> list[str]:
    """Return the fenced blocks after the installation, each from its first line on."""
    return re.findall(r"^```\w+\n(.*?)^```$", page[page.index("\n## 2") :], re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[Command]:
    found: list[Command] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        elif line != "...":
            found[-1].promised.append(line)
    return found


def folded(words: str) -> str:
    return " ".join(words.split())


class Person:
    """Who follows the page: a home folder, a shell with the environment active, terminals that stay open."""

    def __init__(self, home):
        self.home = home
        self.folder = home.path / "clinics"
        self.folder.mkdir()
        (home.path / "tmp").mkdir()
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.environment |= {
            "HOME": str(home.path),
            "TMPDIR": str(home.path / "tmp"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.open: list[subprocess.Popen[bytes]] = []
        self.token = ""

    def write(self, name: str, text: str, *, more: bool) -> None:
        with (self.folder / name).open("a" if more else "x", encoding="utf-8") as file:
            file.write(text)

    def run(self, words: str, code: int = 0) -> tuple[str, str]:
        """Return what a command printed as its result, and what it told beside it."""
        done = subprocess.run(
            ["bash", "-c", words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == code, f"$ {words}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout, done.stderr

    def stay(self, words: str, eventually) -> None:
        """Open a terminal and wait until what runs in it has joined: the hub answers, or the hub sees the site."""
        log = self.home.path / f"terminal-{len(self.open)}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {words}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.open.append(process)
        assert process.stdin is not None
        with process.stdin as typed:
            typed.write(f"{self.token}\n".encode())

        def there() -> bool:
            assert process.poll() is None, log.read_text()
            if len(self.open) == 1:
                return "until Ctrl-C" in log.read_text()
            return "geneva" in [site["name"] for site in json.loads(self.run("atoll sites --json")[0])]

        assert eventually(there, SECONDS, 0.2), log.read_text()

    def put_in(self, words: str) -> str:
        """Put the name of the first run of this job in the place of RUN."""
        if not re.search(r"\bRUN\b", words):
            return words
        runs = json.loads(self.run("atoll runs --json")[0])
        return words.replace("RUN", next(view["run"] for view in runs if view["name"] == "risk"))


def test_every_command_of_the_tutorial_does_what_the_page_says(home, eventually):
    person = Person(home)
    for block in blocks(PAGE):
        if named := FILE.match(block):
            person.write(named[2], block[named.end() :], more=bool(named[1]))
            continue
        for command in commands(block):
            words = person.put_in(command.words)
            if command.stays:
                person.stay(words, eventually)
                continue
            code = 2 if any(line.startswith("error: ") for line in command.promised) else 0
            result, told = person.run(words, code)
            for line in command.promised:
                assert folded(line) in folded(result + told), f"$ {words}\n{result}{told}"
            if words.startswith("atoll site invite"):
                (person.token,) = result.split()
    assert len(person.open) == 2, "the page opens a terminal for the hub and one for the site that joins"
    for process in reversed(person.open):
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
    assert home.empty()
