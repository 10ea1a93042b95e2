"""Witnesses: a journal that grows is cosigned; one that was rolled back, forked or exchanged is disputed."""

import shutil
import threading

import pytest

from atoll.journal import Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.runtime.witnessing import Witness
from atoll.spec.event import Certified, Joined, Quarantined
from atoll.spec.fleet import Site
from atoll.spec.message import Release, Welcome
from atoll.spec.record import Attest, Attested, Cosigned
from tests.unit.houses import ZERO, House
from tests.unit.places import Hub, Workers, assign, eventually


class Party:
    """A journal and its owner's witness."""

    def __init__(self, home, owner):
        self.home, self.owner = home, owner
        self.open()

    def open(self):
        self.journal = Journal(self.home / "journal.db", self.owner)
        self.witness = Witness(self.home / "witness", self.journal)

    def write(self, count=1, run="run"):
        for _ in range(count):
            self.journal.append(Joined(run=run, site="lyon"), actor=self.owner)

    def copied(self, name):
        """Put the journal's files aside, as a backup would."""
        self.journal.close()
        shutil.copytree(self.home, self.home.parent / name)
        self.open()

    def rolled_back(self, name):
        """Put the files of then in the place of those of now, but not what was seen of others."""
        self.journal.close()
        for file in (self.home.parent / name).glob("journal.*"):
            shutil.copy(file, self.home / file.name)
        for rest in self.home.glob("journal.db-*"):
            rest.unlink()
        self.open()

    def looks(self, other):
        """Look at another's journal, and tell it; return what was found."""
        shown = other.witness.heard(self.owner, self.owner, self.witness.ask(other.owner)).answer
        if shown is None:
            return None
        judged = self.witness.heard(other.owner, other.owner, shown)
        if judged.answer is not None:
            other.witness.heard(self.owner, self.owner, judged.answer)
        return judged


@pytest.fixture
def pair(tmp_path):
    hub, lyon = Party(tmp_path / "hub", "hub"), Party(tmp_path / "lyon", "lyon")
    yield hub, lyon
    hub.journal.close()
    lyon.journal.close()


def test_a_journal_that_grows_is_cosigned_each_time_and_its_owner_keeps_the_word(pair):
    hub, lyon = pair
    assert lyon.looks(hub) is None  # it has no entries yet
    for size in (1, 2, 5, 70):
        hub.write(size - hub.journal.verify().entries)
        assert lyon.looks(hub).dispute is None
        assert hub.journal.verify().witnesses == {"lyon": size}
    lyon.write(3)
    assert hub.looks(lyon).dispute is None
    assert lyon.journal.verify().witnesses == {"hub": 3}


def test_of_what_was_seen_before_nothing_is_said_or_written(pair):
    hub, lyon = pair
    hub.write(4)
    lyon.looks(hub)
    file = lyon.witness.file("hub")
    before = file.stat().st_mtime_ns
    assert lyon.looks(hub).answer is None
    assert file.stat().st_mtime_ns == before


def test_a_journal_that_was_rolled_back_is_disputed_also_by_a_witness_that_began_anew(pair):
    hub, lyon = pair
    hub.write(4)
    hub.copied("then")
    hub.write(3)
    lyon.looks(hub)
    hub.rolled_back("then")
    assert hub.journal.verify().intact  # by itself it is as good as it was
    lyon.open()
    found = lyon.looks(hub)
    assert "the journal of hub was rolled back: 7 entries were seen of it, and it has 4" in found.dispute.words
    assert "\n7\n" in found.dispute.seen
    assert "\n4\n" in found.dispute.shown
    assert found.answer.words == found.dispute.words


def test_a_journal_with_another_past_is_disputed_however_long_it_is(pair):
    hub, lyon = pair
    hub.write(4)
    hub.copied("then")
    hub.write(3)
    lyon.looks(hub)
    hub.rolled_back("then")
    hub.write(30, run="other")
    found = lyon.looks(hub)
    assert "was changed: 7 entries were seen of it, and its 34 do not begin with these" in found.dispute.words
    assert "witness" not in found.dispute.shown


def test_a_journal_of_the_same_length_with_another_end_is_disputed(pair):
    hub, lyon = pair
    hub.write(4)
    hub.copied("then")
    hub.write(1)
    lyon.looks(hub)
    hub.rolled_back("then")
    hub.write(1, run="other")
    assert "its 5 do not begin with these" in lyon.looks(hub).dispute.words


def test_another_journal_in_its_place_is_disputed(pair, tmp_path):
    hub, lyon = pair
    hub.write(4)
    lyon.looks(hub)
    impostor = Party(tmp_path / "other", "hub")
    impostor.write(9)
    found = lyon.looks(impostor)
    impostor.journal.close()
    assert "is signed by atoll/hub/" in found.dispute.words
    lyon.witness.forget("hub")  # a person looked into it
    assert lyon.looks(hub).dispute is None


def test_a_checkpoint_that_its_key_did_not_sign_is_disputed(pair):
    hub, lyon = pair
    hub.write(4)
    lyon.looks(hub)
    hub.write(1)
    shown = hub.witness.heard("lyon", "lyon", lyon.witness.ask("hub")).answer
    forged = shown.model_copy(update={"checkpoint": shown.checkpoint.replace("\n5\n", "\n6\n")})
    assert "is not signed by" in lyon.witness.heard("hub", "hub", forged).dispute.words


