"""Whole runs with a site whose updates cannot be taken: refused, told, journalled; each ends as its rule says."""

import logging

import numpy as np
import pytest

from atoll.boundary.channel import Frame
from atoll.errors import Denied, NotFound
from tests.scenarios.worlds import ROUNDS, World
from tests.unit.places import eventually

NAMES = ("ada", "bob")
FOREVER = 10**6
QUORUM = {"kind": "quorum", "count": 1, "deadline": 15.0}  # which no test waits for


class Spoiling:
    """A hub's desk as a site has it, whose next so many updates of train rounds are spoilt on the way."""

    def __init__(self, desk):
        self._desk, self._fault, self._left = desk, None, 0

    def __getattr__(self, name):
        return getattr(self._desk, name)

    def spoil(self, fault, times=FOREVER):
        self._fault, self._left = fault, times

    def mend(self):
        self._left = 0

    def take(self, site, parcel, frames):
        if parcel.answer.position and self._left:
            self._left -= 1
            parcel, frames = self._fault(parcel, frames)
        self._desk.take(site, parcel, frames)


def changed(frame, **fields):
    known = {"offset": frame.offset, "length": frame.length, "data": bytes(frame.data), "scales": bytes(frame.scales)}
    return Frame(**{**known, **fields})


def not_finite(parcel, frames):
    def spoilt(offset):
        for frame in frames(offset):
            values = np.frombuffer(frame.data, np.float32).copy()
            values[6] = np.nan
            yield changed(frame, data=values.tobytes())

    return parcel, spoilt


def truncated(parcel, frames):
    return parcel, lambda offset: iter(())


def oversized(parcel, frames):
    return parcel, lambda offset: (changed(frame, data=bytes(frame.data) + b"more") for frame in frames(offset))


def repeated(parcel, frames):
    return parcel, lambda offset: (changed(frame) for frame in frames(offset) for _ in range(2))


def of_another_type(parcel, frames):
    return parcel.model_copy(update={"wire": ("int8",)}), frames


def of_another_size(parcel, frames):
    return parcel.model_copy(update={"size": parcel.size + 1}), frames


def of_too_many_examples(parcel, frames):
    return answering(parcel, examples=10**9), frames


def of_a_coming_round(parcel, frames):
    return answering(parcel, position=parcel.answer.position + 1, version=parcel.answer.version + 1), frames


def of_a_coming_epoch(parcel, frames):
    return answering(parcel, epoch=parcel.answer.epoch + 1), frames


def answering(parcel, **fields):
    return parcel.model_copy(update={"answer": parcel.answer.model_copy(update=fields)})


WORDS = {
    not_finite: "bob: tensor b: nan at element 6 of the model: chunk at 0: data: not finite somewhere",
    truncated: "bob: tensor w: ended after 0 of 8 elements; send it whole",
    oversized: "bob: tensors w to b: chunk.data: 36 bytes: must be 32 for this encoding",
    repeated: "bob: tensors w to b: frame at 0 where 8 was due",
    of_another_type: "bob: an update of 8 elements as ['int8'] where the plan has 8 as []",
    of_another_size: "bob: an update of 9 elements as [] where the plan has 8 as []",
    of_too_many_examples: "bob: examples: 1000000000: stage 'train' has 1 to 12 there",
    of_a_coming_round: "bob: an answer to stage 2 of epoch 0 was never asked for; run ",
    of_a_coming_epoch: "bob: an answer to stage 1 of epoch 1 was never asked for; run ",
}
faults = pytest.mark.parametrize("fault", WORDS, ids=lambda fault: fault.__name__)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A world with ada and bob, and the desk that bob has; and the weights of a run that nothing happens to."""
    made = World(tmp_path_factory.mktemp("home"), NAMES)
    desk = Spoiling(made.hub._desk)
    made.start("ada")
    made.start("bob", desk)
    view = made.end(made.submit())
    yield made, desk, made.hub.model(view.result.model).weights
    made.close()


@pytest.fixture
def world(both):
    made = both[0]
    yield made
    both[1].mend()
    if any(site.quarantine for site in made.hub.sites()):
        made.hub.release("bob", "eve")


@pytest.fixture
def desk(both):
    return both[1]


@faults
def test_under_all_a_site_that_mends_itself_is_asked_again_and_changes_no_bit_of_the_model(world, desk, both, fault):
    trained = len(world.workers["bob"].did("train"))
    desk.spoil(fault, times=2)
    run = world.submit()
    view = world.end(run)
    assert (view.state, view.words) == ("finished", "")
    assert world.hub.model(view.result.model).weights == both[2]
    rejected = world.journalled("run.rejected", run)
    assert [(event.site, event.late) for event in rejected] == [("bob", False)] * 2
    assert rejected[0].words.startswith(WORDS[fault])
    assert len(world.workers["bob"].did("train")) - trained == ROUNDS + 2  # what was refused is trained again


@faults
def test_under_all_three_bad_updates_end_the_run_in_words_that_say_what_to_do(world, desk, fault):
    desk.spoil(fault)
    run = world.submit()
    view = world.end(run)
    assert (view.state, view.error, view.result) == ("failed", "Invalid", None)
    assert view.words.startswith(WORDS[fault])
    assert view.words.endswith("; 3 in a row: in quarantine until `atoll site release bob`")
    assert len(world.journalled("run.rejected", run)) == 3


@faults
def test_a_quorum_finishes_without_a_site_that_brings_nothing_good(world, desk, fault, caplog):
    caplog.set_level(logging.ERROR, "atoll.runtime")
    desk.spoil(fault)
    run = world.submit(data={"evaluate": ["ada"]}, wait=QUORUM)
    view = world.end(run)
    assert (view.state, view.round) == ("finished", ROUNDS)
    assert rounds(world, run) == [("ada",)] * ROUNDS
    assert [event.site for event in world.journalled("run.rejected", run)] == ["bob"] * 3
    quarantined = world.journalled("site.quarantined")[-1]
    assert {site.name: site.quarantine for site in world.hub.sites()} == {"ada": "", "bob": quarantined.words}
    assert eventually(lambda: len(told(caplog, f"run {run}, stage")) == 3)  # in the agent's own log
    assert eventually(lambda: told(caplog, "the hub says: bob: "))


def told(caplog, beginning):
    return [record for record in caplog.records if record.getMessage().startswith(beginning)]


def rounds(world, run):
    """Return the sites of each round's merge; the first merge is of the first weights."""
    return [event.sites for event in world.journalled("run.merged", run)][1 : ROUNDS + 1]


