"""Processes of a tree, each killed in the middle of a round: hub - alps - berlin and oslo, with the hub's own local."""

import signal
import socket
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def fleet(make_home, tmp_path_factory):
    """A hub, the relay alps, and behind it berlin and oslo (which stands still when told to), each with its home."""
    path, port = tmp_path_factory.mktemp("tree"), free_port()
    hub, relay = make_home(path / "hub"), make_home(path / "alps")
    daemon = hub.start("hub", "start")
    hub.seen("site.connected", site__name="local")
    relay.atoll("site", "add", "alps")
    token = hub.asked("site", "invite", "alps", "--relay", f"127.0.0.1:{port}")["token"]
    begin = ("relay", "start", token, "--host", "127.0.0.1", "--port", port)
    fleet = SimpleNamespace(hub=hub, relay=relay, begin=begin, sites={}, tokens={}, agents={}, hold=path / "hold")
    fleet.daemon, fleet.alps = daemon, relay.start(*begin)
    hub.seen("site.connected", site__name="alps")
    for name, slow, rows in (("berlin", 0.0, 60), ("oslo", 1.0, 90)):
        fleet.sites[name] = make_home(path / name)
        fleet.sites[name].site(name, slow=slow, rows=rows)
        fleet.tokens[name] = hub.asked("site", "invite", name, "--behind", "alps")["token"]
        fleet.agents[name] = fleet.sites[name].start("join", fleet.tokens[name])
    for name in fleet.sites:
        hub.seen("site.connected", site__name=name)
    fleet.expected = hub.weights(hub.asked("run", hub.job())["run"])
    yield fleet
    fleet.hold.unlink(missing_ok=True)
    assert fleet.daemon.end() == 128 + signal.SIGTERM
    for started in (fleet.alps, *fleet.agents.values()):
        started.end()
    assert all(home.empty() for home in (hub, relay, *fleet.sites.values()))
    assert hub.asked("audit", "verify")[0]["intact"]


def begin(fleet, **changes):
    """Start a run and stop at its second round (stage 3): alps has berlin's update in its spool, oslo stands still."""
    fleet.hold.touch()
    head = fleet.hub.head()
    command = fleet.hub.start("run", fleet.hub.job(task__params={"hold": str(fleet.hold)}, **changes), "--json")
    run = fleet.hub.seen("run.submitted", after=head)[0].event.run
    return command, run


def spooled(fleet, eventually, run):
    spool = fleet.relay.path / "sites" / "alps" / "runs" / run / "spool"
    assert eventually(lambda: list(spool.glob("3-berlin.update"))), "berlin's update never came to the relay"


def ended_well(fleet, command, run) -> None:
    assert command.process.wait(90) == 0, command.said
    assert fleet.hub.weights(run) == fleet.expected
    assert len(fleet.hub.published(run)) == 1
    sums = [entry.event for entry in fleet.hub.journal("run.answered") if entry.event.run == run]
    assert all(len(event.answers) == 2 for event in sums if event.answer.via)
    assert [event.answer.position for event in sums if event.answer.via] == [2, 3, 4, 5]


def test_the_hub_knows_who_is_behind_the_relay(fleet):
    found = {site["name"]: (site["connected"], site["relay"], site["behind"]) for site in fleet.hub.asked("sites")}
    assert found["alps"] == (True, True, "")
    assert found["berlin"] == found["oslo"] == (True, False, "alps")


def test_a_relay_killed_in_mid_round_comes_back_and_the_round_ends_with_the_same_bits(fleet, eventually):
    command, run = begin(fleet)
    spooled(fleet, eventually, run)
    fleet.alps.kill()
    for name in fleet.sites:
        fleet.hub.seen("run.lost", run=run, site=name)
    fleet.hold.unlink()
    fleet.alps = fleet.relay.start(*fleet.begin)
    ended_well(fleet, command, run)


def test_a_site_behind_it_killed_in_mid_round_comes_back_and_the_round_ends_with_the_same_bits(fleet, eventually):
    command, run = begin(fleet)
    spooled(fleet, eventually, run)
    fleet.agents["oslo"].kill()
    fleet.hub.seen("run.lost", run=run, site="oslo")
    fleet.hold.unlink()
    fleet.agents["oslo"] = fleet.sites["oslo"].start("join", fleet.tokens["oslo"])
    ended_well(fleet, command, run)


@pytest.mark.slow
def test_a_hub_killed_over_it_finds_its_sites_again_and_the_round_ends_with_the_same_bits(fleet, eventually):
    command, run = begin(fleet)
    spooled(fleet, eventually, run)
    fleet.daemon.kill()
    command.process.wait(60)
    fleet.hold.unlink()
    head = fleet.hub.head()
    fleet.daemon = fleet.hub.start("hub", "start")
    for name in (*fleet.sites, "local"):
        fleet.hub.seen("site.connected", after=head, site__name=name)
    ended_well(fleet, fleet.hub.start("resume", "--json"), run)


def test_a_relay_that_is_revoked_is_out_at_once_with_all_behind_it(fleet):
    head = fleet.hub.head()
    fleet.hub.atoll("site", "revoke", "alps")
    for name in ("alps", *fleet.sites):
        fleet.hub.seen("site.disconnected", after=head, site=name)
    assert fleet.alps.process.wait(30) == 3
    assert "revoked" in fleet.alps.said
