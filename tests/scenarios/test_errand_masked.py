"""A site under a secure sum whose hub asks twice for one round: its masks hide one update, and no other one."""

import numpy as np

from atoll.journal.key import Key
from atoll.outer.secret import Party
from atoll.outer.wire import encode
from atoll.registry.weights import save
from atoll.runtime.concealing import terms_of
from atoll.runtime.errand import Errand
from atoll.runtime.peers import check_signed
from atoll.spec.document import sha256
from atoll.spec.message import SumTold
from atoll.spec.order import Reply
from atoll.spec.secret import Everyone, Inbox
from atoll.spec.sync import Sync
from tests.unit.places import BATCH, SIGNATURE, SIZE, STEPS, WAIT, WEIGHTS, House, assign, eventually, update

OTHER = WEIGHTS + 1
DIGEST = sha256(save(OTHER, SIGNATURE))
TOGETHER = ("ada", "bob", "lyon")
SYNC = Sync.model_validate(
    {
        "period": STEPS,
        "merge": "mean",
        "wait": {"patience": WAIT},
        "wire": [{"kind": "clip", "value": 10.0}, {"kind": "mask"}],
    }
)


def said(house, kind):
    return [one.said for one in house.hub.heard_ if one.kind == "sum_said" and one.said.kind == kind]


def test_another_update_of_the_same_round_does_not_leave_under_the_masks_of_the_first(tmp_path):
    house, a = House(tmp_path), assign(sync=SYNC, together=TOGETHER)
    plain = house.hub.give

    def give(site, parcel):
        if parcel.purpose == "weights" and parcel.digest == DIGEST:
            return parcel.model_copy(update={"size": SIZE}), encode(OTHER, ())
        return plain(site, parcel)

    def train(order, group):  # from the hub's second weights nothing is learned, so that the difference is the first's
        made = update() if len(house.workers.did("train")) == 1 else np.zeros(SIZE, np.float32)
        made.tofile(order.output)
        return Reply(examples=STEPS * BATCH, loss=0.5)

    house.hub.give, house.workers.answers["train"] = give, train
    errand = Errand(house.place, "run")
    errand.assign(a)
    mine = house.hub.wait("sum_said").said
    terms = terms_of("run", a.position, a.epoch, TOGETHER, SYNC, a.job)
    keys = {name: Key.new(name) for name in TOGETHER[:2]}
    parties = {name: Party(terms, name, str(key.public), key.sign, check_signed) for name, key in keys.items()}
    everyone = (mine, *(party.keys() for party in parties.values()))

    def tell(told):
        house.place.concealing.heard(SumTold(run="run", position=a.position, attempt=a.epoch, told=told))

    tell(Everyone(keys=everyone))
    inbox = {name: party.deal(everyone).sealed["lyon"] for name, party in parties.items()}
    tell(Inbox(sealed=inbox))
    house.hub.wait_taken(1)
    errand.assign(assign(sync=SYNC, together=TOGETHER, weights=DIGEST))
    assert eventually(lambda: len({one.masking for one in said(house, "keys")}) == 2)
    tell(Everyone(keys=everyone))  # with which its new secrets are not
    errand.end(keep=False)
    assert errand.wait(WAIT)
    assert len(house.workers.did("train")) == 2
    assert len(house.hub.taken) == 1
