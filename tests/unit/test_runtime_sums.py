"""The hub's part in secure sums, by the sites' words alone: what is passed on, what is let go, what is begun anew."""

import threading

import numpy as np
import pytest

from atoll.errors import Corrupt, Denied, Invalid, LinkLost
from atoll.journal.key import Key
from atoll.outer.secret import Party
from atoll.runtime.concealing import Concealing, Known
from atoll.runtime.sums import Sums
from atoll.spec.document import canonical, digest
from atoll.spec.event import Answer, Broken, Restarted
from atoll.spec.message import Assign, SumSaid, SumTold
from atoll.spec.secret import Agreed, Everyone, Inbox, Signed, There
from atoll.spec.sync import Sync
from tests.unit.places import eventually
from tests.unit.runs import plan, train_job, training

NAMES = ("ada", "bob", "cyd", "dee")
WIRE = [{"kind": "clip", "value": 1.0}, {"kind": "mask"}]


class Line:
    """What reaches the sites, and what the run is told, of one round's sum."""

    def __init__(self, tmp_path, **wait):
        self.path, made = tmp_path, plan(NAMES, **wait)
        sync = Sync.model_validate({**made.sync.model_dump(mode="json"), "wire": WIRE})
        self.state, _ = training(made.model_copy(update={"sync": sync}), *NAMES)
        self.told, self.events, self.away = [], [], set()
        self.sums = Sums(self.tell, lambda site: site not in self.away, self.events.append)
        self.names, self.signing = self.sums.begin(self.state), {}
        self.parties = {name: self.party(name, tmp_path) for name in NAMES}

    def party(self, name, tmp_path):
        terms, key = self.sums._sums[self.state.run].terms, self.signing.setdefault(name, Key.new(name))
        return Party(terms, name, str(key.public), key.sign, Known(tmp_path / f"{name}.json").verify)

    def tell(self, site, message):
        self.told.append((site, message.told))

    def say(self, said, site=None, **place):
        place = {"position": self.state.position, "attempt": self.state.epoch, **place}
        self.sums.heard(site or said.site, SumSaid(run=self.state.run, said=said, **place))

    def got(self, kind):
        return {site: told for site, told in self.told if told.kind == kind}

    def dealt(self, *names):
        """Take a sum to where each has what the others sealed for it."""
        for name in names or NAMES:
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
def line(tmp_path):
    return Line(tmp_path)


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
def test_masks_come_off_with_or_without_one_who_left(line, gone):
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
        line.parties = {name: line.party(name, line.path) for name in NAMES} if attempt else line.parties
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


def test_a_site_that_begins_anew_has_the_sum_begun_anew_and_one_that_repeats_itself_is_told_again(line, tmp_path):
    line.dealt()
    line.told.clear()
    line.say(line.parties["bob"].keys())
    assert {(site, told.kind) for site, told in line.told} == {("bob", "everyone"), ("bob", "inbox")}
    assert line.events == []
    line.say(line.party("bob", tmp_path).keys())
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


def test_a_key_with_which_everybody_has_the_same_secret_is_refused_at_the_hub(line, tmp_path):
    name, terms = "ada", line.sums._sums[line.state.run].terms
    bare = line.parties[name].keys().model_copy(update={"masking": "00" * 32, "signature": "00" * 64})
    said = canonical(["secure sum: keys", digest(terms), bare.model_dump(mode="json", exclude={"signature"})])
    with pytest.raises(Denied, match=r"^secure sum: a public key of ada is none"):
        line.say(bare.model_copy(update={"signature": line.signing[name].sign(said).hex()}))


def test_a_quorum_goes_on_without_keys_and_shares_that_do_not_come(tmp_path):
    line = Line(tmp_path, kind="quorum", count=3)
    for name in NAMES[:3]:
        line.say(line.parties[name].keys())
    line.sums.lapsed(line.state.run, line.state.position + 1)
    assert line.told == []
    line.sums.lapsed(line.state.run, line.state.position)
    everyone = line.got("everyone")
    assert set(everyone) == set(NAMES[:3])
    line.say(line.parties["dee"].keys())
    assert set(line.got("everyone")) == set(NAMES[:3]), "it is too late for this round"
    for name in NAMES[:2]:
        line.say(line.parties[name].deal(everyone[name].keys))
    assert line.got("inbox") == {}
    line.sums._late(line.sums._sums[line.state.run])  # as the clock does
    assert set(line.got("inbox")) == set(NAMES[:2])


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


