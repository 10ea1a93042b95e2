"""The laptop's own site, a thread of the hub: what ends it is logged, and it is there again."""

import time

import pytest

from atoll.errors import Invalid
from atoll.runtime.desk import Desk
from atoll.runtime.embedded import Embedded
from atoll.spec.message import Ask, Decisions
from tests.unit.houses import House

WAIT = 20.0


class Faulty(Desk):
    """A desk that breaks the session at a policy's answer."""

    def heard(self, site, message):
        if isinstance(message, Decisions):
            raise RuntimeError("a fault of the hub's own")
        super().heard(site, message)


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path, desk=Faulty)
    made.embedded = Embedded(tmp_path, made.desk, "tcp://127.0.0.1:1")
    yield made
    made.embedded.close()
    made.close()


def until(holds):
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_site_within_the_hub_whose_thread_ends_by_a_fault_is_logged_and_started_again(house, caplog):
    house.embedded.start()
    assert house.embedded.words("local") == ""
    for lives in (2, 3):
        house.desk.presence.send("local", Ask(number=1, requests=()))
        until(lambda: not house.desk.presence.here("local"))
        until(lambda: house.desk.presence.here("local"))
        assert len(list(house.journal.entries(kinds=("site.disconnected",)))) == lives - 1
    assert house.embedded.words("local") == "ended: a fault of the hub's own (started again after 0.4 s)"
    assert [record.message for record in caplog.records if record.exc_info] == ["site local"] * 2
    house.embedded.close()
    assert not house.desk.presence.here("local")


def test_a_site_that_cannot_live_in_its_folder_is_told_at_the_start(house, tmp_path):
    folder = tmp_path / "sites" / "local"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("name: local\nregoin: north\n")
    with pytest.raises(Invalid, match="regoin: unknown field"):
        house.embedded.start()
