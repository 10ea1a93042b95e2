"""Homes of real processes: a tiny convex task, a few rows at each site, the command line as its users run it.

Every process that a home starts, and whatever those start, carries the home's own TMPDIR; so what is left can be found
by it, whoever its parent was.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from atoll.boundary.port import Port
from atoll.data.catalogue import Catalogue
from atoll.errors import AtollError
from atoll.journal import Entry, Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.actors import RayExecutor
from atoll.runtime.site import create
from atoll.spec.fleet import Executor, SiteFile
from atoll.spec.sandbox import Mode
from tests.system.processes import alive, descendants
from tests.unit.ends import Desk, World, lines
from tests.unit.papers import Posing

TASK = '''\
"""Logistic regression on two columns; it can be told to be slow, to stand still and to break."""

import os
import time

import numpy as np
import torch
from torch import nn

from atoll import Mean


class Risk:
    def __init__(self, pause=0.0, hold="", fault="", after=8):
        self.pause, self.hold, self.fault, self.after, self.calls = pause, hold, fault, after, 0

    def model(self):
        return nn.Linear(2, 1)

    def examples(self, rows):
        age = rows.statistics["age"]
        known = [name for name in ("age", "dose", "ill", "slow") if name in rows.table.column_names]
        numbers = {name: np.array(rows.table[name].to_pylist(), np.float32) for name in known}
        made = {"x": np.stack([(numbers["age"] - age.mean) / age.std, numbers["dose"]], 1).astype(np.float32)}
        if "ill" in numbers:
            made |= {"y": numbers["ill"], "slow": numbers["slow"]}
        return made

    def loss(self, model, batch):
        slow = float(batch["slow"][0])
        time.sleep(self.pause * slow)
        # A slow site stands still while this file is there, from its second round on: a probe takes three steps.
        while slow and self.calls > 3 and os.path.exists(self.hold):
            time.sleep(0.01)
        self.calls += 1
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["y"])
        if self.calls <= self.after:
            return loss
        faults = {"nan": loss * torch.nan, "vector": model(batch["x"]), "number": 0.5, "constant": torch.tensor(0.5)}
        return faults.get(self.fault, loss)

    def predict(self, model, batch):
        return {"risk": torch.sigmoid(model(batch["x"])[:, 0])}

    def metrics(self, model, batch):
        right = (self.predict(model, batch)["risk"] > 0.5) == (batch["y"] > 0.5)
        return {"accuracy": Mean(right.sum().item(), len(right))}
'''
PURPOSE = "cardiology-research"

# A shell that runs the checks in the background has them ignore Ctrl-C, and whatever they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
COMMAND = [sys.executable, "-m", "atoll.console.cli"]


@dataclass(slots=True)
class Started:
    """A command that goes on; what it prints is in two files."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def kill(self) -> None:
        """kill -9, of this process alone."""
        self.process.kill()
        self.process.wait()

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@dataclass(slots=True)
class Home:
    """A folder with a hub's state, sites, a job document and a task, and all that runs over it."""

    path: Path
    started: list[Started] = field(default_factory=list)

    # --- the command line

    def start(self, *words: str) -> Started:
        """Start `atoll WORDS` in a process group of its own."""
        scratch = self.path / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        out, err = (scratch / f"{len(self.started)}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [*COMMAND, "--home", str(self.path), *words],
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env={**os.environ, "TMPDIR": str(scratch)},
                start_new_session=True,
            )
        self.started.append(Started(process, out, err))
        return self.started[-1]

    def atoll(self, *words: str, code: int = 0) -> str:
        """Run `atoll WORDS` to its end and return what it printed: the result, or the words of the error it ends in."""
        command = self.start(*words)
        left = command.process.wait(90)
        assert left == code, f"atoll {' '.join(words)} ended with {left} and not {code}:\n{command.said}"
        assert "Traceback" not in command.said, command.said
        return command.out.read_text() if code == 0 else command.said

    def asked(self, *words: str) -> Any:
        """Return what `atoll WORDS --json` prints."""
        return json.loads(self.atoll(*words, "--json"))

    def data(self, name: str, *, slow: float = 0.0, rows: int = 60) -> Path:
        """Write the patients of a site; all their randomness is in its name."""
        chance = random.Random(name)
        ages, doses = ([chance.uniform(low, high) for _ in range(rows)] for low, high in ((30, 80), (0, 1)))
        table = {
            "age": ages,
            "dose": doses,
            "sex": [chance.choice(["f", "f", "m"]) for _ in range(rows - 1)] + ["x"],
            "slow": [slow] * rows,
            "ill": [int(a + 30 * d + chance.gauss(0, 5) > 70) for a, d in zip(ages, doses, strict=True)],
        }
        file = self.path / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), file)
        return file

    def site(self, name: str, *, slow: float = 0.0, rows: int = 60, sandbox: Mode = "off") -> None:
        """Make a site with a dataset `patients`. Tasks here look at files of their tests, so it has no sandbox."""
        folder = self.path / "sites" / name
        create(folder, SiteFile(name=name, executor=Executor(sandbox=sandbox)), SITE_POLICY)
        Catalogue(folder).add("patients", self.data(name, slow=slow, rows=rows), (PURPOSE,), 5)

    def job(self, name: str = "risk", task: str = TASK, **changes: Any) -> str:
        """Write a training job and its task; `changes` are fields of the document, by their path with __ between."""
        document: dict[str, Any] = {
            "kind": "train",
            "name": name,
            "purpose": PURPOSE,
            "task": {"file": "task.py", "name": "Risk"},
            "data": {"dataset": "patients", "statistics": ["age"]},
            "steps": 12,
            "batch": 16,
            "layout": {"data": 1},  # else a busy machine's timings choose it, and two ranks round to other bits
            "sync": {"preset": "fedavg", "period": 3},
        }
        for path, value in changes.items():
            *above, last = path.split("__")
            table = document
            for key in above:
                table = table.setdefault(key, {})
            table[last] = value
        folder = self.path / "jobs" / f"{len(list(self.path.glob('jobs/*')))}"
        folder.mkdir(parents=True)
        (folder / "task.py").write_text(task)
        (folder / "job.yaml").write_text(yaml.safe_dump(document))
        return str(folder / "job.yaml")

    # --- what happened

    def journal(self, *kinds: str, after: int = 0, site: str = "") -> list[Entry]:
        """Return the entries of the hub's journal, or a site's, as another process sees them."""
        path = self.path / "sites" / site if site else self.path / "hub"
        with Journal(path / "journal.db", site or "hub", read_only=True) as journal:
            return list(journal.entries(after=after, kinds=kinds))

    def seen(self, kind: str, count: int = 1, after: int = 0, **fields: Any) -> list[Entry]:
        """Wait until the hub's journal has so many entries of this kind with these fields; return them all.

        A field is named by its path, with __ between: `answer__position=2`.
        """

        found: list[Entry] = []

        def enough() -> bool:
            try:
                new = self.journal(kind, after=found[-1].seq if found else after)
            except AtollError:  # not there yet, or half made
                return False
            found.extend(entry for entry in new if all(_at(entry.event, path) == want for path, want in fields.items()))
            return len(found) >= count

        assert eventually(enough, pause=0.005), f"{kind} {fields} never came: {self._told()}"
        return found

    def head(self) -> int:
        """The number of the last entry in the hub's journal."""
        return self.journal()[-1].seq

    def weights(self, run: str) -> dict[int, str]:
        """Return the digest of a run's weights after each stage that changed them: position -> digest."""
        merged = [entry.event for entry in self.journal("run.merged") if entry.event.run == run]
        return {event.position: event.weights for event in merged if event.weights}

    def undisturbed(self, *jobs: dict[str, Any]) -> list[dict[int, str]]:
        """Return the weights after each stage of these jobs, by a hub of their own that nobody kills."""
        hub = self.start("hub", "start")
        found: list[dict[int, str]] = []
        for job in jobs:
            run = self.asked("run", self.job(**job))["run"]
            found.append(self.weights(run))
            assert [model.weights for model in self.published(run)] == [list(found[-1].values())[-1]]
        hub.end()
        assert self.empty()
        return found

    def published(self, run: str) -> list[Any]:
        return [entry.event.model for entry in self.journal("run.published") if entry.event.run == run]

    def verify(self) -> None:
        """Assert that `atoll audit verify` finds the hub's and every site's journal intact."""
        verdicts = self.asked("audit", "verify")
        assert [verdict["intact"] for verdict in verdicts] == [True] * len(verdicts)
        assert len(verdicts) == 1 + len(list(self.path.glob("sites/*/journal.db")))

    # --- processes

    def pids(self, module: str = "") -> list[int]:
        """Return the processes of this home, or those of one Python module among them."""
        mark, found = f"TMPDIR={self.path / 'tmp'}".encode(), []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                ours = mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it ended while we looked
                continue
            if ours and (not module or module.encode() in words):
                found.append(int(entry.name))
        return sorted(found)

    def empty(self, seconds: float = 20) -> bool:
        """Tell whether every process of this home ends by itself in time."""
        return eventually(lambda: not self.pids(), seconds)

    def close(self) -> None:
        """End what a failed test left running; whoever does not end in time, or stands still, is killed."""
        for command in self.started:
            if command.process.poll() is None:
                command.process.terminate()
        self.empty(10)
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        for command in self.started:
            command.process.wait()

    def _told(self) -> str:
        said = [f"$ {' '.join(map(str, item.process.args[2:]))}\n{item.said}" for item in self.started[-3:]]
        logs = [f"{path}:\n{path.read_text()[-2000:]}" for path in self.path.glob("sites/*/agent.log")]
        return "\n".join((*said, *logs))


