"""Workers that are forked: like started ones in all that user code sees, told of when they end, and never left over."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.errors import Unavailable
from atoll.runtime.local import LocalExecutor
from atoll.spec import order as orders
from atoll.spec.plan import Layout
from tests.opening import opening
from tests.system.processes import alive, descendants

pytestmark = pytest.mark.system
TASK = """\
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path({folder!r})
# Before anything is seeded.
DRAWN = {"python": random.random(), "numpy": np.random.random(), "torch": torch.rand(1).item()}


def told():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            files[number] = os.readlink(f"/proc/self/fd/{number}").split(":")[0].split("/")[-1].split("-")[0]
        except FileNotFoundError:  # the listing's own
            pass
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    seeded = [random.random(), np.random.random(), torch.rand(1).item()]
    return {
        "drawn": DRAWN,
        "seeded": seeded,
        "environment": dict(os.environ),
        "environ": sorted(subprocess.run(["env", "-0"], capture_output=True, text=True).stdout.split("\\0")),
        "files": files,
        "threads": threading.active_count(),
        "session": os.getsid(0) == os.getpid() == os.getpgid(0),
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "arguments": [len(sys.argv), sys.path, os.getcwd(), sys.flags.safe_path],
        "encodings": [sys.stdout.encoding, sys.stderr.encoding, sys.stdout.write_through],
    }


class Fit:
    def model(self):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        left = subprocess.Popen(["sleep", "60"])
        (HERE / f"left-{rank}").write_text(str(left.pid))
        (HERE / f"told-{rank}").write_text(json.dumps(told()))
        (HERE / f"pid-{rank}").write_text(str(os.getpid()))
        left.returncode = 0  # it is to be left behind
        return nn.Linear(1, 1)

    def examples(self, rows):
        return {"x": rows.table["x"].to_numpy()[:, None]}

    def loss(self, model, batch):
        return model(batch["x"]).square().mean()
"""


class Ranks:
    """A group whose ranks have written down what they find."""

    def __init__(self, folder, executor, ranks=1):
        (folder / "code").mkdir(parents=True)
        self.folder, self.executor = folder, executor
        (folder / "code" / "task.py").write_text(TASK.replace("{folder!r}", repr(str(folder))))
        pq.write_table(pa.table({"x": np.arange(8, dtype=np.float32)}), folder / "rows.parquet")
        self.group = executor.start(Layout(data=ranks), folder / "group")
        opened = opening(folder, "Fit", "code", 0.25, seed=0)
        self.group.order(opened, 100)
        self.initialise()

    def initialise(self):
        self.group.order(orders.Initialise(seed=0, output=str(self.folder / "weights.f32")), 100)

    def number(self, what, rank=0):
        return int((self.folder / f"{what}-{rank}").read_text())

    def told(self, rank=0):
        return json.loads((self.folder / f"told-{rank}").read_text())


@pytest.fixture
def executor():
    made = LocalExecutor()
    yield made
    made.close()
    assert not [pid for pid in descendants(os.getpid()) if named(pid)], "nothing of it is left"


@pytest.fixture
def begin(executor, tmp_path):
    """Begin groups whose ranks have written down what they find; whatever of them is left in the end is ended."""
    made = []

    def begin(name, ranks=1, executor=executor):
        made.append(Ranks(tmp_path / name, executor, ranks))
        return made[-1]

    yield begin
    for ranks in made:
        ranks.group.close()


@pytest.fixture
def spawning():
    """An executor without a nursery."""
    made = LocalExecutor()
    made.close()
    return made


def named(pid):
    """Tell what of a site's processes this is, as `ps` shows it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((name for name in ("nursery", "worker") if f"atoll.runtime.{name}".encode() in words), "")


def nursery():
    (found,) = (pid for pid in descendants(os.getpid()) if named(pid) == "nursery")
    return found


def gone(eventually, *pids):
    return eventually(lambda: not any(alive(pid) for pid in pids), 20)


def test_a_forked_worker_finds_what_a_started_one_finds(begin, spawning, eventually):
    one, other = begin("forked"), begin("started", executor=spawning)
    forked, started = one.told(), other.told()
    assert named(one.number("pid")) == named(other.number("pid")) == "worker"
    parents = [int(Path(f"/proc/{ranks.number('pid')}/stat").read_text().split()[3]) for ranks in (one, other)]
    assert parents == [nursery(), os.getpid()]
    forked.pop("drawn"), started.pop("drawn")
    # Numbers differ, what they are of does not: three, the reply pipe, the orders' copy, and what `told` itself opens.
    assert sorted(forked.pop("files").values()) == sorted(started.pop("files").values())
    assert forked == started
    assert forked["session"]
    assert forked["threads"] == 3  # its own, the one that listens, the one that gives signs of life
    assert "JE_ARROW_MALLOC_CONF" not in forked["environment"]
    one.group.close()
    other.group.close()
    assert gone(eventually, one.number("left"), other.number("left")), "what user code left behind in its group"


