"""What a site kept of a round is sent for the assignment that it was made for, and for no other."""

import json

import numpy as np
import pytest

from atoll.data.catalogue import Catalogue
from atoll.runtime.errand import Errand
from atoll.spec.budget import Budget
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform
from tests.unit.places import SIZE, STEPS, WAIT, assign, eventually, job, update

CLIP, NOISE, MASK = {"kind": "clip", "value": 1.0}, {"kind": "noise", "value": 100.0}, {"kind": "mask"}
WIDE = {"kind": "clip", "value": 1e6}  # that cuts off nothing
TOGETHER = ("lyon", "oslo", "rome")
PRIVATE = {"steps": 10 * STEPS, "privacy": {"noise": 1.1, "delta": 1e-3}}


def sync(*wire, **fields):
    known = {"period": STEPS, "merge": "mean", "wait": {"patience": WAIT}, "wire": list(wire)}
    return Sync.model_validate({**known, **fields})


def computed(lyon, position=2):
    """Wait until an update lies there that has not left: its sum's keys never come."""
    assert eventually((lyon.runs / "run" / f"update-{position}.json").exists)


def used(lyon, dataset):
    lyon.place.ledger.release("run")
    return lyon.place.ledger.ledger.used(dataset)


def test_what_was_computed_without_clip_and_noise_never_leaves_by_the_name_of_what_has_them(lyon, errand):
    Catalogue(lyon.home).require("rows", (Transform(**CLIP), Transform(**NOISE)))
    errand.assign(assign(sync=sync()))
    assert "clip" in lyon.hub.wait("refusal").words
    errand.assign(assign(sync=sync(CLIP, NOISE)))
    _, sent = lyon.hub.wait_taken()
    assert np.linalg.norm(sent) > 2 * np.linalg.norm(update()), "a hundred times the clip on each number"
    assert len(lyon.workers.did("train")) == 2


def test_noise_that_was_cut_into_the_parts_of_a_sum_is_drawn_anew_where_there_is_none(lyon, errand):
    together = ("lyon", *(f"nobody-{number}" for number in range(999)))
    errand.assign(assign(sync=sync(CLIP, NOISE, MASK), together=together))
    computed(lyon)
    errand.assign(assign(sync=sync(CLIP, NOISE)))
    _, sent = lyon.hub.wait_taken()
    assert len(lyon.workers.did("train")) == 2
    assert np.linalg.norm(sent) > 10 * np.sqrt(SIZE), "of a thousand parts one has a deviation of 3.2"


def test_what_was_made_of_one_dataset_neither_leaves_nor_is_charged_by_the_name_of_another(lyon, errand):
    home = Catalogue(lyon.home)
    home.set_budget("rows", Budget(unit="record", epsilon=8.0, delta=1e-3))
    home.add("open", lyon.file, purposes=("care",), min_group=10)
    errand.assign(assign(job=job(**PRIVATE), sync=sync(WIDE, MASK), together=TOGETHER))
    computed(lyon)
    errand.assign(assign(job=job(**PRIVATE, data={"dataset": "open"}), sync=sync(WIDE)))
    lyon.hub.wait_taken()
    assert len(lyon.workers.did("train")) == 2
    opened = lyon.workers.did("open")
    assert opened[0] != opened[-1], "the second one is of the other dataset"
    assert used(lyon, "rows") == (0.0, 0.0), "what was made of it never left"
    assert used(lyon, "open")[0] > 0


def test_no_round_goes_on_from_the_state_that_another_dataset_left(lyon, errand):
    Catalogue(lyon.home).add("open", lyon.file, purposes=("care",), min_group=10)
    errand.assign(assign(sync=sync(keep_optimiser=True)))
    lyon.hub.wait_taken()
    other = {"job": job(data={"dataset": "open"}), "sync": sync(keep_optimiser=True)}
    errand.assign(assign(position=3, **other))
    words = lyon.hub.wait("refusal").words
    assert words.startswith("lyon refuses: stage 2 of the run was of another job, dataset or promise")
    assert len(lyon.workers.did("train")) == 1


@pytest.mark.parametrize("wire", [(), (CLIP, NOISE)], ids=["plain", "noise"])
def test_an_update_that_is_asked_for_again_is_the_same_bits_whoever_asks(lyon, errand, wire):
    errand.assign(assign(sync=sync(*wire)))
    first = lyon.hub.wait_taken()
    errand.assign(assign(sync=sync(*wire, wait={"patience": 2 * WAIT}), epoch=1, user="ada", layout={"data": 2}))
    second = lyon.hub.wait_taken(2)
    assert first[0].content == second[0].content
    assert np.array_equal(first[1], second[1])
    assert len(lyon.workers.did("train")) == 1


def test_an_update_that_another_version_of_atoll_kept_is_made_anew(lyon, errand):
    errand.assign(assign())
    lyon.hub.wait_taken()
    errand.end(keep=True)
    assert errand.wait(WAIT)
    mark = lyon.runs / "run" / "update-2.json"
    known = json.loads(mark.read_text())
    mark.write_text(json.dumps({name: known[name] for name in known if name not in ("run", "made", "ledger", "unit")}))
    again = Errand(lyon.place, "run")
    again.assign(assign(epoch=1))
    lyon.hub.wait_taken(2)
    again.end(keep=True)
    assert again.wait(WAIT)
    assert len(lyon.workers.did("train")) == 2