def test_a_quorum_takes_the_next_update_of_a_site_whose_last_one_was_bad(world, desk):
    desk.spoil(not_finite, times=1)
    run = world.submit(wait=QUORUM)
    assert world.end(run).state == "finished"
    assert rounds(world, run) == [("ada",), *[NAMES] * (ROUNDS - 1)]
    assert not any(site.quarantine for site in world.hub.sites())


def test_a_buffer_goes_on_with_whoever_brings_good_updates(world, desk):
    desk.spoil(not_finite)
    run = world.submit(data={"evaluate": ["ada"]}, wait={"kind": "buffer", "count": 1})
    assert world.end(run).state == "finished"
    assert rounds(world, run) == [("ada",)] * ROUNDS


def test_a_stale_round_is_a_late_one_that_is_journalled_once_and_harms_nobody(world, desk):
    desk.spoil(lambda parcel, frames: (answering(parcel, position=0, version=0), frames))
    world.may_train["ada"].clear()
    run = world.submit(wait={**QUORUM, "deadline": 0.1})
    assert eventually(lambda: world.journalled("run.rejected", run))
    world.may_train["ada"].set()
    assert world.end(run).state == "finished"
    [rejected] = world.journalled("run.rejected", run)
    assert rejected.words.startswith("bob: an answer to stage 0 of epoch 0 came too late; run ")
    assert not any(site.quarantine for site in world.hub.sites())


def test_a_site_in_quarantine_is_not_planned_with_until_it_is_released(world, desk):
    desk.spoil(truncated)
    assert world.end(world.submit()).state == "failed"
    alone = world.end(world.submit())
    assert (alone.state, alone.plan.sites) == ("finished", ("ada",))
    [reason] = [reason for reason in alone.plan.reasons if "bob" in reason.words]
    assert "`atoll site release bob`" in reason.words
    named = world.end(world.submit(data={"sites": ["ada", "bob"]}))
    assert (named.state, named.error) == ("failed", Denied.__name__)
    assert "`atoll site release bob`" in named.words
    desk.mend()
    world.hub.release("bob", "eve")
    with pytest.raises(NotFound, match="'bob' is not in quarantine"):
        world.hub.release("bob", "eve")
    again = world.end(world.submit())
    assert (again.state, again.plan.sites) == ("finished", NAMES)


def test_a_site_that_is_released_goes_on_in_the_run_that_it_was_barred_from(world, desk):
    desk.spoil(oversized)
    world.may_train["ada"].clear()
    run = world.submit(wait={"kind": "buffer", "count": 2})
    assert eventually(lambda: world.journalled("run.barred", run))
    assert eventually(lambda: world.hub.run(run).sites["bob"].state == "in quarantine")
    desk.mend()
    world.hub.release("bob", "eve")
    world.may_train["ada"].set()
    assert world.end(run).state == "finished"
    assert rounds(world, run) == [NAMES] * ROUNDS
