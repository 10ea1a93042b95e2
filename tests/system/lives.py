"""Hubs and sites as real processes that begin in milliseconds: each is forked from one that has imported everything.

    python -m tests.system.lives

reads orders as JSON lines: {"do": "begin", ...} forks a process and tells its number, {"do": "reap", "pid": 5, ...}
waits for its end and tells how it ended. When its stdin ends, so do all that it began. What is not real here is the
workers: a site's training is numpy in the agent's own process, unless it is told to have real ones.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from atoll.boundary.keyring import Keyring
from atoll.errors import TaskFailed, Unavailable
from atoll.outer.wire import CHUNK
from atoll.runtime import faults
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.runtime.hub import Hub
from atoll.runtime.local import LocalExecutor
from atoll.spec.fleet import Profile
from atoll.spec.job import parse_job
from atoll.spec.model import Bundle, TensorSpec
from atoll.spec.order import Reply
from atoll.spec.user import LOCAL
from tests.undeployed import NothingDeployed

RUN, NAMES = "job-1", ("alice", "bob")
SIZE = 2 * CHUNK + 1000  # elements: three frames
STEPS, BATCH, ROUNDS = 2, 4, 3
SIGNATURE = (TensorSpec(name="w", shape=(SIZE,)),)
FORBID = '@id("late") forbid (principal, action == Action::"cross", resource) when { context.kind == "update" };'
TASK = """\
import numpy as np

from atoll import Fitted, Mean


class Task:
    def arrays(self):
        return {"w": np.zeros(1000)}

    def examples(self, rows):
        return {"x": rows.table["age"].to_numpy()}

    def fit(self, arrays, examples, budget):
        w = arrays["w"]
        for batch in budget.batches:
            w = w - 0.1 * (w - batch["x"].mean())
        return Fitted({"w": w}, 1.0)

    def metrics(self, arrays, examples):
        return {"mean": Mean(arrays["w"].sum(), len(examples["x"]))}
"""


# --- what the processes are -------------------------------------------------------------------------------------------


class Numbers:
    """Trains in this process: momentum towards a point of the site's own. ``how`` is what of it goes wrong."""

    def __init__(self, home: Path, how: str) -> None:
        self.home, self.how, self.lies, self.slept, self.closed = home, how, 0, False, threading.Event()
        chance = np.random.default_rng(len(home.name))
        self.goal = chance.normal(size=SIZE).astype(np.float32)

    whole = True
    confined, refuses = False, ""

    def warm(self):
        pass

    def rest(self):
        pass

    def start(self, layout, folder, grant=None):
        self.closed.clear()
        return self

    def close(self):
        self.closed.set()

    def order(self, order, timeout, on_step=None):
        match order.kind:
            case "initialise":
                np.linspace(-1, 1, SIZE, dtype=np.float32).tofile(order.output)
                return Reply(signature=SIGNATURE)
            case "probe":
                return Reply(profile=Profile(parameters=SIZE, step_seconds=0.5))
            case "train":
                return self._train(order)
            case "evaluate":
                liar = self.how == "barred" or (self.how == "rejected" and self.lies == 0)
                self.lies += liar
                mean = {"mean": {"total": float(np.fromfile(order.weights, np.float32).sum()), "count": 10}}
                return Reply(totals=mean, examples=10**15 if liar else 10)
        return Reply(rows=50)

    def _train(self, order):
        if self.how == "broken" and order.done:
            raise TaskFailed("the task broke")
        if self.how == "refused" and order.done:  # the owner has other thoughts in the middle of the run
            (self.home / "policy.cedar").write_text((self.home / "policy.cedar").read_text() + FORBID)
        if self.how == "expired" and not self.slept:
            self.slept = True
            time.sleep(0.5)
        bad = self.how == "swept" and order.optimiser.rate > 1
        if bad and order.done:  # so bad a trial goes no further: its sweep has its first round to tell so
            self.closed.wait(60)
            raise Unavailable("the group was ended")
        start = np.fromfile(order.weights, np.float32)
        moment = np.fromfile(order.state_in, np.float32) if order.state_in else np.zeros(SIZE, np.float32)
        weights = start.copy()
        for step in range(order.steps):
            moment = np.float32(0.9) * moment + weights - np.roll(self.goal, order.done + step)
            weights -= np.float32(0.05) * moment
        (weights - start).tofile(order.output)
        if order.state_out:
            moment.tofile(order.state_out)
        return Reply(examples=order.steps * BATCH, loss=float(np.abs(moment).mean()) + 10 * bad)


