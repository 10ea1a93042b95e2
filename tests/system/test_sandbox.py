"""What user code can do in a sandbox, tried from inside it; and what it is there for, which goes as without one."""

import fcntl
import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import Unavailable
from atoll.runtime.cells import Cells
from atoll.runtime.local import LocalExecutor
from atoll.runtime.sandbox import Grant, missing
from atoll.serving.deployments import Deployments
from atoll.spec.compute import Compute
from atoll.spec.model import Deployment
from atoll.spec.plan import Layout
from atoll.spec.sandbox import Limits
from tests.answering import answering
from tests.opening import opening
from tests.system.processes import descendants
from tests.system.rounds import Site, check_same

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(missing()), reason=f"no sandbox can be had here: {missing()}"),
]
HOSTILE = '''\
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from torch import nn


def tried(do):
    try:
        return repr(do())
    except BaseException as error:
        return type(error).__name__


def outlive(held):
    """Leave a process behind that has forgotten whose it is."""
    script = "import fcntl, os, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); " \\
        "print(flush=True); time.sleep(600)"
    left = subprocess.Popen([sys.executable, "-c", script, held], stdout=subprocess.PIPE, start_new_session=True)
    return left.stdout.readline()


class Thief:
    def __init__(self, home, other, work, rows, port, parent, outside):
        work, home = Path(work), Path(home)
        libc = ctypes.CDLL(None, use_errno=True)
        abstract = lambda: socket.socket(socket.AF_UNIX).connect("\\0" + outside)
        found = {
            "key": tried(lambda: (home / "journal.key").read_bytes()),
            "home": tried(lambda: sorted(os.listdir(home))),
            "run": tried(lambda: sorted(os.listdir(work.parent.parent))),
            "dataset": tried(lambda: Path(other).read_bytes()),
            "own": tried(lambda: len(Path(rows).read_bytes()) > 0),
            "rows": tried(lambda: open(rows, "ab")),
            "beside": tried(lambda: (work.parent / "mark").write_text("x")),
            "code": tried(lambda: Path(__file__).write_text("x")),
            "root": tried(lambda: Path("/new").write_text("x")),
            "python": tried(lambda: Path(sys.executable).resolve().with_name("new").write_text("x")),
            "host": tried(lambda: socket.create_connection(("127.0.0.1", port), 2)),
            "abstract": tried(abstract),
            "beyond": tried(lambda: socket.create_connection(("192.0.2.1", 80), 2)),
            "secret": os.environ.get("SECRET", ""),
            "environ": tried(lambda: b"SECRET" in Path("/proc/self/environ").read_bytes()),
            "agent": tried(lambda: Path(f"/proc/{parent}/environ").read_bytes()),
            "kill": tried(lambda: os.kill(parent, signal.SIGTERM)),
            "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
            "userns": libc.unshare(0x10000000),
            "root again": tried(lambda: os.chroot("/tmp")),
            "capabilities": [line for line in open("/proc/self/status") if line.startswith(("Cap", "NoNew"))],
            "session": tried(lambda: os.open("/dev/tty", os.O_RDWR)),
            "memory": tried(lambda: np.ones(1 << 29).sum()),
            "limits": [resource.getrlimit(what)[1] for what in (resource.RLIMIT_CPU, resource.RLIMIT_CORE)],
            "nice": os.nice(0),
            "file": tried(lambda: os.truncate(open(work / "big", "wb").fileno(), 1 << 26)),
            "left": outlive(str(work / "held")).decode(),
            "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
        }
        (work / "found.json").write_text(json.dumps(found))

    def model(self):
        return nn.Linear(1, 1)

    def examples(self, rows):
        return {"x": np.ones((8, 1), np.float32)}

    def loss(self, model, batch):
        return model(batch["x"]).mean()

    def metrics(self, model, batch):
        while True:
            pass
'''


SLOW = """\
import os
import time


class Slow:
    def __init__(self, work):
        with open(os.path.join(work, "told"), "w") as file:
            file.write(repr(sorted(name for name in os.listdir("/proc") if name.isdigit())))
        time.sleep(60)
"""


