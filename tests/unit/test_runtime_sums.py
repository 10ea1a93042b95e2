"""The hub's part in secure sums, by the sites' words alone: what is passed on, what is let go, what is begun anew."""

import threading

import numpy as np
import pytest

from atoll.errors import Corrupt, Denied, Invalid
from atoll.journal.key import Key
from atoll.outer.secret import Party
from atoll.runtime.peers import check_signed
from atoll.runtime.sums import Sums
from atoll.spec.document import canonical, digest
from atoll.spec.event import Answer, Broken, Restarted
from atoll.spec.message import SumSaid
from atoll.spec.secret import Agreed
from atoll.spec.sync import Sync
from tests.unit.places import eventually
from tests.unit.runs import plan, training

NAMES = ("ada", "bob", "cyd", "dee")
WIRE = [{"kind": "clip", "value": 1.0}, {"kind": "mask"}]


class Line:
    """What reaches the sites, and what the run is told, of one round's sum."""

    def __init__(self, names=NAMES, **wait):
        made = plan(names, **wait)
        sync = Sync.model_validate({**made.sync.model_dump(mode="json"), "wire": WIRE})
        self.state, _ = training(made.model_copy(update={"sync": sync}), *names)
        self.told, self.events, self.away = [], [], set()
        self.sums = Sums(self.tell, lambda site: site not in self.away, self.events.append)
        self.names, self.signing = self.sums.begin(self.state), {}
        self.parties = {name: self.party(name) for name in names}

    def party(self, name):
        terms, key = self.sums._sums[self.state.run].terms, self.signing.setdefault(name, Key.new(name))
        return Party(terms, name, str(key.public), key.sign, check_signed)

    def tell(self, site, message):
        self.told.append((site, message.told))

    def say(self, said, site=None, **place):
        place = {"position": self.state.position, "attempt": self.state.epoch, **place}
        self.sums.heard(site or said.site, SumSaid(run=self.state.run, said=said, **place))

    def got(self, kind):
        return {site: told for site, told in self.told if told.kind == kind}

    def dealt(self, *names):
        """Take a sum to where each has what the others sealed for it."""
        for name in names or self.names:
            self.say(self.parties[name].keys())
        for name, everyone in self.got("everyone").items():
            self.say(self.parties[name].deal(everyone.keys))
        for name, inbox in self.got("inbox").items():
            self.parties[name].mask(inbox.sealed)

    def unmasked(self, there):
        """Return what the hub makes of a sum, and each site's part in it by the hub's words."""
        found = []
        place = {"position": self.state.position, "epoch": self.state.epoch, "version": self.state.version}
        answers = [Answer(site=name, **place) for name in there]
        thread = threading.Thread(target=lambda: found.append(self.sums.unmasked(self.state, answers)))
        thread.start()
        said = set()
        while thread.is_alive():
            for name, told in list(self.told):
                if name in self.away or (name, told.kind) in said or told.kind not in ("there", "signed"):
                    continue
                said.add((name, told.kind))
                party = self.parties[name]
                self.say(party.agree(told.sites) if told.kind == "there" else party.unseal(told.agreed))
            thread.join(0.01)
        return found[0]


@pytest.fixture
def line():
    return Line()


def test_what_sites_say_is_passed_on_once_all_have_said_it(line):
    assert line.names == NAMES
    for name in NAMES[:3]:
        line.say(line.parties[name].keys())
    assert line.told == []
    line.say(line.parties["dee"].keys())
    everyone = line.got("everyone")
    assert {name: {one.site for one in told.keys} for name, told in everyone.items()} == {
        one: {*NAMES} for one in NAMES
    }
    for name in NAMES[:3]:
        line.say(line.parties[name].deal(everyone[name].keys))
    assert line.got("inbox") == {}
    line.say(line.parties["dee"].deal(everyone["dee"].keys))
    assert {name: set(told.sealed) for name, told in line.got("inbox").items()} == {
        name: set(NAMES) - {name} for name in NAMES
    }


