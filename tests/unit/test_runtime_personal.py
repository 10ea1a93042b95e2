"""A site's own tensors from round to round, and beyond the run for the model that came of it."""

import logging
import os
import threading
from pathlib import Path

import pytest

from atoll.errors import Corrupt, NotFound
from atoll.registry.weights import save
from atoll.runtime import personal
from atoll.runtime.errand import Errand, room
from atoll.runtime.kept import RunFolder
from atoll.spec.document import sha256
from atoll.spec.model import TensorSpec, with_control
from atoll.spec.order import Reply
from atoll.spec.sync import Sync
from tests.unit.places import BATCH, SIGNATURE, SIZE, STEPS, WAIT, WEIGHTS, House, assign, job, update

SYNC = Sync.model_validate({"period": STEPS, "keep_local": ["head*"], "wait": {"patience": WAIT}})


def trains(order, group):
    update().tofile(order.output)
    Path(order.local_out).write_bytes(b"own after step %d" % (order.done + order.steps))
    return Reply(examples=STEPS * BATCH, loss=0.5)


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    made.workers.answers["train"] = trains
    yield made
    made.journal.close()


class Site:
    def __init__(self, house):
        self.house, self.errand, self.rounds = house, Errand(house.place, "run"), 0

    def begin(self, *args, **fields):
        self.errand.assign(assign(*args, sync=SYNC, **fields))

    def round(self, position, **fields):
        """Do a round and return the name of what it began from."""
        self.rounds += 1
        self.begin(position=position, **fields)
        self.house.hub.wait_taken(self.rounds)
        path = self.house.workers.did("train")[-1].local_in
        return path and Path(path).name

    def end(self, **how):
        self.errand.end(**{"keep": True, **how})
        assert self.errand.wait(WAIT)

    def restart(self):
        self.end()
        self.errand = Errand(self.house.place, "run")


@pytest.fixture
def site(house):
    made = Site(house)
    yield made
    made.end()


def kept(house):
    folder = house.home / "personal"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("restarts", [False, True])
def test_each_round_goes_on_from_the_newest_one_also_where_the_hub_went_on_without_it(site, restarts):
    rounds = [(2, None, None), (3, 2, "local-2.safetensors"), (4, 2, "local-3.safetensors")]
    for position, counted, begun in rounds:
        assert site.round(position, counted=counted) == begun
        if restarts:
            site.restart()
    site.end()
    assert sorted(path.name for path in (site.house.runs / "run").glob("local-*")) == [
        "local-3.safetensors",
        "local-4.safetensors",
    ]


def test_a_site_evaluates_with_its_own_and_before_its_first_round_with_the_seeds(house, site):
    site.begin("evaluate", position=1, job=job("train"))
    house.hub.wait("done")
    site.round(2)
    site.begin("evaluate", position=3, job=job("train"))
    house.hub.wait("done", 2)
    first, second = house.workers.did("evaluate")
    assert (first.local_in, Path(second.local_in).name) == (None, "local-2.safetensors")
    assert first.keep_local == second.keep_local == ("head*",)


def test_what_is_lost_ends_the_run_in_words(house, site):
    site.round(2)
    site.restart()
    (house.runs / "run" / "local-2.safetensors").unlink()
    site.begin(position=3)
    failure = house.hub.wait("failure")
    assert (failure.error, failure.position) == ("Corrupt", 3)
    assert "what stays of the model after stage 2 is not what was kept" in failure.words


def test_a_signature_that_names_what_stays_is_not_worked_with(house, site):
    site.begin(position=2, signature=tuple(spec.model_copy(update={"name": f"head.{spec.name}"}) for spec in SIGNATURE))
    failure = house.hub.wait("failure")
    assert "tensor head.w stays at its site (sync.keep_local), so it is neither sent nor taken" in failure.words
    assert house.workers.did("train") == []


@pytest.mark.parametrize("pattern", ["c*", "[!f]*"])
def test_patterns_that_fit_the_hubs_own_names_of_control_variates_name_none_of_them(house, site, pattern):
    shared = (TensorSpec(name="features.weight", shape=(4,)),)
    sync = Sync.model_validate({"preset": "scaffold", "period": STEPS, "keep_local": [pattern]})

    def trains_both(order, group):
        Path(order.control_out).write_bytes(b"control")
        return trains(order, group)

    house.workers.answers["train"] = trains_both
    both = with_control(shared)
    site.errand.assign(assign(position=2, sync=sync, signature=both, weights=sha256(save(WEIGHTS, both))))
    assert house.hub.wait_taken()[0].answer.position == 2


def test_first_weights_that_hold_what_stays_do_not_leave(house, site):
    told = tuple(spec.model_copy(update={"name": f"head.{spec.name}"}) for spec in SIGNATURE)
    house.workers.answers["initialise"] = lambda order, group: Reply(signature=told)
    site.begin("initialise", position=1, job=job("train"))
    assert "tensor head.w stays at its site" in house.hub.wait("failure").words
    assert house.hub.taken == []


