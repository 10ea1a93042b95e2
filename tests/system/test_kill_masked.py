"""kill -9 under secure sums: of the hub with all it started, and of a site; a sum is begun anew, to the same bits."""

import os
import signal
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

MASKED = {
    "name": "masked",
    "steps": 12,
    "optimiser": {"kind": "adamw", "rate": 0.05},
    "sync": {"preset": "fedavg", "period": 4, "wire": [{"kind": "clip", "value": 5.0}, {"kind": "mask"}]},
}


def lay(make_home, path):
    home = make_home(path)
    home.site("berlin", rows=60)
    home.site("oslo", rows=90, slow=1.0)  # by the pause that a job asks for
    home.site("rome", rows=70)
    return home


@pytest.fixture(scope="module")
def expected(make_home, tmp_path_factory):
    """The weights after each stage of a run that nobody disturbed."""
    (found,) = lay(make_home, tmp_path_factory.mktemp("undisturbed")).undisturbed(MASKED)
    assert len(found) == 1 + 3
    return found


@pytest.fixture
def place(make_home, tmp_path):
    home = lay(make_home, tmp_path / "home")
    yield home
    home.close()


@pytest.mark.slow
def test_a_hub_killed_in_mid_sum_begins_it_anew_and_ends_with_the_undisturbed_weights(place, expected):
    hub = place.start("run", place.job(**MASKED, task__params={"pause": 0.2}))
    run = place.seen("run.submitted")[0].event.run
    for position in (2, 3):
        place.seen("run.answered", run=run, answer__position=position)  # berlin's or rome's, under masks
        hub.kill()
        hub = place.start("resume", "--json")
    assert hub.process.wait(90) == 0, hub.said
    assert "Traceback" not in hub.said
    assert place.weights(run) == expected
    place.verify()


def test_a_site_killed_in_mid_sum_loses_its_secrets_and_no_bit(place, expected):
    hub = place.start("hub", "start")
    for name in ("berlin", "oslo", "rome"):
        place.seen("site.connected", site__name=name)
    command = place.start("run", place.job(**MASKED, task__params={"pause": 0.2}), "--json")
    run = place.seen("run.submitted")[0].event.run
    place.seen("run.answered", run=run, answer__position=2)  # berlin's or rome's, with masks that oslo has in common
    (oslo,) = [pid for pid in place.pids("atoll.runtime.site") if b"oslo" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(oslo, signal.SIGKILL)
    place.seen("run.restarted", run=run)
    assert command.process.wait(120) == 0, command.said
    assert place.weights(run) == expected
    assert hub.end() == 128 + signal.SIGTERM
    place.verify()