@pytest.mark.parametrize("gone", [(), ("dee",)])
def test_masks_come_off_with_or_without_one_who_left(gone):
    line = Line(kind="quorum", count=3)
    line.dealt()
    line.away.update(gone)
    there = [name for name in NAMES if name not in gone]
    hidden, sums = line.unmasked(there), np.zeros(64, np.uint32)
    for name in there:
        line.parties[name].mask(line.got("inbox")[name].sealed).apply(0, sums)
    assert sums.any()
    assert hidden is not None
    assert hidden.mean(0, sums.copy(), 4.0).tolist() == [0.0] * 64
    sums[:1] += np.uint32(1 << 30)
    with pytest.raises(Corrupt, match=r"^secure sum: it is none of updates clipped to 1; "):
        hidden.mean(0, sums, 0.1)
    assert line.events == []


def test_one_who_leaves_after_its_update_is_in_the_sum_all_the_same(line):
    line.dealt()
    line.away.add("dee")
    assert line.unmasked(NAMES) is not None
    assert set(line.got("there")) == set(NAMES)


def test_too_few_to_open_it_have_the_sum_begun_anew_and_at_last_the_run_ended(line):
    for attempt in range(4):
        line.sums.begin(line.state)
        line.parties = {name: line.party(name) for name in NAMES} if attempt else line.parties
        line.told.clear()
        line.dealt()
        line.away.update(("cyd", "dee"))
        assert line.unmasked(NAMES) is None
        line.away.clear()
    assert [type(event) for event in line.events] == [Restarted] * 3 + [Broken]
    assert line.events[0].missing == NAMES
    assert line.events[3].error == "Unavailable"
    assert line.events[3].words.endswith(
        "failed 4 times, at last because 2 of 4 sites have signed whose updates are there"
    )


def test_a_site_that_begins_anew_has_the_sum_begun_anew_and_one_that_repeats_itself_is_told_again(line):
    line.dealt()
    line.told.clear()
    line.say(line.parties["bob"].keys())
    assert {(site, told.kind) for site, told in line.told} == {("bob", "everyone"), ("bob", "inbox")}
    assert line.events == []
    line.say(line.party("bob").keys())
    assert [type(event) for event in line.events] == [Restarted]
    line.told.clear()
    line.say(line.parties["ada"].keys())
    assert line.told == [], "that sum is over"


def test_what_is_of_another_sum_or_another_site_counts_for_nothing(line):
    keys = line.parties["ada"].keys()
    with pytest.raises(Denied, match=r"^bob: speaks for 'ada'"):
        line.say(keys, site="bob")
    line.say(keys, attempt=7)
    line.say(keys, position=line.state.position + 1)
    line.say(keys.model_copy(update={"site": "eve"}))
    assert line.sums._sums[line.state.run].keys == {}


def test_what_one_site_says_wrong_is_its_own_fault_and_stops_no_other(line):
    keys = {name: line.parties[name].keys() for name in NAMES}
    with pytest.raises(Denied, match="is said to be of ada is not signed by it"):
        line.say(keys["ada"].model_copy(update={"masking": keys["bob"].masking}))
    with pytest.raises(Denied, match="is said to be of ada is not signed by it"):
        line.say(keys["ada"].model_copy(update={"signer": keys["bob"].signer}))
    for name in NAMES:
        line.say(keys[name])
    everyone = line.got("everyone")
    dealt = {name: line.parties[name].deal(everyone[name].keys) for name in NAMES}
    fewer = dict(list(dealt["ada"].sealed.items())[:2])
    with pytest.raises(Invalid, match=r"^ada: dealt shares to others than its neighbours"):
        line.say(dealt["ada"].model_copy(update={"sealed": fewer}))
    early = Agreed(site="ada", signature="00" * 64)
    for name in NAMES:
        line.say(dealt[name])
        line.say(early)  # nobody has asked for it yet
    for name, inbox in line.got("inbox").items():
        line.parties[name].mask(inbox.sealed)
    assert line.unmasked(NAMES) is not None


