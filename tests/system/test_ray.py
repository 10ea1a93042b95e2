"""A site whose ranks are Ray actors: a run's bits, a killed actor, a cancelled run, a killed site, unfit clusters."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.errors import Unavailable
from atoll.runtime.actors import RayExecutor
from atoll.spec.fleet import Executor
from tests.system.processes import alive, descendants

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
TWO = {"layout": {"data": 2}, "optimiser": {"kind": "adamw", "rate": 0.05}}
TOKEN = "t" * 32


@pytest.fixture(scope="module")
def home(make_home, tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("ray"))
    home.site("lyon", slow=1.0)
    return home


@pytest.fixture(scope="module")
def expected(home):
    """The weights after each stage with two local processes."""
    run = home.asked("run", home.job(**TWO))["run"]
    assert len(home.weights(run)) > 3
    return home.weights(run)


@pytest.fixture(scope="module")
def hub(with_ray, home, expected):
    """A hub that runs, with the site as it was, but for its document."""
    with (home.path / "sites" / "lyon" / "site.yaml").open("a") as document:
        document.write("executor: {kind: ray}\nnodes:\n- devices: [{}, {}]\n")
    head = home.head()
    hub = home.start("hub", "start")
    home.seen("site.connected", after=head, site__name="lyon")
    yield hub
    hub.end()
    assert home.empty(), [title(pid) for pid in home.pids()]


def seats(hub):
    return [pid for pid in descendants(hub.process.pid) if title(pid).startswith(b"ray::Seat")]


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def begin(home):
    """Start a run and stop in its second round; return it and the file that holds it."""
    hold = home.path / "hold"
    hold.touch()
    head = home.head()
    command = home.start("run", home.job(**TWO, task__params={"hold": str(hold)}), "--json")
    run = home.seen("run.submitted", after=head)[0].event.run
    home.seen("run.merged", run=run, count=1)
    return command, run, hold


def test_law_two_ranks_as_ray_actors_give_the_bits_of_two_local_processes(home, expected, hub):
    run = home.asked("run", home.job(**TWO))["run"]
    assert home.weights(run) == expected
    assert len(seats(hub)) == 2, "the ranks stay warm"


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_the_run_ends(home, expected, hub, eventually):
    command, run, hold = begin(home)
    workers, (killed, _) = home.pids("atoll.runtime.worker"), seats(hub)
    assert len(workers) == 2
    [lost] = descendants(killed) & set(workers)
    os.kill(killed, signal.SIGKILL)
    assert eventually(lambda: not alive(lost))
    assert eventually(lambda: len(home.pids("atoll.runtime.worker")) == 2), "another has its place"
    hold.unlink()
    assert command.process.wait(90) == 0, command.said
    assert home.weights(run).keys() == expected.keys()  # one rank alone may round to other bits


def test_a_cancelled_run_leaves_no_rank_and_a_killed_site_no_ray(home, hub, eventually):
    command, run, hold = begin(home)
    assert home.pids("atoll.runtime.worker")
    home.atoll("cancel", run)
    assert eventually(lambda: not home.pids("atoll.runtime.worker") and not seats(hub))
    command.process.wait(30)
    hold.unlink()
    below = descendants(hub.process.pid)
    names = b" ".join(title(pid) for pid in below)
    assert b"raylet" in names
    assert b"gcs_server" in names
    [agent] = home.pids("atoll.runtime.site")
    hub.process.send_signal(signal.SIGSTOP)  # or it would start the site again
    os.kill(agent, signal.SIGKILL)
    assert eventually(lambda: not any(alive(pid) for pid in below))
    hub.process.send_signal(signal.SIGCONT)


# --- clusters that a site does not join


@pytest.fixture
def directory(with_ray, tmp_path):
    """Start the process of a Ray cluster that drivers ask first, and nothing else of it."""
    import ray

    program = Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server"
    started = []

    def start(**environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(program), f"--gcs_server_port={port}", "--node_ip_address=127.0.0.1", f"--log_dir={tmp_path}"]
        with (tmp_path / "gcs.log").open("wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **environment})
        started.append(process)
        return f"127.0.0.1:{port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def refused(address, folder):
    executor = RayExecutor(Executor(kind="ray", address=address), 1, folder)
    with pytest.raises(Unavailable) as refusal:
        executor.nodes()
    executor.close()
    return str(refusal.value)


def test_a_cluster_without_tokens_is_not_joined(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    words = refused(directory(RAY_AUTH_MODE="disabled"), tmp_path)
    assert "lets in whoever asks, and runs their code; start it with RAY_AUTH_MODE=token on every node" in words


def test_a_cluster_with_another_token_or_of_another_version_is_told(directory, tmp_path, monkeypatch):
    address = directory(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "u" * 32)
    assert "does not take this site's token; put its token in RAY_AUTH_TOKEN" in refused(address, tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    old = {"ray_version": "2.40.0", "python_version": "3.9.1", "ray_init_cluster": False}
    store = f"GcsClient(address={address!r}).internal_kv_put(b'CLUSTER_METADATA', {json.dumps(old)!r}.encode(), True"
    subprocess.run(
        [sys.executable, "-c", f"from ray._raylet import GcsClient; {store}, namespace=b'cluster')"],
        env={**os.environ, "RAY_AUTH_MODE": "token"},
        check=True,
        timeout=60,
    )
    words = refused(address, tmp_path)
    assert "has Ray 2.40.0 and Python 3.9.1, and this site Ray 2." in words


def test_an_address_where_no_ray_answers_is_told(with_ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and it does not listen
        words = refused(f"127.0.0.1:{bound.getsockname()[1]}", tmp_path)
    assert "no Ray answers at 127.0.0.1:" in words