def test_two_workers_draw_different_numbers_until_they_are_seeded(begin):
    ranks = begin("two", 2)
    first, second = ranks.told(0), ranks.told(1)
    ranks.group.close()
    assert all(first["drawn"][name] != second["drawn"][name] for name in ("python", "numpy", "torch"))
    assert first["seeded"] == second["seeded"]
    assert sorted(first["files"].values()) == sorted(second["files"].values()), "nothing of the one in the other"


def test_a_worker_that_is_killed_is_told_by_its_signal_and_its_number_is_kept_until_then(begin, eventually):
    ranks = begin("killed")
    pid = ranks.number("pid")
    os.kill(pid, signal.SIGABRT)
    with pytest.raises(Unavailable, match="a rank ended by signal SIGABRT"):
        ranks.initialise()
    assert Path(f"/proc/{pid}").exists(), "a number that somebody may still signal is nobody else's"
    assert alive(ranks.number("left"))
    ranks.group.close()
    assert gone(eventually, ranks.number("left"))
    ranks.group.close()  # and nothing more is signalled
    again = begin("again")
    assert again.number("pid") != pid
    again.group.close()


def test_a_worker_that_is_stopped_is_ended_by_force(begin, eventually):
    ranks = begin("stopped")
    os.kill(ranks.number("pid"), signal.SIGSTOP)
    ranks.group.close()
    assert not alive(ranks.number("pid"))
    assert gone(eventually, ranks.number("left"))


def test_workers_outlive_their_nursery_and_the_next_have_another(begin, eventually):
    ranks, first = begin("orphan"), nursery()
    os.kill(first, signal.SIGKILL)
    ranks.initialise()
    assert alive(ranks.number("pid"))
    assert gone(eventually, first)
    after = begin("after")
    assert nursery() != first
    os.kill(ranks.number("pid"), signal.SIGKILL)
    with pytest.raises(Unavailable, match="a rank ended in a way that nobody saw"):
        ranks.initialise()
    ranks.group.close()
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9):  # the group's number may be another's by now
        os.kill(ranks.number("left"), signal.SIGKILL)
    os.kill(nursery(), signal.SIGKILL)
    after.group.close()
    assert gone(eventually, after.number("pid"), *(group.number("left") for group in (ranks, after)))


def test_a_nursery_that_cannot_fork_any_more_is_replaced_by_workers_that_start(executor, begin, caplog):
    executor.warm()
    pid = nursery()
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    ranks = begin("started")
    assert "this worker is started by itself" in caplog.text
    assert int(Path(f"/proc/{ranks.number('pid')}/stat").read_text().split()[3]) == os.getpid()
    ranks.group.close()


AGENT = """\
import sys, time
from pathlib import Path
from tests.system.test_nursery import Ranks
from atoll.runtime.local import LocalExecutor

executor = LocalExecutor()
ranks = Ranks(Path(sys.argv[1]), executor, 2)
print("ready", flush=True)
time.sleep(600)
"""


def test_when_the_agent_is_killed_nothing_of_it_is_left(tmp_path, eventually):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", AGENT, str(tmp_path / "agent")]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "ready\n"
    below = descendants(agent.pid)
    assert sorted(filter(None, map(named, below))) == ["nursery", "worker", "worker"]
    ours = [pid for pid in below if named(pid)]
    agent.kill()
    agent.communicate()
    assert gone(eventually, *ours)
    for rank in range(2):
        os.kill(int((tmp_path / "agent" / f"left-{rank}").read_text()), signal.SIGKILL)


def test_a_nursery_with_a_second_thread_forks_nobody_and_says_which(tmp_path):
    """Its guard, in a process of its own that has started one."""
    program = (
        "import threading, time\n"
        "from atoll.runtime.nursery import _fit\n"
        "print(_fit().refused == '', _fit().hopeless)\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print(_fit().refused, _fit().hopeless)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert first == "True False"
    assert re.fullmatch(r"a library has started a thread: \S+, \S+ True", second)


def test_closing_while_it_imports_ends_it_at_once(eventually):
    executor = LocalExecutor()
    executor.warm()
    pid = nursery()
    executor.close()
    assert not alive(pid)


def test_a_group_that_is_closed_while_its_nursery_imports_ends(executor, tmp_path):
    group = executor.start(Layout(data=2), tmp_path)
    group.close()
    assert not [pid for pid in descendants(os.getpid()) if named(pid) == "worker"]