SPY = """\
import os
import socket
import subprocess
import sys

import numpy as np
import torch


def tried(do):
    try:
        return repr(do())
    except BaseException as error:
        return type(error).__name__


class Risk:
    def __init__(self, home, port, parent):
        self.home, self.port, self.parent = home, port, parent
        left = "import time; time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", left], start_new_session=True)

    def model(self):
        return torch.nn.Linear(1, 1)

    def examples(self, rows):
        return {"x": np.array(rows.table["age"].to_pylist(), np.float32)[:, None]}

    def predict(self, model, batch):
        found = {
            "key": tried(lambda: open(os.path.join(self.home, "hub", "ca", "key.pem")).read()),
            "home": tried(lambda: sorted(os.listdir(self.home))),
            "code": tried(lambda: open(__file__, "a")),
            "host": tried(lambda: socket.create_connection(("127.0.0.1", self.port), 2)),
            "agent": tried(lambda: os.kill(self.parent, 15)),
            "processes": str(len([name for name in os.listdir("/proc") if name.isdigit()])),
            "limit": tried(lambda: np.ones(1 << 29).sum()),
        }
        return {"risk": model(batch["x"])[:, 0]} | {
            name: np.array([words] * len(batch["x"])) for name, words in found.items()
        }
"""


@pytest.fixture
def closing():
    """Have groups and executors closed in the end, in the order they are given."""
    with ExitStack() as stack:

        def close(one):
            stack.callback(one.close)
            return one

        yield close


@pytest.fixture
def begin(closing):
    """Begin executors whose workers live in sandboxes."""

    def begin(limits=None):
        executor = closing(LocalExecutor(1.0, "required", limits or Limits()))
        assert executor.confined
        return executor

    return begin


