"""A site's own tensors from round to round, and beyond the run for the model that came of it."""

import os
from pathlib import Path

import pytest

from atoll.errors import NotFound
from atoll.runtime import personal
from atoll.runtime.errand import Errand
from atoll.runtime.kept import RunFolder
from atoll.spec.message import Reply
from atoll.spec.plan import Sync
from tests.unit.places import BATCH, SIGNATURE, STEPS, WAIT, House, assign, job, update

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


def test_first_weights_that_hold_what_stays_do_not_leave(house, site):
    told = tuple(spec.model_copy(update={"name": f"head.{spec.name}"}) for spec in SIGNATURE)
    house.workers.answers["initialise"] = lambda order, group: Reply(signature=told)
    site.begin("initialise", position=1, job=job("train"))
    assert "tensor head.w stays at its site" in house.hub.wait("failure").words
    assert house.hub.taken == []


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