def test_room_is_also_for_weights_to_be_fetched_and_for_what_stays(house, site):
    folder, vector = RunFolder(house.runs / "run"), 4 * SIZE
    little = room(assign("query", position=0, weights=None), folder)
    for work in ("evaluate", "predict"):
        assert room(assign(work, position=0), folder) == little + vector
    assert room(assign(), folder) == little + 2 * vector
    keeps = SYNC.model_copy(update={"keep_optimiser": True})
    assert room(assign(sync=keeps), folder) == little + 4 * vector + 3 * vector  # nobody knows yet how large they are
    turned = Sync.model_validate({"preset": "scaffold", "keep_optimiser": True, "wire": [{"kind": "int8"}]})
    both = assign(sync=turned, signature=with_control(SIGNATURE))
    assert room(both, folder) == little + 2 * vector + 2 * vector * 3 + vector * (1 + 2)
    site.round(2)
    own = len(b"own after step %d" % STEPS)
    assert room(assign(position=3, sync=keeps), folder) == little + 4 * vector + 3 * own


# --- beyond the run


def test_the_newest_are_kept_for_the_model_that_came_of_the_run(house, site):
    site.round(2)
    site.round(3)
    site.end(keep=False, made=True)
    assert kept(house) == {"run.safetensors": b"own after step %d" % (2 * STEPS)}
    assert not (house.runs / "run").exists()


def test_the_next_agent_keeps_them_too(house, site):
    site.round(2)
    site.restart()
    site.end(keep=False, made=True)
    assert list(kept(house)) == ["run.safetensors"]


def test_a_run_without_a_model_leaves_nothing(house, site):
    site.round(2)
    site.end(keep=False)
    assert kept(house) == {}


def test_torn_ones_are_not_kept_and_the_folder_goes_all_the_same(house, site):
    site.round(2)
    site.restart()
    (house.runs / "run" / "local-2.safetensors").write_bytes(b"torn")
    site.end(keep=False, made=True)
    assert kept(house) == {}
    assert not (house.runs / "run").exists()


def test_a_disk_that_takes_none_leaves_the_folder_and_the_next_release_keeps_them(house, site):
    site.round(2)
    (house.home / "personal").write_bytes(b"")  # stands for whatever the disk may say
    site.end(keep=False, made=True)
    assert (house.runs / "run" / "local-2.safetensors").exists()
    (house.home / "personal").unlink()
    site.restart()
    site.end(keep=False, made=True)
    assert list(kept(house)) == ["run.safetensors"]
    assert not (house.runs / "run").exists()


def test_an_agent_killed_before_it_dropped_the_folder_is_not_told_to_have_lost_them(house, site, caplog):
    site.round(2)
    site.end()
    personal.keep(house.home, "run", RunFolder(house.runs / "run"))
    with caplog.at_level(logging.ERROR):
        personal.keep(house.home, "run", RunFolder(house.runs / "run"))
    assert caplog.messages == []
    assert kept(house) == {"run.safetensors": b"own after step %d" % STEPS}


def test_the_oldest_go_once_there_are_many(house, site):
    site.round(2)
    (house.home / "personal").mkdir()
    for number in range(personal.MOST):
        path = house.home / "personal" / f"r{number}.safetensors"
        path.write_bytes(b"")
        os.utime(path, (1000 + number, 1000 + number))
    personal.keep(house.home, "run", RunFolder(house.runs / "run"))
    names = set(kept(house))
    assert len(names) == personal.MOST
    assert "run.safetensors" in names
    assert "r0.safetensors" not in names


def test_jobs_about_the_model_find_them_and_say_so_where_there_are_none(house):
    asked = assign("predict", position=0, keep_local=("head*",), made_by="earlier")
    with pytest.raises(NotFound, match=r"no tensors of its own \(head\*\) for the model, of run earlier; name sites"):
        personal.find(house.home, asked)
    (house.home / "personal").mkdir()
    (house.home / "personal" / "earlier.safetensors").write_bytes(b"own")
    assert personal.find(house.home, asked) == house.home / "personal" / "earlier.safetensors"
    assert personal.find(house.home, assign("predict", position=0, made_by="earlier")) is None


ASKED = assign("predict", position=0, run="other", keep_local=("head*",), made_by="run")


def test_a_job_about_the_model_finds_them_while_the_run_that_made_it_still_sends(house, site):
    sending, go, take = threading.Event(), threading.Event(), house.hub.take

    def taken(*args):
        sending.set()
        assert go.wait(WAIT)
        return take(*args)

    house.hub.take = taken
    site.begin(position=2)
    assert sending.wait(WAIT)
    found = personal.find(house.home, ASKED)  # the release is still on its way
    assert found is not None
    assert found.read_bytes() == b"own after step %d" % STEPS
    site.errand.end(keep=False, made=True)
    assert personal.find(house.home, ASKED) == found
    go.set()
    assert site.errand.wait(WAIT)
    assert kept(house) == {"run.safetensors": b"own after step %d" % STEPS}
    assert not (house.runs / "run").exists()


def test_rounds_after_a_job_found_them_leave_what_it_reads_alone_and_the_newest_are_kept(house, site):
    site.round(2)
    found = personal.find(house.home, ASKED)
    site.round(3)
    assert found is not None
    assert found.read_bytes() == b"own after step %d" % STEPS
    site.end(keep=False, made=True)
    assert found.read_bytes() == b"own after step %d" % (2 * STEPS)


def test_torn_ones_of_a_run_that_is_still_here_are_not_given_to_a_job(house, site):
    site.round(2)
    (house.runs / "run" / "local-2.safetensors").write_bytes(b"torn")
    with pytest.raises(Corrupt, match="what stays of the model after stage 2"):
        personal.find(house.home, ASKED)
    assert kept(house) == {}
