"""kill -9 under rounds that are begun ahead: of the hub with all it started, and of one site, at whatever instant."""

import os
import random
import signal
import time

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

STREAMING = {
    "name": "parts",
    "steps": 23,
    "optimiser": {"kind": "adamw", "rate": 0.05},
    "sync": {"preset": "streaming_diloco", "period": 8, "fragments": 2, "delay": 2},
}


def lay(make_home, path):
    home = make_home(path)
    home.site("berlin", rows=60)
    home.site("oslo", rows=90, slow=1.0)  # by the pause that a job asks for
    return home


@pytest.fixture(scope="module")
def expected(make_home, tmp_path_factory):
    """The weights after each stage of a run that nobody disturbed."""
    (found,) = lay(make_home, tmp_path_factory.mktemp("undisturbed")).undisturbed(STREAMING)
    assert len(found) == 1 + 6
    return found


@pytest.fixture
def place(make_home, tmp_path):
    home = lay(make_home, tmp_path / "home")
    yield home
    home.close()


@pytest.mark.slow
def test_a_hub_killed_with_its_sites_at_random_instants_ends_with_the_undisturbed_weights(place, expected):
    chance = random.Random(15)
    hub = place.start("run", place.job(**STREAMING, task__params={"pause": 0.1}))
    run = place.seen("run.submitted")[0].event.run
    for _ in range(4):
        merged = place.head()
        place.seen("run.answered", after=merged)  # of whichever stage it is at
        time.sleep(chance.uniform(0.0, 0.6))  # in the middle of the next round's steps, begun ahead or not
        hub.kill()
        hub = place.start("resume", "--json")
    assert hub.process.wait(90) == 0, hub.said
    assert "Traceback" not in hub.said
    assert place.weights(run) == expected
    place.verify()


def test_sites_and_workers_killed_while_they_are_ahead_change_no_bit(place, expected):
    chance = random.Random(16)
    hub = place.start("hub", "start")
    place.seen("site.connected", site__name="oslo")
    command = place.start("run", place.job(**STREAMING, task__params={"pause": 0.1}), "--json")
    run = place.seen("run.submitted")[0].event.run
    for position, module in ((3, "atoll.runtime.worker"), (4, "atoll.runtime.site"), (6, "atoll.runtime.worker")):
        place.seen("run.answered", run=run, answer__position=position)
        time.sleep(chance.uniform(0.0, 0.4))
        for pid in place.pids(module)[:1]:
            os.kill(pid, signal.SIGKILL)
    assert command.process.wait(120) == 0, command.said
    assert place.weights(run) == expected
    assert hub.end() == 128 + signal.SIGTERM
    place.verify()
