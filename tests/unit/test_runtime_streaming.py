"""The site's side of streaming rounds: what is begun ahead, when a site's own weights go on, and what a round sends."""

import numpy as np
import pytest

from atoll.errors import TaskFailed, Unavailable
from atoll.outer.wire import decode, feedback
from atoll.runtime.errand import Errand
from atoll.spec.order import Reply
from tests.unit.places import SIZE, House, assign, eventually, honest, job, until_closed, update

PERIOD, STRIDE, DELAY = 6, 3, 2
SYNC = {"period": PERIOD, "fragments": 2, "delay": DELAY, "keep_optimiser": True}
STEPS = 4 * STRIDE


def stage(version, **fields):
    """Return the assignment of a round in which the hub merged this site's update of the round before."""
    place = {"position": 2 + version, "version": version, "done": version * STRIDE, "steps": STRIDE}
    counted = 1 + version if version else None
    sync = fields.pop("sync", {})
    return assign(**{**place, "counted": counted, "job": job(steps=STEPS), "sync": {**SYNC, **sync}, **fields})


def span(order):
    return slice(*order.sync.span(SIZE, order.version))


def part(order, group=None):
    """Reply to a train order as a worker does."""
    reply = honest(order)
    update()[span(order)].tofile(order.output)
    return reply


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    made.workers.answers["train"] = part
    yield made
    made.journal.close()


@pytest.fixture
def errand(house):
    made = Errand(house.place, "run")
    yield made
    made.end(keep=True)
    assert made.wait(20)


def test_a_round_sends_its_fragment_and_has_the_next_one_begun_meanwhile(house, errand):
    for version in range(4):
        errand.assign(stage(version))
        parcel, vector = house.hub.wait_taken(version + 1)
        assert parcel.size == SIZE // 2
        assert np.array_equal(vector, update()[slice(*stage(version).sync.span(SIZE, version))])
    trained, ahead = house.workers.did("train"), house.workers.did("ahead")
    assert [order.goes_on for order in trained] == [False, True, True, True]
    assert [order.round.version for order in ahead] == [1, 2, 3], "after the last steps there is nothing to begin"
    elsewhere = {"weights": None, "checkpoint": None, "inputs": ""}
    assert [order.round for order in ahead] == [order.model_copy(update=elsewhere) for order in trained[1:]]


def test_the_steps_after_the_mixing_alone_are_left_to_the_round_itself(house, errand):
    errand.assign(stage(0, job=job(steps=STRIDE + 1)))
    house.hub.wait_taken()
    assert house.workers.did("ahead") == [], "the one step that is left needs the merged fragment"


def test_without_a_delay_nothing_is_begun_ahead_and_weights_go_on_all_the_same(house, errand):
    for version in range(2):
        errand.assign(stage(version, sync={"delay": 0}))
        house.hub.wait_taken(version + 1)
    assert house.workers.did("ahead") == []
    assert [order.goes_on for order in house.workers.did("train")] == [False, True]


def test_without_streaming_an_order_is_what_it_was(house, errand):
    sync = {"fragments": 1, "delay": 0, "period": STRIDE}
    for version in range(2):
        errand.assign(stage(version, sync=sync))
        parcel, _ = house.hub.wait_taken(version + 1)
        assert parcel.size == SIZE
    assert [order.goes_on for order in house.workers.did("train")] == [False, False]
    assert house.workers.did("train")[1].state_in is not None


@pytest.mark.parametrize("counted", [None, 2], ids=["none counted", "an older one counted"])
def test_a_site_whose_last_round_did_not_count_begins_again_from_the_weights(house, errand, counted):
    for version in range(2):
        errand.assign(stage(version))
        house.hub.wait_taken(version + 1)
    errand.assign(stage(2, counted=counted))
    house.hub.wait_taken(3)
    order = house.workers.did("train")[-1]
    assert not order.goes_on
    assert order.state_in.endswith("state-3.safetensors"), "its optimiser's state goes on"


