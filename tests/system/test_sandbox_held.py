"""What user code keeps hold of to reach out of its sandbox: the sandbox itself, the hub's socket, a log, a result."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import Unavailable
from atoll.runtime import sandbox, undialled
from atoll.runtime.cells import Cells
from atoll.runtime.local import LocalExecutor
from atoll.runtime.sandbox import Grant, Room, missing
from atoll.runtime.written import ordered_into, take
from atoll.serving.deployments import Deployments
from atoll.spec.model import Deployment
from atoll.spec.order import Initialise
from atoll.spec.plan import Layout
from atoll.spec.sandbox import Limits
from tests.answering import answering
from tests.opening import opening

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(missing()), reason=f"no sandbox can be had here: {missing()}"),
]

# Goes into a room as user code does, takes hold of the pipe whose end is to end the room, and leaves a process behind.
STAYS = """\
import fcntl
import os
import sys
import time

try:
    os.open("/proc/1/fd/0", os.O_WRONLY)
    print("held", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
if os.fork():
    time.sleep(600)
os.setsid()
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("left", flush=True)
time.sleep(600)
"""

AGENT = """\
import os
import signal
import subprocess
import sys
from pathlib import Path

from atoll.runtime import sandbox
from atoll.runtime.sandbox import Grant, Room
from atoll.spec.sandbox import Limits

base, how = Path(sys.argv[1]), sys.argv[2]
room = Room(Grant(base / "home", (base / "code",), base / "home" / "work"), Limits())
inside = subprocess.Popen(
    [*sandbox.command("stays", room.pidfd, Limits()), str(base / "home" / "work" / "held")],
    stdout=subprocess.PIPE, pass_fds=(room.pidfd,), env={"PYTHONPATH": str(base / "code")}, text=True,
)
print(os.getuid(), inside.stdout.readline().strip(), inside.stdout.readline().strip(), flush=True)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print(room.close())
"""


def unprivileged():
    """Return how a command is run by who is not root: in a namespace where our number is another's.

    Where this process is root, bubblewrap would leave all of its capabilities to what it starts.
    """
    if os.getuid():
        return []
    words = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("no user but root can be had here: unshare --user --map-user does not work")
    return words


@pytest.fixture
def place(tmp_path):
    """The folder of a site's home, with the code that stays."""
    for name in ("home/work", "code"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "code" / "stays.py").write_text(STAYS)
    return tmp_path


@pytest.fixture
def closing():
    with contextlib.ExitStack() as stack:
        yield lambda one: stack.enter_context(contextlib.closing(one))


def free(path):
    """Tell whether nobody holds a file's lock any more."""
    with path.open("r") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_nobody_inside_can_keep_a_room_that_its_agent_closed_or_was_killed_with(place, eventually, how):
    asked = [*unprivileged(), sys.executable, "-c", AGENT, str(place), how]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    user, held, left, *closed = said.stdout.split()
    assert (user != "0", held, left) == (True, "PermissionError", "left"), said.stderr
    assert closed == (["True"] if how == "closed" else [])
    if how == "closed":
        assert free(place / "home" / "work" / "held")
    else:
        assert eventually(lambda: free(place / "home" / "work" / "held"))


def test_a_room_is_gone_when_it_is_closed_also_while_the_pipe_that_would_end_it_is_held_open(place):
    room = Room(Grant(place / "home", (place / "code",), place / "home" / "work"), Limits())
    held = os.dup(room._process.stdin.fileno())
    file = place / "home" / "work" / "held"
    words = [*sandbox.command("stays", room.pidfd, Limits()), str(file)]
    env = {"PYTHONPATH": str(place / "code")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, pass_fds=(room.pidfd,), env=env, text=True) as inside:
        assert [inside.stdout.readline() for _ in range(2)][1] == "left\n"
        gone, now = room.close(), free(file)
        os.close(held)
    assert (gone, now, room.close()) == (True, True, True)


DIALS = """\
import ctypes
import os
import socket
import struct

import numpy as np
import torch


def tried(do):
    try:
        return repr(do())
    except BaseException as error:
        return type(error).__name__


def doors():
    for number in range(3, 64):
        try:
            found = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        if found.family == socket.AF_INET:
            yield found


def ask(door, port):
    ctypes.CDLL(None).connect(door.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16)
    door.settimeout(3)
    door.connect(("127.0.0.1", port))
    return "dialled"


def quick(door, port):
    door.settimeout(0)
    door.sendto(b"x", 0x20000000, ("127.0.0.1", port))
    return "sent"


def everything(port):
    libc = ctypes.CDLL(None, use_errno=True)
    ring = ctypes.create_string_buffer(120)
    here, there = socket.socketpair()
    here.sendall(b"ping")
    return {
        "doors": str(min(1, len(list(doors())))),
        "dial": ",".join(sorted({tried(lambda: ask(door, port)) for door in doors()})),
        "quick": ",".join(sorted({tried(lambda: quick(door, port)) for door in doors()})),
        "ring": str((libc.syscall(425, 1, ring), ctypes.get_errno())),
        "own": tried(lambda: there.recv(4)),
        "log": os.readlink("/proc/self/fd/2")[:5],
    }


class Risk:
    def __init__(self, port):
        self.port, self.before = port, everything(port)
        print("what it says last of", os.getpid(), flush=True)

    def model(self):
        return torch.nn.Linear(1, 1)

    def examples(self, rows):
        return {"x": np.array(rows.table["age"].to_pylist(), np.float32)[:, None]}

    def predict(self, model, batch):
        found = {**{f"before {k}": v for k, v in self.before.items()}, **everything(self.port)}
        return {"risk": model(batch["x"])[:, 0]} | {
            name: np.array([words] * len(batch["x"])) for name, words in found.items()
        }
"""


def test_a_replica_cannot_dial_with_the_socket_that_it_was_given_nor_read_its_predecessors_log(closing, tmp_path):
    home = tmp_path / "home"
    (home / "hub").mkdir(parents=True)
    (home / "hub" / "replicas.yaml").write_text("sandbox: required\n")
    deployments = closing(Deployments(tmp_path / "logs", cells=Cells.of(home)))
    model, bundle, weights = answering(home, DIALS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        model = model.model_copy(update={"params": {"port": server.getsockname()[1]}})
        view = deployments.start(Deployment(name="heart", model="heart@1"), model, bundle, weights, {"age": "double"})
        assert (view.state, view.words) == ("answering", "")
        reply = httpx.post(f"{view.url}/predict", json={"rows": [{"age": 3}]}, timeout=30).json()
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    denied = "PermissionError"
    found = {"doors": "1", "dial": denied, "quick": denied, "ring": "(-1, 1)", "own": "b'ping'", "log": "pipe:"}
    assert reply["answers"] == [{"risk": 7.0, **found, **{f"before {name}": words for name, words in found.items()}}]
    deployments.stop("heart")
    assert "what it says last of 2" in (tmp_path / "logs" / "heart.log").read_text()


def test_a_machine_without_the_filter_has_no_sandbox_for_replicas(monkeypatch, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "replicas.yaml").write_text("sandbox: required")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    undialled.missing.cache_clear()
    try:
        with pytest.raises(Unavailable, match=r"there is none: .*system calls \(riscv64\) are not known"):
            Cells.of(tmp_path)([])
    finally:
        undialled.missing.cache_clear()


def test_a_cell_that_cannot_be_made_fails_the_deployment_and_leaves_its_name_free(closing, tmp_path):
    def full(readable):
        raise OSError(24, "Too many open files", "/of/the/hub")

    deployments = closing(Deployments(tmp_path / "logs", cells=full))
    model, bundle, weights = answering(tmp_path, DIALS)
    for _ in range(2):
        view = deployments.start(Deployment(name="heart", model="heart@1"), model, bundle, weights, {})
        assert (view.state, view.words.partition(";")[0]) == ("failed", "deployment heart: Too many open files")


PRINTS = """\
import json
import os

import numpy as np
from torch import nn


def tried(do):
    try:
        return repr(do())
    except BaseException as error:
        return type(error).__name__


class Prints:
    def __init__(self, work, words, found):
        self.work = work
        print(words, flush=True)
        print("x" * (1 << 20), flush=True)
        open("/proc/self/fd/1", "w").close()
        kinds = [os.readlink(f"/proc/self/fd/{number}")[:5] for number in (1, 2)]
        seen = {"kinds": kinds, "empty": tried(lambda: os.ftruncate(1, 0))}
        with open(work + "/" + found, "w") as file:
            json.dump(seen, file)

    def model(self):
        print("its last words", flush=True)
        os._exit(1)

    def examples(self, rows):
        return {"x": np.ones((8, 1), np.float32)}

    def loss(self, model, batch):
        return 0

    def metrics(self, model, batch):
        return {}
"""


@pytest.fixture
def site(closing, tmp_path):
    """Have groups started with a task's code, and its class opened with these parameters."""
    executor = closing(LocalExecutor(1.0, "required", Limits()))
    home = tmp_path / "sites" / "lyon"
    work = home / "runs" / "run" / "work"
    for folder in (home / "code", work):
        folder.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1.0] * 8}), tmp_path / "rows.parquet")

    def begin(code, name, **params):
        (home / "code" / "task.py").write_text(code)
        rows = tmp_path / "rows.parquet"
        group = closing(
            executor.start(Layout(), home / "workers", Grant(home, (home / "code", rows, work.parent), work))
        )
        opened = opening(tmp_path, name, params={"work": str(work), **params})
        group.order(opened.model_copy(update={"bundle": str(home / "code")}), 60)
        return group

    begin.home, begin.work = home, work
    return begin