def hub(home: str, sync: dict, cancel: bool = False, sweep: dict | None = None) -> None:
    """Conduct one run, whether it was begun before or not; say in a file how it ended, and stay."""
    hub = Hub(Path(home), NothingDeployed())
    if all(view.run != RUN for view in hub.runs()):
        while len(hub.fleet().sites) < len(NAMES):
            time.sleep(0.002)
        fields = {"kind": "train", "name": "job", "purpose": "care", "steps": ROUNDS * STEPS, "batch": BATCH}
        fields |= {"task": {"file": "task.py", "name": "Task"}, "layout": {"data": 1}, "sync": sync}
        fields |= {"sweep": sweep} if sweep else {}
        job = parse_job({**fields, "data": {"dataset": "rows", "statistics": ["age"]}}, "job")
        hub.submit(job, Bundle(files={"task.py": TASK}), LOCAL, RUN)
    hub.resume()
    if cancel:
        while len(hub.run(RUN).losses) < 1:
            time.sleep(0.002)
        hub.cancel(RUN, LOCAL)
    while not (view := hub.run(RUN)).over:
        time.sleep(0.002)
    part = Path(home) / "over.part"
    part.write_text(json.dumps({"state": view.state, "words": view.words}))
    part.replace(Path(home) / "over.json")
    time.sleep(600)


def site(home: str, address: str, how: str) -> None:
    """Serve a site that has joined."""
    faults.arm()
    folder = Path(home)
    served, keys = sites.read(folder), Keyring(folder, folder.name)
    executor = LocalExecutor() if how == "workers" else Numbers(folder, how)
    Agent(served, folder, executor).serve(address, lambda: keys.identity)


# --- the one that they are forked from --------------------------------------------------------------------------------


class Nursery:
    """The test's end of it."""

    def __init__(self, root: Path) -> None:
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.lives"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=root,
            env={**os.environ, **single},
        )

    def begin(self, log: Path, fault: str, role: str, **arguments: object) -> int:
        """Begin a process; return its number."""
        return self._ask(do="begin", log=str(log), fault=fault, role=role, arguments=arguments)

    def reap(self, pid: int, seconds: float) -> int | None:
        """Return how a process ended, as `subprocess` does, once it has; None when it takes longer."""
        return self._ask(do="reap", pid=pid, seconds=seconds)

    def _ask(self, **order: object):
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


def main() -> None:
    began: set[int] = set()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if order["do"] == "begin":
            answer = os.fork()
            if not answer:
                _live(order)
            began.add(answer)
        else:
            answer = _reaped(order["pid"], order["seconds"])
            if answer is not None:
                began.discard(order["pid"])
        print(json.dumps(answer), flush=True)
    for pid in began:
        os.kill(pid, signal.SIGKILL)


def _reaped(pid: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            return None
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def _live(order: dict) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for number, file in ((0, nothing), (1, log), (2, log)):
            os.dup2(file, number)
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", level=logging.INFO)
        if order["fault"]:
            os.environ[faults.VARIABLE] = order["fault"]
        {"hub": hub, "site": site}[order["role"]](**order["arguments"])
        code = 0
    finally:
        if code:
            logging.exception("this process ends")
        os._exit(code)


if __name__ == "__main__":
    main()
