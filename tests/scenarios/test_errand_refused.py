"""The site's side of an update that the hub does not take: it fails no run, and what is on the disk is doubted."""

import numpy as np

from tests.unit.places import SIZE, assign, eventually, update


def test_an_update_that_is_not_taken_fails_no_run_and_is_made_again_when_it_is_asked_for_again(lyon, errand):
    lyon.hub.picky = 1
    errand.assign(assign())
    assert eventually(lambda: lyon.hub.refused)
    errand.assign(assign())
    _, vector = lyon.hub.wait_taken()
    assert np.array_equal(vector, update())
    assert len(lyon.workers.did("train")) == 2
    assert [one for one in lyon.hub.heard_ if one.kind in ("failure", "refusal")] == []


def test_what_the_disk_changed_of_an_update_is_sent_at_most_once(lyon, errand):
    lyon.hub.picky = 1
    errand.assign(assign())
    assert eventually(lambda: lyon.hub.refused)
    (lyon.runs / "run" / "update-2.f32").write_bytes(np.full(SIZE, np.nan, np.float32).tobytes())
    errand.assign(assign())
    _, vector = lyon.hub.wait_taken()
    assert np.array_equal(vector, update())
    assert len(lyon.workers.did("train")) == 2


def test_after_an_update_that_was_not_taken_the_next_round_is_done(lyon, errand):
    lyon.hub.picky = 1
    errand.assign(assign())
    assert eventually(lambda: lyon.hub.refused)
    errand.assign(assign(position=3))
    assert lyon.hub.wait_taken()[0].answer.position == 3
