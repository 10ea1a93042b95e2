"""Sites that die, fall silent and come back, as processes of their own that joined a hub with a token."""

import os
import signal
from types import SimpleNamespace

import pytest

from atoll.boundary.channel import HEARTBEAT, SILENCE
from atoll.journal import Journal

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def fleet(make_home, tmp_path_factory):
    """A hub, and the sites berlin and oslo (which stands still when told to), each with its home and its token."""
    path = tmp_path_factory.mktemp("fleet")
    hub = make_home(path / "hub")
    daemon = hub.start("hub", "start")
    hub.seen("site.connected", site__name="local")
    sites, tokens, agents = {}, {}, {}
    for name, slow, rows in (("berlin", 0.0, 60), ("oslo", 1.0, 90)):
        sites[name] = make_home(path / name)
        sites[name].site(name, slow=slow, rows=rows)
        tokens[name] = hub.asked("site", "invite", name)["token"]
        agents[name] = sites[name].start("join", tokens[name])
    for name in sites:
        hub.seen("site.connected", site__name=name)
    fleet = SimpleNamespace(hub=hub, sites=sites, tokens=tokens, agents=agents, daemon=daemon, hold=path / "hold")
    view = hub.asked("run", hub.job())
    fleet.expected = hub.weights(view["run"])
    yield fleet
    fleet.hold.unlink(missing_ok=True)
    assert fleet.daemon.end() == 128 + signal.SIGTERM
    for name, agent in fleet.agents.items():
        agent.end()
        with Journal(sites[name].path / "sites" / name / "journal.db", name, read_only=True) as journal:
            assert journal.verify().intact
    assert all(home.empty() for home in (hub, *sites.values()))
    assert hub.asked("audit", "verify")[0]["intact"]


def begin(fleet, **changes):
    """Start a run and stop at its second round (stage 3): berlin has answered, oslo stands still."""
    fleet.hold.touch()
    head = fleet.hub.head()
    command = fleet.hub.start("run", fleet.hub.job(task__params={"hold": str(fleet.hold)}, **changes), "--json")
    run = fleet.hub.seen("run.submitted", after=head)[0].event.run
    fleet.hub.seen("run.answered", run=run, answer__position=3, answer__site="berlin")
    return command, run


def rejoin(fleet):
    fleet.agents["oslo"] = fleet.sites["oslo"].start("join", fleet.tokens["oslo"])


def ended_well(fleet, command, run) -> None:
    assert command.process.wait(90) == 0, command.said
    assert fleet.hub.weights(run) == fleet.expected
    assert len(fleet.hub.published(run)) == 1


def test_a_round_that_waits_for_all_waits_for_a_killed_site_to_rejoin(fleet):
    command, run = begin(fleet)
    fleet.agents["oslo"].kill()
    fleet.hub.seen("run.lost", run=run, site="oslo")
    assert fleet.sites["oslo"].empty(), "workers end with their agent"
    view = fleet.hub.asked("runs", "show", run)
    assert (view["state"], view["round"], view["sites"]["oslo"]["connected"]) == ("running", 1, False)
    fleet.hold.unlink()
    rejoin(fleet)
    ended_well(fleet, command, run)


def test_a_killed_worker_is_replaced_by_its_agent(fleet):
    command, run = begin(fleet)
    oslo = fleet.sites["oslo"]
    (worker,) = oslo.pids("atoll.runtime.worker")
    fleet.hold.unlink()
    os.kill(worker, signal.SIGKILL)
    ended_well(fleet, command, run)
    (other,) = oslo.pids("atoll.runtime.worker")
    assert other != worker
    assert not [entry for entry in fleet.hub.journal("run.lost") if entry.event.run == run]


def test_a_hub_killed_under_joined_sites_is_dialled_again(fleet):
    command, run = begin(fleet)
    fleet.daemon.kill()
    assert command.process.wait(60) == 5  # unavailable: it cannot follow a hub that is gone
    assert "atoll resume" in command.said
    assert "Traceback" not in command.said
    fleet.hold.unlink()
    fleet.daemon = fleet.hub.start("hub", "start")
    fleet.hub.seen("site.connected", count=2, site__name="local")
    ended_well(fleet, fleet.hub.start("resume", "--json"), run)


def test_a_hub_ends_in_time_though_a_site_is_silent(fleet):
    agent = fleet.agents["oslo"].process
    agent.send_signal(signal.SIGSTOP)
    try:
        assert fleet.daemon.end() == 128 + signal.SIGTERM, fleet.daemon.said
    finally:
        agent.send_signal(signal.SIGCONT)
    head = fleet.hub.head()
    fleet.daemon = fleet.hub.start("hub", "start")
    for name in ("berlin", "oslo"):
        fleet.hub.seen("site.connected", after=head, site__name=name)


@pytest.mark.slow
def test_a_quorum_goes_on_without_a_killed_site_and_without_a_silent_one_and_takes_both_back(fleet):
    quorum = {"kind": "quorum", "count": 1, "deadline": 0.5}
    sync = {"preset": "fedavg", "period": 3, "wait": quorum}
    command, run = begin(fleet, steps=3000, sync=sync)
    fleet.agents["oslo"].kill()
    alone = fleet.hub.seen("run.merged", run=run, position=3)[0].event
    assert alone.sites == ("berlin",)
    fleet.hold.unlink()
    rejoin(fleet)
    back = fleet.hub.seen("run.joined", count=2, run=run, site="oslo")[-1].seq
    fleet.hub.seen("run.merged", after=back, run=run, sites=("berlin", "oslo"))

    agent = fleet.agents["oslo"].process
    head = fleet.hub.head()
    agent.send_signal(signal.SIGSTOP)
    try:
        gone = fleet.hub.seen("site.disconnected", after=head, site="oslo")[0]
        stopped = fleet.hub.journal("run.merged", after=head)[0].time
        assert gone.event.words == f"not heard for {SILENCE:g} s"
        assert gone.time - stopped < SILENCE + 5 * HEARTBEAT
        fleet.hub.seen("run.merged", after=gone.seq, run=run, sites=("berlin",))
    finally:
        agent.send_signal(signal.SIGCONT)
    fleet.hub.seen("run.joined", after=gone.seq, run=run, site="oslo")
    fleet.hub.seen("run.merged", after=gone.seq, run=run, sites=("berlin", "oslo"))
    fleet.hub.atoll("cancel", run)
    assert command.process.wait(30) == 130
    assert not fleet.hub.published(run)
