"""A real replica process: it answers, fails in words, drains, and never outlives its hub."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from atoll.errors import Invalid, NotFound
from atoll.serving.deployments import Deployments
from atoll.serving.placement import Placement
from atoll.spec.model import Deployment
from tests.answering import answering

pytestmark = pytest.mark.system

TASK = """\
import os
import time

import numpy as np
import torch

print("the task is imported")  # must not disturb the ready line


class Risk:
    def model(self):
        return torch.nn.Linear(1, 1)

    def examples(self, rows):
        if None in rows.table["age"].to_pylist():
            raise ValueError("age is needed")
        return {"x": np.array(rows.table["age"].to_pylist(), np.float32)[:, None], "wait": np.zeros(len(rows.table))}

    def predict(self, model, batch):
        if (batch["x"] == 13).any():
            open(os.path.join(os.path.dirname(__file__), "computing"), "w").close()
            time.sleep(1)
        threads = torch.full((len(batch["x"]),), torch.get_num_threads())
        secret = [os.environ.get("ATOLL_TOKEN", "") for _ in batch["x"]]
        return {"risk": model(batch["x"])[:, 0], "threads": threads, "secret": np.array(secret)}
"""


@pytest.fixture
def here(tmp_path):
    """A model y = 2x + 1 in a store, its bundle, and deployments that are closed in the end."""
    model, bundle, weights = answering(tmp_path, TASK)
    deployments = Deployments(tmp_path / "logs")

    def start(**changes):
        deployment = Deployment(name="heart", model="heart@1", **changes)
        return deployments.start(deployment, model, bundle, weights, {"age": "double"})

    yield SimpleNamespace(
        start=start, deployments=deployments, model=model, bundle=bundle, weights=weights, folder=tmp_path
    )
    deployments.close()


def ask(url: str, *ages: float | None) -> httpx.Response:
    return httpx.post(f"{url}/predict", json={"rows": [{"age": age} for age in ages]}, timeout=30)


def refused(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return True
    return False


def eventually(holds) -> bool:
    until = time.monotonic() + 20
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def test_a_replica_answers_alone_and_in_a_crowd_and_stops(here, monkeypatch):
    monkeypatch.setenv("ATOLL_TOKEN", "the hub's secret")
    view = here.start()
    assert (view.state, view.model, view.words) == ("answering", "heart@1", "")
    reply = ask(view.url, 3, 4).json()
    assert (reply["model"], reply["version"], reply["digest"]) == ("heart", 1, here.model.weights)
    assert reply["answers"] == [{"risk": 7.0, "threads": 1, "secret": ""}, {"risk": 9.0, "threads": 1, "secret": ""}]
    with ThreadPoolExecutor(16) as clients:
        replies = list(clients.map(lambda n: ask(view.url, None if n == 40 else n + 100), range(80)))
    assert [reply.status_code for n, reply in enumerate(replies) if n != 40] == [200] * 79
    assert all(reply.json()["answers"][0]["risk"] == 2 * (n + 100) + 1 for n, reply in enumerate(replies) if n != 40)
    assert replies[40].status_code == 500
    assert replies[40].json()["error"] == "task.py: line 16: ValueError: age is needed"
    assert httpx.get(f"{view.url}/stats").json()["requests"] == 80
    assert here.deployments.views() == (view,)
    with pytest.raises(Invalid, match="answering already; stop it first"):
        here.start()
    assert here.deployments.stop("heart").state == "stopped"
    assert refused(view.url)
    assert here.deployments.views() == ()
    with pytest.raises(NotFound, match="'heart'"):
        here.deployments.stop("heart")
    assert "the task is imported" in (here.folder / "logs" / "heart.log").read_text()


def test_requests_in_flight_are_answered_before_it_ends(here):
    view = here.start()
    with ThreadPoolExecutor(1) as client:
        slow = client.submit(ask, view.url, 13)
        assert eventually((here.bundle / "computing").exists)
        here.deployments.stop("heart")
        assert slow.result().json()["answers"][0]["risk"] == 27.0


def test_a_port_in_use_is_told_and_another_try_replaces_the_failure(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        view = here.start(port=port)
        assert view.state == "failed"
        assert view.words.startswith(f"port: {port} cannot be had (Address already in use); stop what holds it")
        assert here.deployments.views() == (view,)
    assert here.start(port=port).url == f"http://127.0.0.1:{port}"


def test_one_that_is_stopped_while_it_starts_is_not_there_and_another_takes_its_place(here):
    (here.bundle / "task.py").write_text("import time\nopen(__file__ + '.seen', 'w').close()\ntime.sleep(60)\n")
    with ThreadPoolExecutor(1) as starter:
        starting = starter.submit(here.start)
        assert eventually((here.bundle / "task.py.seen").exists)
        assert here.deployments.stop("heart").state == "stopped"
        view = starting.result()
    assert (view.state, view.url) == ("failed", "")
    assert "its process ended before it was ready" in view.words
    assert here.deployments.views() == ()
    assert replicas_of(os.getpid()) == []
    (here.bundle / "task.py").write_text(TASK)
    assert here.start().state == "answering"


def test_what_cannot_be_loaded_is_told(here):
    (here.bundle / "task.py").write_text(TASK.replace("torch.nn.Linear(1, 1)", "torch.nn.Linear(1, 2)"))
    view = here.start()
    assert view.state == "failed"
    assert "tensor weight [2, 1] where the weights have weight [1, 1]" in view.words


def test_a_process_that_dies_while_it_loads_is_told(here):
    (here.bundle / "task.py").write_text("import os\nos._exit(3)\n")
    view = here.start()
    assert view.state == "failed"
    assert "its process ended before it was ready (exit code 3); its log is " in view.words


def test_a_replica_that_was_killed_is_seen_as_failed(here):
    view = here.start()
    (replica,) = replicas_of(os.getpid())
    os.kill(replica, signal.SIGKILL)
    assert eventually(lambda: here.deployments.views()[0].state == "failed")
    assert "its process ended (signal SIGKILL); deploy it again" in here.deployments.views()[0].words
    assert refused(view.url)


def test_a_replica_ends_when_its_hub_is_killed(here):
    placement = Placement(
        deployment=Deployment(name="heart", model="heart@1"),
        model=here.model,
        bundle=str(here.bundle),
        weights=str(here.weights),
        columns={"age": "double"},
    )
    hub = """
import sys, time
from pathlib import Path
from atoll.serving.deployments import Deployments
from atoll.serving.placement import Placement
p = Placement.model_validate_json(sys.argv[1])
view = Deployments(Path(sys.argv[2])).start(p.deployment, p.model, Path(p.bundle), Path(p.weights), p.columns)
print(view.url, flush=True)
time.sleep(60)
"""
    arguments = [sys.executable, "-c", hub, placement.model_dump_json(), str(here.folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert ask(url, 1).status_code == 200
        process.kill()
    assert eventually(lambda: refused(url))


def replicas_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended while we looked
            continue
        if int(fields[1]) == parent and b"atoll.serving.replica" in words:
            found.append(int(entry.name))
    return found
