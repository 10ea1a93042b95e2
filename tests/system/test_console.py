"""The console over real processes: many readers at once, an impatient hand, a token nobody sees, what a hub leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from atoll.console.client import Client
from atoll.console.host import find
from atoll.console.streams import STREAMS
from atoll.errors import Unavailable

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
CANCELLED = 130
READERS = 60  # more than the threads that answer calls


@pytest.fixture(scope="module")
def place(make_home, tmp_path_factory):
    """A hub that runs, with a site whose runs stand still in their second round while `hold` is there."""
    home = make_home(tmp_path_factory.mktemp("console"))
    home.site("bonn", slow=1.0)
    (home.path / "hold").touch()
    home.start("hub", "start")
    home.seen("site.connected")
    yield home
    home.started[0].end()
    assert home.empty()


@pytest.fixture
def hub(place, eventually):
    assert eventually(lambda: find(place.path) is not None)
    address = find(place.path)
    assert address is not None
    with Client(address) as client:
        yield client


class Reader(threading.Thread):
    """Reads one run's stream to its end, as a browser does."""

    def __init__(self, hub: Client, run: str) -> None:
        super().__init__()
        self.views: list[dict] = []
        self.began = threading.Event()
        self._url = f"{hub.address.url}/v1/runs/{run}/events"
        self._headers = {"Authorization": f"Bearer {hub.address.token}"}
        self.start()

    def run(self) -> None:
        with httpx.stream("GET", self._url, headers=self._headers, timeout=60, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.views.append(json.loads(line.removeprefix("data: ")))
                    self.began.set()


def test_many_readers_of_a_run_keep_nobody_from_the_api_and_all_see_its_end(place, hub):
    command = place.start("run", place.job(task__params={"hold": str(place.path / "hold")}))
    run = place.seen("run.answered")[0].event.run
    readers = [Reader(hub, run) for _ in range(READERS)]
    assert all(reader.began.wait(30) for reader in readers)
    assert hub.run(run).state == "running"
    assert [view.run for view in hub.runs()] == [run]
    (place.path / "hold").unlink()
    for reader in readers:
        reader.join(60)
        assert reader.views[-1]["state"] == "finished"
        assert [number for number, view in enumerate(reader.views) if view.get("plan")] == [0], "the plan is told once"
    assert all(view.plan is not None for view in hub.follow(run)), "who follows by the client always has it"
    assert command.process.wait(30) == 0, command.said
    (place.path / "hold").touch()


def test_a_stream_too_many_is_refused_in_words_and_a_closed_one_makes_room(hub, eventually):
    port = int(hub.address.url.rsplit(":", 1)[1])
    asked = f"GET /v1/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {hub.address.token}\r\n\r\n"

    def opened() -> tuple[socket.socket, bytes]:
        made = socket.create_connection(("127.0.0.1", port), timeout=30)
        made.sendall(asked.encode())
        return made, made.recv(1000)

    streams = [opened() for _ in range(STREAMS)]
    try:
        assert {said[:15] for _, said in streams} == {b"HTTP/1.1 200 OK"}
        with pytest.raises(Unavailable, match=f"{STREAMS} are open already"):
            list(hub.follow(hub.runs()[0].run))
    finally:
        for stream, _ in streams:
            stream.close()

    def room() -> bool:
        made, said = opened()
        made.close()
        return said.startswith(b"HTTP/1.1 200 OK")

    assert eventually(room)


# "decision": the hub has been asked and has not taken the job yet
@pytest.mark.parametrize("when", ["decision", "run.submitted"])
def test_ctrl_c_while_a_job_is_handed_in_leaves_no_run_behind(place, hub, when):
    head = place.head()
    command = place.start("run", place.job(name=f"hasty-{when[:3]}", task__params={"hold": str(place.path / "hold")}))
    place.seen(when, after=head)
    assert command.end(signal.SIGINT) == CANCELLED, command.said
    assert "Traceback" not in command.said
    submitted = [entry.event.run for entry in place.journal("run.submitted", after=head)]
    cancelled = [entry.event.run for entry in place.journal("run.cancelled", after=head)]
    assert len(submitted) == 1
    assert submitted == cancelled
    assert hub.run(submitted[0]).state == "cancelled"


def test_a_token_that_is_read_from_standard_input_is_seen_nowhere(place, make_home, tmp_path):
    token = place.asked("site", "invite", "oslo")["token"]
    other = make_home(tmp_path / "oslo")
    other.site("oslo")
    command = [sys.executable, "-m", "atoll.console.cli", "--home", str(other.path), "join", "-"]
    scratch = other.path / "tmp"
    scratch.mkdir()
    with (scratch / "join.err").open("wb") as said:
        joining = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=said, env={**os.environ, "TMPDIR": str(scratch)}
        )
    assert joining.stdin is not None
    joining.stdin.write(token.encode() + b"\n")
    joining.stdin.close()
    place.seen("site.connected", site__name="oslo")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert token.encode() not in (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    joining.send_signal(signal.SIGINT)
    assert joining.wait(30) == 0, (scratch / "join.err").read_text()
    assert other.empty()


def test_deployments_come_back_with_a_hub_and_not_with_resume(home, eventually):
    home.site("bonn")
    hub = home.start("hub", "start")
    home.seen("site.connected")
    home.asked("run", home.job())
    home.atoll("deploy", "risk@1", "--name", "heart")
    hub.kill()
    assert eventually(home.empty)
    said = home.start("resume")
    assert said.process.wait(60) == 0, said.said
    assert "Not started here: heart; deployments live with a hub, start one with `atoll hub start`." in said.said
    row = '{"age": 66, "dose": 0.4}'
    assert "heart: is stopped" in home.atoll("predict", "heart", "--row", row, code=Unavailable.exit_code)
    hub = home.start("hub", "start")
    assert eventually(lambda: "Deployment heart: risk@1 answers at http://127.0.0.1:" in hub.said), hub.said
    assert 0 < home.asked("predict", "heart", "--row", row)["answers"][0]["risk"] < 1
    assert hub.end(signal.SIGINT) == 0, hub.said
    home.atoll("undeploy", "heart")  # also while it rests
    assert home.asked("deployments") == []
    assert home.empty()