def test_user_code_that_tries_everything_finds_its_dataset_and_its_own_folder(begin, closing, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "of the agent")
    home, rows = tmp_path / "sites" / "lyon", tmp_path / "rows"
    work = home / "runs" / "run" / "work"
    for folder in (home / "code", work, home / "runs" / "another", rows):
        folder.mkdir(parents=True)
    (home / "journal.key").write_bytes(b"the site's key")
    (home / "code" / "task.py").write_text(HOSTILE)
    for name in ("rows", "others"):
        pq.write_table(pa.table({"x": np.arange(8, dtype=np.float32)}), rows / f"{name}.parquet")
    limits = Limits(memory_bytes=3 << 30, cpu_seconds=600, file_bytes=1 << 25, nice=1, order_seconds=30)
    executor, outside = begin(limits), f"atoll-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0" + outside)
        abstract.listen()
        dataset = rows / "rows.parquet"
        group = closing(
            executor.start(Layout(), home / "workers", Grant(home, (home / "code", dataset, work.parent), work))
        )
        params = {"home": str(home), "other": str(rows / "others.parquet"), "work": str(work), "rows": str(dataset)}
        params |= {"port": server.getsockname()[1], "parent": os.getpid(), "outside": outside}
        opened = opening(tmp_path, "Thief", params=params).model_copy(
            update={"path": str(dataset), "bundle": str(home / "code")}
        )
        group.order(opened, 60)
        found = json.loads((work / "found.json").read_text())
        held = (work / "held").open("r")
        with pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        group.close()
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who was left behind is gone
        held.close()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    away, fixed, empty = "FileNotFoundError", "OSError", 16 * "0"
    assert found == {
        "key": away,
        "home": "['code', 'runs']",
        "run": "['run']",
        "dataset": away,
        "own": "True",
        "rows": fixed,
        "beside": fixed,
        "code": fixed,
        "root": fixed,
        "python": fixed,
        "host": "ConnectionRefusedError",
        "abstract": "ConnectionRefusedError",
        "beyond": fixed,
        "secret": "",
        "environ": "False",
        "agent": away,
        "kill": "ProcessLookupError",
        "mount": -1,
        "userns": -1,
        "root again": "PermissionError",
        "capabilities": [*(f"Cap{of}:\t{empty}\n" for of in ("Inh", "Prm", "Eff", "Bnd", "Amb")), "NoNewPrivs:\t1\n"],
        "session": away,
        "memory": "MemoryError",
        "limits": [600, 0],
        "nice": min(19, os.nice(0) + 1),
        "file": fixed,
        "left": "\n",
        "processes": 3,  # the sandbox's first, this one, and the one that it left behind
    }
    assert not (tmp_path / "sites" / "lyon" / "runs" / "run" / "mark").exists()
    assert not [pid for pid in descendants(os.getpid()) if b"bwrap" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Granting:
    """An executor whose groups see their own folder."""

    def __init__(self, executor):
        self.executor = executor

    def start(self, layout, folder):
        site = folder.parent
        (site / "home").mkdir(exist_ok=True)
        return self.executor.start(layout, folder, Grant(site / "home", (site / "code", site / "rows.parquet"), site))


def test_ranks_in_a_sandbox_train_to_the_same_bits_and_go_on_without_a_lost_one(begin, closing, tmp_path):
    sites = []
    for name, executor in (("inside", Granting(begin())), ("outside", closing(LocalExecutor(1.0)))):
        (tmp_path / name).mkdir()
        sites.append(Site(tmp_path / name, Layout(data=2), Compute(), executor))
        closing(sites[-1].group)
    inside, outside = sites
    assert np.array_equal(inside.train(), outside.train())
    assert max(inside.pids()) < 50, "its processes have numbers of their own"
    for kind in ("SIGKILL", "SIGSTOP"):
        inside.fault(kind, 1, 4)
        check_same(inside, outside)
    assert len(inside.pids()) >= 3


def test_a_worker_without_a_nursery_goes_in_too_and_an_order_has_its_time(begin, closing, tmp_path, eventually):
    executor = begin(Limits(order_seconds=5))
    executor.close()  # and with it its nursery
    for name in ("code", "work", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "code" / "task.py").write_text(SLOW)
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "rows.parquet")
    work = tmp_path / "work"
    grant = Grant(tmp_path / "home", (tmp_path / "code", tmp_path / "rows.parquet"), work)
    group = closing(executor.start(Layout(), tmp_path / "logs", grant))
    with pytest.raises(Unavailable, match="no reply to 'open' in 5 s"):
        group.order(opening(tmp_path, "Slow", "code", params={"work": str(work)}), 60)
    assert eventually(lambda: (work / "told").exists() and (work / "told").read_text() == "['1', '2']")


def test_a_replica_answers_from_a_sandbox_and_finds_neither_keys_nor_a_network(closing, tmp_path):
    home = tmp_path / "home"
    (home / "hub" / "ca").mkdir(parents=True)
    (home / "hub" / "ca" / "key.pem").write_text("the hub's key")
    (home / "hub" / "replicas.yaml").write_text("sandbox: required\nlimits: {memory_bytes: 3000000000}\n")
    deployments = closing(Deployments(tmp_path / "logs", cells=Cells.of(home)))
    model, bundle, weights = answering(home, SPY)
    with socket.create_server(("127.0.0.1", 0)) as server:
        params = {"home": str(home), "port": server.getsockname()[1], "parent": os.getpid()}
        model = model.model_copy(update={"params": params})
        deployment = Deployment(name="heart", model="heart@1")
        view = deployments.start(deployment, model, bundle, weights, {"age": "double"})
        assert (view.state, view.words) == ("answering", "")
        reply = httpx.post(f"{view.url}/predict", json={"rows": [{"age": 3}]}, timeout=30).json()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert reply["answers"] == [
        {
            "risk": 7.0,
            "key": "FileNotFoundError",
            "home": "['blobs', 'bundle']",
            "code": "OSError",
            "host": "PermissionError",
            "agent": "ProcessLookupError",
            "processes": "3",  # the sandbox's first, this one, and the one that it left behind
            "limit": "MemoryError",
        }
    ]
    assert deployments.stop("heart").state == "stopped"
    assert not descendants(os.getpid())
    assert deployments.start(deployment, model, bundle, weights, {"age": "double"}).state == "answering"