def test_a_site_that_kept_nothing_of_the_last_round_begins_again_from_the_weights(house, errand):
    errand.assign(stage(0))
    house.hub.wait_taken()
    errand.assign(stage(2))  # stage 3 went to an agent whose disk is gone
    house.hub.wait_taken(2)
    assert not house.workers.did("train")[-1].goes_on


def test_an_agent_started_anew_goes_on_from_what_the_one_before_kept(house):
    for version in range(3):
        errand = Errand(house.place, "run")
        errand.assign(stage(version))
        house.hub.wait_taken(version + 1)
        errand.end(keep=True)
        assert errand.wait(20)
    assert [order.goes_on for order in house.workers.did("train")] == [False, True, True]


def test_an_update_that_is_sent_again_has_the_next_round_begun_once(house, errand):
    house.hub.broken = 3  # weights and code come in, and the update goes out, at a second try each
    errand.assign(stage(0))
    house.hub.wait_taken()
    assert len(house.workers.did("train")) == 1
    assert len(house.workers.did("ahead")) == 1


def dies(order, group):
    raise Unavailable("worker: a rank ended by signal SIGKILL")


def fails(order, group):
    raise TaskFailed("loss is nan at step 4 of the run")


@pytest.mark.parametrize("fault", [dies, fails])
def test_what_goes_wrong_ahead_is_no_answer_and_is_done_again_by_the_round_itself(house, errand, fault):
    house.workers.answers["ahead"] = fault
    for version in range(2):
        errand.assign(stage(version))
        house.hub.wait_taken(version + 1)
    assert [order.goes_on for order in house.workers.did("train")] == [False, True]
    assert not [word for word in house.hub.heard_ if word.kind == "failure"]
    assert house.workers.started == (2 if fault is dies else 1)


@pytest.mark.parametrize("keep", [True, False])
def test_an_errand_that_ends_while_workers_are_ahead_ends_them(house, keep):
    house.workers.answers["ahead"] = until_closed
    errand = Errand(house.place, "run")
    errand.assign(stage(0))
    house.hub.wait_taken()
    assert eventually(lambda: house.workers.did("ahead"))
    errand.end(keep=keep)
    assert errand.wait(20)
    assert (house.workers.started, house.workers.closed) == (1, 1)


def test_a_stage_of_another_kind_waits_for_what_is_ahead_and_goes_on(house, errand):
    errand.assign(stage(0))
    house.hub.wait_taken()
    errand.assign(assign("evaluate", position=3, epoch=1))
    house.hub.wait("done")
    kinds = [order.kind for order in house.workers.orders if order.kind != "open"]
    assert kinds == ["train", "ahead", "evaluate"]


def test_what_a_fragment_loses_on_the_wire_comes_back_when_it_is_its_turn_again(house, errand):
    wire = ({"kind": "int8"},)
    residual, sent = np.zeros(SIZE, np.float32), []
    for version in range(4):
        a = stage(version, sync={"wire": wire})
        errand.assign(a)
        _, vector = house.hub.wait_taken(version + 1)
        here = slice(*a.sync.span(SIZE, version))
        [(chunk, lost)] = feedback(update()[here], residual[here], a.sync.wire)
        assert vector.tobytes() == bytes(chunk.data)
        sent.append(decode(chunk, a.sync.wire, SIZE // 2))
        residual[here] = lost
        kept = np.fromfile(house.place.home / "runs" / "run" / f"residual-{a.position}.f32", np.float32)
        assert kept.tobytes() == residual.tobytes()
    assert not np.array_equal(sent[1], sent[3]), "the same update, corrected by what it lost two rounds before"


@pytest.mark.parametrize("wrong", ["the whole", "not finite"])
def test_a_worker_that_writes_another_vector_than_its_fragment_fails_the_round(house, errand, wrong):
    def meddles(order, group):
        made = update() if wrong == "the whole" else np.full(SIZE // 2, np.nan, np.float32)
        made.tofile(order.output)
        return Reply(examples=1, loss=0.5)

    house.workers.answers["train"] = meddles
    errand.assign(stage(1))  # its fragment is the last two elements of w, and b
    words = house.hub.wait("failure").words
    assert ("32 bytes where the model has 16" if wrong == "the whole" else "tensor w has nan") in words
