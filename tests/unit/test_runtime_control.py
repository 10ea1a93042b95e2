"""Control variates at a site: each round begins from the newest ones that the hub has counted, or not at all."""

from pathlib import Path

import pytest

from atoll.errors import Invalid
from atoll.registry.weights import save
from atoll.runtime.errand import Errand
from atoll.spec.document import sha256
from atoll.spec.model import TensorSpec, with_control, without_control
from atoll.spec.order import Reply
from atoll.spec.sync import Sync
from tests.unit.places import BATCH, STEPS, WAIT, WEIGHTS, House, assign, update

PLAIN = (TensorSpec(name="w", shape=(4,)),)
BOTH = with_control(PLAIN)
SYNC = Sync.model_validate({"preset": "scaffold", "period": STEPS, "wait": {"patience": WAIT}})


def trains(order, group):
    update().tofile(order.output)
    Path(order.control_out).write_bytes(b"control after step %d" % (order.done + order.steps))
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

    def begin(self, position, counted, **fields):
        place = {"sync": SYNC, "signature": BOTH, "weights": sha256(save(WEIGHTS, BOTH))}
        self.errand.assign(assign(position=position, counted=counted, **place, **fields))

    def round(self, position, counted, **fields):
        """Do a round and return the name of what it began from."""
        self.rounds += 1
        self.begin(position, counted, **fields)
        self.house.hub.wait_taken(self.rounds)
        path = self.house.workers.did("train")[-1].control_in
        return path and Path(path).name

    def restart(self):
        self.errand.end(keep=True)
        assert self.errand.wait(WAIT)
        self.errand = Errand(self.house.place, "run")

    def files(self):
        return sorted(path.name for path in (self.house.runs / "run").glob("control-*"))


@pytest.fixture
def site(house):
    made = Site(house)
    yield made
    made.errand.end(keep=True)
    assert made.errand.wait(WAIT)


@pytest.mark.parametrize("restarts", [False, True])
def test_each_round_begins_from_what_the_one_before_left(site, restarts):
    for position, counted, begun in ((2, None, None), (3, 2, "control-2.safetensors"), (4, 3, "control-3.safetensors")):
        assert site.round(position, counted) == begun
        if restarts:
            site.restart()
    assert site.files() == ["control-3.safetensors", "control-4.safetensors"]


@pytest.mark.parametrize("restarts", [False, True])
def test_a_round_that_went_on_without_the_site_is_none_of_its_past(site, restarts):
    site.round(2, None)
    for position in (3, 4, 5):
        assert site.round(position, 2) == "control-2.safetensors"
        if restarts:
            site.restart()
    assert site.round(6, 5) == "control-5.safetensors"
    site.round(7, 5)
    assert site.files() == ["control-5.safetensors", "control-7.safetensors"]


def test_a_round_asked_for_again_is_sent_again_and_begins_where_it_began(house, site):
    site.round(2, None)
    site.round(3, 2)
    site.restart()
    site.begin(3, 2, epoch=1)
    house.hub.wait_taken(3)
    assert len(house.workers.did("train")) == 2


@pytest.mark.parametrize("lost", [lambda path: path.unlink(), lambda path: path.write_bytes(b"others")])
def test_control_variates_that_are_lost_or_changed_end_the_run_in_words(house, site, lost):
    site.round(2, None)
    site.restart()
    lost(house.runs / "run" / "control-2.safetensors")
    site.begin(3, 2)
    failure = house.hub.wait("failure")
    assert (failure.error, failure.position) == ("Corrupt", 3)
    assert failure.words == "lyon: the control variates after stage 2 are not what was kept; submit the job again"


def test_an_update_whose_control_variates_are_torn_is_made_again(house, site):
    site.round(2, None)
    site.restart()
    (house.runs / "run" / "control-2.safetensors").write_bytes(b"others")
    site.begin(2, None, epoch=1)
    house.hub.wait_taken(2)
    assert len(house.workers.did("train")) == 2


def test_the_worker_that_evaluates_hears_that_half_of_it_is_no_model(house, site):
    place = {"sync": SYNC, "signature": BOTH, "weights": sha256(save(WEIGHTS, BOTH))}
    site.errand.assign(assign("evaluate", **place, job=assign().job))
    house.hub.wait("done")
    [order] = house.workers.did("evaluate")
    assert (order.control, order.signature) == (True, BOTH)


# --- the signature of both


def test_a_signature_with_control_and_back():
    assert [spec.name for spec in BOTH] == ["w", "control.w"]
    assert without_control(BOTH) == PLAIN


@pytest.mark.parametrize("names", [("w", "control.w"), (121 * "n",)])
def test_a_tensor_whose_control_has_no_name_left_is_refused(names):
    with pytest.raises(Invalid, match="the name of its control, is taken or too long; rename it"):
        with_control(tuple(TensorSpec(name=name, shape=(1,)) for name in names))


@pytest.mark.parametrize("signature", [PLAIN, (*BOTH, *PLAIN), BOTH[::-1]])
def test_what_is_no_signature_with_control_is_told(signature):
    with pytest.raises(Invalid, match="control variates must follow the weights"):
        without_control(signature)