def eventually(holds: Callable[[], bool], seconds: float = 40, pause: float = 0.02) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(pause)
    return holds()


def _at(event: Any, path: str) -> Any:
    for name in path.split("__"):
        event = getattr(event, name)
    return event


@pytest.fixture(scope="session")
def make_home() -> Iterator[Callable[[Path], Home]]:
    """Make homes; whatever still runs over one in the end is ended."""
    made: list[Home] = []

    def make(path: Path) -> Home:
        path.mkdir(parents=True, exist_ok=True)
        made.append(Home(path))
        return made[-1]

    yield make
    for home in made:
        home.close()


@pytest.fixture
def home(make_home, tmp_path) -> Iterator[Home]:
    made = make_home(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture(scope="session", name="eventually")
def _eventually() -> Callable[..., bool]:
    """Return a function that waits until something holds."""
    return eventually


@pytest.fixture(scope="session")
def with_ray() -> None:
    """Skip, and say so, where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'atoll[ray]'")


@pytest.fixture(scope="module")
def ray_cluster(with_ray, tmp_path_factory) -> Iterator[RayExecutor]:
    """A Ray of this test's own with room for four ranks; nothing of it is left in the end."""
    executor = RayExecutor(Executor(kind="ray"), 4, tmp_path_factory.mktemp("ray"))
    executor.nodes()
    below = descendants(os.getpid())
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below}
    theirs = {pid for pid, name in names.items() if b"ray" in name}
    assert len(theirs) > 3, "the driver, the directory, the raylet and more"
    yield executor
    executor.close()
    assert eventually(lambda: not {pid for pid in theirs if alive(pid)})


# --- both ends of the boundary in this one process, over real sockets


@pytest.fixture(params=["plain", "tls"])
def socket_world(request, tmp_path):
    made = World(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture
def tls(tmp_path):
    made = World("tls", tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["plain", "tls"])
def pair(request, tmp_path):
    ends = lines(request.param, tmp_path)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def serve():
    """Serve with an identity of the test's choice, as a hub that errs or a stranger would."""
    servers = []

    def start(registrar=None, identity=None, **where):
        if identity is not None:
            registrar = Posing(registrar, identity)
        servers.append(Port(Desk(), registrar=registrar, **where))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
