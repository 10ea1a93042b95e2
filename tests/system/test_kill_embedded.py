"""kill -9 of sites that the hub itself started: it starts them again, and a run ends as if nothing had happened."""

import os
import signal
import time
from pathlib import Path

import pytest

from atoll.runtime.hosted import SiteProcess
from tests.system.processes import descendants

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

KEPT = {  # AdamW inside, whose state at the site goes on from round to round
    "name": "kept",
    "optimiser": {"kind": "adamw", "rate": 0.05},
    "sync": {"preset": "diloco", "period": 3},
}


@pytest.fixture(scope="module")
def home(make_home, tmp_path_factory):
    """A hub with the sites berlin and oslo of its own."""
    home = make_home(tmp_path_factory.mktemp("embedded"))
    home.site("berlin", rows=60)
    home.site("oslo", rows=90, slow=1.0)
    hub = home.start("hub", "start")
    home.seen("site.connected", site__name="oslo")
    yield home
    (home.path / "hold").unlink(missing_ok=True)
    hub.end()
    assert home.empty(), "a site that was started again ends with the hub too"
    home.verify()


@pytest.fixture(scope="module")
def expected(home):
    """The weights after each stage of a run that nobody disturbed."""
    return home.weights(home.asked("run", home.job(**KEPT))["run"])


def agent(home, name: str) -> int:
    """Return the process that serves a site."""
    word = str(home.path / "sites" / name).encode()
    [pid] = [
        pid for pid in home.pids("atoll.runtime.site") if word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    return pid


def workers(home, pid: int) -> list[int]:
    """Return the worker processes that there are below an agent."""
    return sorted(descendants(pid) & set(home.pids("atoll.runtime.worker")))


def begin(home, **changes):
    """Start a run and stop at its second round (stage 3): berlin has answered, oslo stands still."""
    hold = home.path / "hold"
    hold.touch()
    head = home.head()
    command = home.start("run", home.job(**changes, task__params={"hold": str(hold)}), "--json")
    run = home.seen("run.submitted", after=head)[0].event.run
    home.seen("run.answered", run=run, answer__position=3, answer__site="berlin")
    return command, run, hold


@pytest.mark.parametrize("whom", ["the agent alone", "the agent and its workers"])
def test_a_killed_site_comes_back_by_itself_and_the_run_ends_with_the_same_weights(home, expected, eventually, whom):
    command, run, hold = begin(home, **KEPT)
    killed = agent(home, "oslo")
    theirs = workers(home, killed)
    assert theirs
    os.killpg(killed, signal.SIGKILL)
    if whom == "the agent and its workers":
        for worker in theirs:
            os.killpg(worker, signal.SIGKILL)
    assert eventually(lambda: not set(theirs) & set(home.pids())), "workers end with their agent"
    home.seen("run.lost", run=run, site="oslo")
    home.seen("run.joined", count=2, run=run, site="oslo")
    assert agent(home, "oslo") != killed
    hold.unlink()
    assert command.process.wait(90) == 0, command.said
    assert home.weights(run) == expected
    assert len(home.published(run)) == 1


def test_what_a_killed_site_lost_on_the_wire_before_is_fed_back_by_the_one_that_is_started_again(home):
    sparse = [{"kind": "topk", "share": 0.3}, {"kind": "int8"}]
    changes = {"name": "sparse", "sync": {"preset": "fedavg", "period": 3, "wire": sparse}}
    undisturbed = home.weights(home.asked("run", home.job(**changes))["run"])
    command, run, hold = begin(home, **changes)
    residuals = list((home.path / "sites" / "oslo" / "runs" / run).glob("residual-*.f32"))
    os.kill(agent(home, "oslo"), signal.SIGKILL)
    home.seen("run.joined", count=2, run=run, site="oslo")
    hold.unlink()
    assert command.process.wait(90) == 0, command.said
    assert [path.name for path in residuals] == ["residual-2.f32"]
    assert home.weights(run) == undisturbed


@pytest.mark.slow
def test_a_quorum_goes_on_without_a_killed_site_and_takes_it_back(home):
    wait = {"kind": "quorum", "count": 1, "deadline": 0.5}
    command, run, hold = begin(home, steps=3000, sync={"preset": "fedavg", "period": 3, "wait": wait})
    os.kill(agent(home, "oslo"), signal.SIGKILL)
    home.seen("run.merged", run=run, position=3, sites=("berlin",))
    hold.unlink()
    back = home.seen("run.joined", count=2, run=run, site="oslo")[-1].seq
    home.seen("run.merged", after=back, run=run, sites=("berlin", "oslo"))
    home.atoll("cancel", run)
    assert command.process.wait(30) == 130


def told(home, site: str) -> str:
    return next(view["words"] for view in home.asked("sites") if view["name"] == site)


def test_a_site_whose_document_is_wrong_is_told_of_and_comes_back_once_it_is_mended(home, eventually):
    document = home.path / "sites" / "oslo" / "site.yaml"
    right = document.read_text()
    document.write_text("name: oslo\nregoin: north\n")
    head = home.head()
    os.kill(agent(home, "oslo"), signal.SIGKILL)
    assert eventually(lambda: "regoin: unknown field" in told(home, "oslo"), pause=0.5)
    document.write_text(right)
    home.seen("site.connected", after=head, site__name="oslo")
    assert eventually(lambda: told(home, "oslo") == "", pause=0.5)


def test_a_process_that_ends_at_once_is_told_in_its_own_last_words(tmp_path):
    (tmp_path / "agent.log").write_text("words of an earlier life\n")
    life = SiteProcess(tmp_path, "tcp://127.0.0.1:1", "s" * 32, 1)
    life.wait(time.monotonic() + 20)
    assert life.ended().startswith("ended with exit code 2: ")
    assert "no site lives here" in life.ended()
