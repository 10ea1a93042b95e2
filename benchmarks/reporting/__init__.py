"""How each benchmark begins and ends: `--quick`, `--record`, and a last line of named figures in JSON."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from atoll.console import show

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Figure = float | int | str | None | list["Figure"] | dict[str, "Figure"]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for. `quick` stays under a minute and measures less."""

    quick: bool
    record: bool
    json: bool = False


def parser(description: str) -> argparse.ArgumentParser:
    """Return what reads the options that every benchmark takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="less of everything, under a minute")
    made.add_argument("--record", action="store_true", help="also write what is printed to benchmarks/results/, dated")
    made.add_argument("--json", action="store_true", help="nothing but the line of figures on standard output")
    return made


def options(description: str) -> Options:
    """Read the command line of a benchmark that takes these options only."""
    given = parser(description).parse_args()
    return Options(given.quick, given.record, given.json)


def fresh(name: str) -> Path:
    """Return an empty home for this benchmark, inside the clone and ignored by git."""
    home = ROOT / ".atoll" / "benchmarks" / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    return home


def peer(package: str, name: str) -> str:
    """Tell in words whether a peer is there. None is ever installed beside Atoll: its dependencies would move ours."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{name}: not installed"
    return f"{name}: {version} is installed, and this benchmark does not drive it"


@dataclass(slots=True)
class Report:
    """Prints what was measured, and keeps it for the dated file."""

    name: str
    title: str
    options: Options
    _out: Console = field(init=False)
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._out = Console(width=130, markup=False, highlight=False, record=True, stderr=self.options.json)

    def say(self, words: str = "") -> None:
        self._out.print(words, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; columns whose name begins with '>' are aligned to the right."""
        self._out.print(show.table("", columns, rows))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def finish(self, figures: Mapping[str, Figure], samples: Mapping[str, Figure] | None = None) -> None:
        """Print the figures as the last line and, when asked to, write the dated result; all ``samples`` beside it."""
        text = self._out.export_text()
        last = json.dumps({**figures, "quick": self.options.quick, "seconds": round(self.seconds, 1)})
        if self.options.record:
            path = self._write(text, last)
            if samples is not None:
                whole = {"hardware": hardware(), "figures": json.loads(last), "samples": samples}
                path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            print(f"recorded in {path.relative_to(ROOT)}", file=sys.stderr if self.options.json else sys.stdout)
        print(last, flush=True)

    def _write(self, text: str, last: str) -> Path:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        words = [word for word in sys.argv[1:] if word not in ("--record", "--json")]
        command = " ".join(["python", f"benchmarks/{self.name}.py", *words])
        body = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{day}-{self.name}.md"
        path.write_text(
            f"# {self.title}\n\n{day}, `{command}`, on {hardware()}.\n\n```text\n{body}\n```\n\n"
            f"```json\n{json.dumps(json.loads(last), indent=1)}\n```\n",
            encoding="utf-8",
        )
        return path


def hardware() -> str:
    """Return what the figures were measured on."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyarrow", "atoll"))
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {memory:.0f} GiB, CPU only, Python {platform.python_version()} on {sys.platform}, {versions}"
    )