def test_a_worker_reads_and_empties_nothing_of_the_log_that_keeps_its_last_words(site):
    for words in ("of-ada", "of-eve"):
        group = site(PRINTS, "Prints", words=words, found="found.json")
        with pytest.raises(Unavailable):
            group.order(Initialise(seed=0, output=str(site.work / "initial-0.f32")), 30)
        group.close()
        found = json.loads((site.work / "found.json").read_text())
        assert found == {"kinds": ["pipe:", "pipe:"], "empty": "OSError"}
    kept = (site.home / "workers" / "worker-0.log").read_text()
    assert kept == "".join(f"{words}\n{'x' * (1 << 20)}\nits last words\n" for words in ("of-ada", "of-eve"))


LATE = """\
import os
import threading
import time

import numpy as np
from torch import nn


class Late:
    def __init__(self, work, how):
        self.work, self.how = work, how
        threading.Thread(target=self.wait, daemon=True).start()

    def wait(self):
        out = self.work + "/initial-0.f32"
        while not (os.path.exists(out) and os.path.getsize(out) == 8):
            time.sleep(0.001)
        if self.how == "link":
            again = self.work + "/other"
            os.link(out, again)
        else:
            again = "/proc/self/fd/%d" % os.open(out, os.O_RDONLY)
        open(self.work + "/ready", "w").close()
        while os.path.exists(out):
            time.sleep(0.001)
        with open(again, "r+b") as file:
            file.write(np.array([9e9, 9e9], np.float32).tobytes())
        open(self.work + "/wrote", "w").close()

    def model(self):
        return nn.Linear(1, 1)

    def examples(self, rows):
        return {"x": np.ones((8, 1), np.float32)}

    def loss(self, model, batch):
        return 0

    def metrics(self, model, batch):
        return {}
"""


@pytest.mark.parametrize("how", ["link", "read"])
def test_what_was_taken_stays_what_it_was_while_its_code_lives(site, eventually, how):
    group = site(LATE, "Late", how=how)
    asked = Initialise(seed=1, output=str(site.work.parent / "initial-0.f32"))
    given = ordered_into(site.work, asked)
    group.order(given, 60)
    assert eventually((site.work / "ready").exists)
    take(asked, given, confined=True)
    taken = np.fromfile(asked.output, np.float32)
    assert eventually((site.work / "wrote").exists)
    assert np.array_equal(np.fromfile(asked.output, np.float32), taken)
    assert max(abs(taken)) < 9e9
    assert Path(asked.output).stat().st_mode & 0o777 == 0o600