def test_a_key_that_is_not_the_first_one_seen_is_refused_and_a_file_that_cannot_be_read_is_told(tmp_path):
    known, first, second = Known(tmp_path / "sites.json"), Key.new("ada"), Key.new("ada")
    known.verify("ada", str(first.public), b"text", first.sign(b"text"))
    known.verify("ada", str(first.public), b"more", first.sign(b"more"))
    for signer, said, signature in (
        (str(first.public), b"text", first.sign(b"other")),
        (str(Key.new("bob").public), b"text", first.sign(b"text")),
        ("no key", b"text", first.sign(b"text")),
    ):
        with pytest.raises(Denied, match=r"is not signed by it"):
            known.verify("ada", signer, said, signature)
    with pytest.raises(Denied, match=r"ada signs with another key than before"):
        known.verify("ada", str(second.public), b"text", second.sign(b"text"))
    (tmp_path / "sites.json").write_text("{")
    with pytest.raises(Corrupt, match=r"sites.json: the other sites' keys cannot be read"):
        known.verify("ada", str(first.public), b"text", first.sign(b"text"))


class Three:
    """Sites that hear of sums as their agents do."""

    def __init__(self, tmp_path):
        self.said = []
        self.sites = {
            name: Concealing(name, Key.new(name), Known(tmp_path / f"{name}.json"), self.said.append) for name in NAMES
        }

    def summed(self, epoch, there):
        """Have a round's sum opened as a hub does; return who opened it."""
        self.said.clear()
        for site in self.sites.values():
            site.begin(assigned(epoch))
        self.tell(epoch, Everyone(keys=self.words("keys")))
        dealt = self.words("dealt")
        for name in NAMES:
            inbox = {one.site: one.sealed[name] for one in dealt if name in one.sealed}
            self.tell(epoch, Inbox(sealed=inbox), name)
        self.tell(epoch, There(sites=there), *there)
        self.tell(epoch, Signed(agreed=self.words("agreed")), *there)
        return {one.site for one in self.words("unsealed")}

    def tell(self, epoch, told, *names):
        for name in names or NAMES:
            self.sites[name].heard(SumTold(run="run", position=1, attempt=epoch, told=told))

    def words(self, kind):
        return tuple(one.said for one in self.said if one.said.kind == kind)


def assigned(epoch, together=NAMES):
    sync = {"preset": "fedavg", "period": 3, "wire": WIRE}
    place = {"run": "run", "epoch": epoch, "position": 1, "work": "train"}
    return Assign.model_validate({**place, "job": train_job(), "sync": sync, "together": together})


def test_a_site_opens_one_sum_of_its_update_and_no_other(tmp_path):
    world = Three(tmp_path)
    assert world.summed(0, NAMES) == set(NAMES)
    assert world.summed(1, NAMES) == set(NAMES), "the same one again, for a hub that began anew"
    assert world.summed(2, NAMES[:3]) == set(), "what the two differ in is the fourth's own update"
    for site in world.sites.values():
        site.drop("run")
    assert world.summed(3, NAMES[:3]) == set(NAMES[:3]), "another run of that name"


@pytest.mark.parametrize("together", [("bob", "cyd", "dee"), ("ada", "bob"), ("ada", "bob", "bob"), ()])
def test_a_site_says_nothing_where_it_would_not_be_hidden(tmp_path, together):
    world = Three(tmp_path)
    with pytest.raises(Denied, match=r"^ada refuses: wire: mask: among \d sites nothing is hidden"):
        world.sites["ada"].begin(assigned(0, together))
    assert world.said == []


def test_who_waits_for_masks_hears_what_went_wrong_or_that_nobody_asks_for_them_any_more(tmp_path):
    world = Three(tmp_path)
    terms = world.sites["ada"].begin(assigned(0))
    with pytest.raises(LinkLost, match="it is not asked for any more"):
        world.sites["ada"].masks(terms, lambda: False)
    world.tell(0, Everyone(keys=world.words("keys")), "ada")
    with pytest.raises(Denied, match=r"^ada refuses: secure sum: 1 sites are there"):
        world.sites["ada"].masks(terms, lambda: True)
    world.sites["ada"].begin(assigned(1))
    with pytest.raises(LinkLost, match="it is not asked for any more"):
        world.sites["ada"].masks(terms, lambda: True)
