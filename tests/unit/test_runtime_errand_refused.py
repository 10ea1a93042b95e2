"""The site's side of an update that the hub does not take: it fails no run, and what is on the disk is doubted."""

import numpy as np
import pytest

from atoll.runtime.errand import Errand
from tests.unit.places import SIZE, House, assign, eventually, update


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    yield made
    made.journal.close()


@pytest.fixture
def errand(house):
    made = Errand(house.place, "run")
    yield made
    made.end(keep=True)
    assert made.wait(20)


def test_an_update_that_is_not_taken_fails_no_run_and_is_sent_again_when_it_is_asked_for_again(house, errand):
    house.hub.picky = 1
    errand.assign(assign())
    assert eventually(lambda: house.hub.refused)
    errand.assign(assign())
    _, vector = house.hub.wait_taken()
    assert np.array_equal(vector, update())
    assert len(house.workers.did("train")) == 1
    assert [one for one in house.hub.heard_ if one.kind in ("failure", "refusal")] == []


def test_an_update_that_is_not_taken_is_looked_through_and_trained_again_where_the_disk_changed_it(house, errand):
    house.hub.picky = 1
    errand.assign(assign())
    assert eventually(lambda: house.hub.refused)
    (house.runs / "run" / "update-2.f32").write_bytes(np.full(SIZE, np.nan, np.float32).tobytes())
    errand.assign(assign())
    _, vector = house.hub.wait_taken()
    assert np.array_equal(vector, update())
    assert len(house.workers.did("train")) == 2


def test_after_an_update_that_was_not_taken_the_next_round_is_done(house, errand):
    house.hub.picky = 1
    errand.assign(assign())
    assert eventually(lambda: house.hub.refused)
    errand.assign(assign(position=3))
    assert house.hub.wait_taken()[0].answer.position == 3