def test_a_wrong_signature_of_one_does_not_keep_the_others_from_opening_a_sum(line):
    line.dealt()
    agreed = [line.parties[name].agree(NAMES) for name in NAMES]
    junk = agreed[0].model_copy(update={"signature": "11" * 64})
    assert set(line.parties["bob"].unseal([junk, *agreed[1:]]).own) == set(NAMES)
    with pytest.raises(Denied, match="too few sites have signed"):
        line.parties["cyd"].unseal([junk, *agreed[1:3]])


def test_a_key_with_which_everybody_has_the_same_secret_is_refused_at_the_hub(line):
    name, terms = "ada", line.sums._sums[line.state.run].terms
    bare = line.parties[name].keys().model_copy(update={"masking": "00" * 32, "signature": "00" * 64})
    said = canonical(["secure sum: keys", digest(terms), bare.model_dump(mode="json", exclude={"signature"})])
    with pytest.raises(Denied, match=r"^secure sum: a public key of ada is none"):
        line.say(bare.model_copy(update={"signature": line.signing[name].sign(said).hex()}))


FIVE = (*NAMES, "eve")


def test_a_quorum_goes_on_without_keys_and_shares_that_do_not_come():
    line = Line((*FIVE, "fay"), kind="quorum", count=4)
    for name in FIVE:
        line.say(line.parties[name].keys())
    line.sums.lapsed(line.state.run, line.state.position + 1)
    assert line.told == []
    line.sums.lapsed(line.state.run, line.state.position)
    everyone = line.got("everyone")
    assert set(everyone) == set(FIVE)
    line.say(line.parties["fay"].keys())
    assert set(line.got("everyone")) == set(FIVE), "it is too late for this round"
    for name in NAMES:
        line.say(line.parties[name].deal(everyone[name].keys))
    assert line.got("inbox") == {}
    line.sums._late(line.sums._sums[line.state.run])  # as the clock does
    assert set(line.got("inbox")) == set(NAMES)
    for name, inbox in line.got("inbox").items():
        line.parties[name].mask(inbox.sealed)
    assert line.unmasked(NAMES) is not None
    assert line.events == []


@pytest.mark.parametrize(("names", "count", "early"), [(FIVE, 4, 3), (FIVE, 5, 4), (NAMES, 3, 2)])
def test_who_is_late_at_the_deadline_is_waited_for_where_too_few_are_there(names, count, early):
    line = Line(names, kind="quorum", count=count)
    for name in names[:early]:
        line.say(line.parties[name].keys())
    line.sums.lapsed(line.state.run, line.state.position)
    assert line.got("everyone") == {}
    line.say(line.parties[names[early]].keys())
    assert set(line.got("everyone")) == set(names[: early + 1])
    assert line.events == []


def test_a_quorum_of_which_too_few_dealt_shares_or_sent_updates_is_begun_anew():
    line = Line(FIVE, kind="quorum", count=4)
    for name in FIVE:
        line.say(line.parties[name].keys())
    for name in FIVE[:3]:
        line.say(line.parties[name].deal(line.got("everyone")[name].keys))
    line.sums._late(line.sums._sums[line.state.run])
    assert [type(event) for event in line.events] == [Restarted]
    line = Line(FIVE, kind="quorum", count=5)
    line.dealt()
    assert line.unmasked(NAMES) is None
    assert [type(event) for event in line.events] == [Restarted], "four of five parts of the noise are there"


def test_a_run_that_is_over_is_forgotten_and_waits_for_nobody(line):
    line.dealt()
    found = []
    place = {"position": line.state.position, "epoch": line.state.epoch, "version": line.state.version}
    answers = [Answer(site=name, **place) for name in NAMES]
    thread = threading.Thread(target=lambda: found.append(line.sums.unmasked(line.state, answers)))
    thread.start()
    assert eventually(lambda: len(line.got("there")) == len(NAMES))
    line.sums.forget(line.state.run)
    thread.join(10)
    assert found == [None]
    assert line.events == []
    line.sums.failed(line.state, "nobody's")
    assert line.events == []