def test_an_answer_to_an_older_question_is_no_roll_back(pair):
    hub, lyon = pair
    hub.write(4)
    older = hub.witness.heard("lyon", "lyon", lyon.witness.ask("hub")).answer
    hub.write(4)
    lyon.looks(hub)
    late = lyon.witness.heard("hub", "hub", older)
    assert (late.answer, late.dispute) == (None, None)


def test_a_word_on_another_tree_or_in_another_name_is_not_kept(pair, caplog):
    hub, lyon = pair
    hub.write(4)
    lyon.write(2)
    shown = hub.witness.heard("lyon", "lyon", lyon.witness.ask("hub")).answer
    word = lyon.witness.heard("hub", "hub", shown).answer
    wrong = [
        word.model_copy(update={"size": 3}),
        word.model_copy(update={"size": 0}),
        word.model_copy(update={"size": 1 << 50}),
        word.model_copy(update={"line": "nonsense"}),
        word.model_copy(update={"key": "nonsense"}),
        word.model_copy(update={"key": str(hub.journal.key)}),
    ]
    for said in wrong:
        hub.witness.heard("lyon", "lyon", said)
    hub.witness.heard("bern", "bern", word)
    assert hub.journal.verify().witnesses == {}
    assert caplog.text.count("witnessing with") == len(wrong) + 1
    hub.witness.heard("lyon", "lyon", word)
    assert hub.journal.verify().witnesses == {"lyon": 4}


def test_what_was_seen_and_cannot_be_read_any_more_is_not_taken_for_nothing_seen(pair, caplog):
    hub, lyon = pair
    hub.write(4)
    lyon.looks(hub)
    lyon.witness.file("hub").write_text("spoilt")
    assert lyon.witness.ask("hub") is None
    assert "cannot be read" in caplog.text


# --- at the hub


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path / "house")
    yield made
    made.close()


def told(house, party):
    """Have a site look and be looked at, to the end of what both have to say."""
    house.desk.heard(party.owner, party.witness.ask("hub"))
    said = house.sent[party.owner]
    while said:
        message = said.pop(0)
        if isinstance(message, Attest | Attested | Cosigned):
            judged = party.witness.heard("hub", "hub", message)
            if judged.answer is not None:
                house.desk.heard(party.owner, judged.answer)


def test_the_hub_and_a_site_cosign_each_other(house, pair):
    _, lyon = pair
    house.connect("lyon")
    lyon.write(5)
    told(house, lyon)
    size = house.journal.verify().entries
    assert house.journal.verify().witnesses == {"lyon": size}
    assert lyon.journal.verify().witnesses == {"hub": 5}


def test_a_site_that_rolled_its_journal_back_is_in_quarantine_until_it_is_released(house, pair):
    _, lyon = pair
    house.connect("lyon")
    lyon.write(2)
    lyon.copied("then")
    lyon.write(5)
    told(house, lyon)
    lyon.rolled_back("then")
    told(house, lyon)
    (disputed,) = house.happened("journal.disputed")
    assert "rolled back: 7 entries were seen of it, and it has 2" in disputed.words
    assert "atoll site release lyon" in house.desk.quarantine.words("lyon")
    told(house, lyon)  # it is not asked again, and nothing new is written of it
    assert len(house.happened("journal.disputed")) == 1
    house.desk.release("lyon", "ada")
    told(house, lyon)
    assert house.desk.quarantine.words("lyon") == ""
    assert lyon.journal.verify().witnesses == {"hub": 2}


def test_a_release_for_another_reason_forgets_no_journal(house, pair):
    _, lyon = pair
    house.connect("lyon")
    lyon.write(2)
    told(house, lyon)
    house.conductor.record(Quarantined(site="lyon", words="three bad answers"))
    house.desk.release("lyon", "ada")
    assert (house.journal.path.parent / "witness" / "lyon").exists()


def test_a_site_that_joined_anew_may_have_another_journal(house, pair, tmp_path):
    _, lyon = pair
    house.connect("lyon")
    lyon.write(2)
    told(house, lyon)
    fresh = Party(tmp_path / "fresh", "lyon")
    fresh.write(1)
    house.conductor.record(Certified(site="lyon", key=ZERO, serial="1", expires=1.0, token=ZERO))
    told(house, fresh)
    fresh.journal.close()
    assert house.happened("journal.disputed") == []


# --- at a site


def test_an_agent_does_nothing_for_a_hub_that_rolled_its_journal_back(tmp_path):
    home, double, then = tmp_path / "lyon", Hub(), Party(tmp_path / "hub", "hub")
    sites.create(home, Site(name="lyon"), SITE_POLICY)
    agent = Agent(sites.read(home), home, Workers())
    thread = threading.Thread(target=agent.serve_desk, args=(double,))
    thread.start()

    def asked(count):
        double.send(Welcome(heartbeat=2.0))
        question = double.wait("attest", count)
        double.send(then.witness.heard("lyon", "lyon", question).answer)
        return double.wait("cosigned", count)

    try:
        assert eventually(lambda: double.send is not None)
        then.write(2)
        then.copied("before")
        then.write(1)
        assert asked(1).words == ""
        then.rolled_back("before")
        assert "rolled back: 3 entries were seen of it, and it has 2" in asked(2).words
        double.send(assign())
        refused = double.wait("refusal")
        assert refused.words.startswith("lyon: the journal of hub was rolled back")
        assert str(home / "witness" / "hub") in refused.words
        with Journal(home / "journal.db", "lyon", read_only=True) as journal:
            assert [entry.event.party for entry in journal.entries(kinds=("journal.disputed",))] == ["hub"]
    finally:
        agent.stop()
        double.send(Release(run="none"))
        thread.join(20)
        then.journal.close()
    assert not thread.is_alive()
