"""What a home's journals tell without a hub: verdicts, what was live at a time, and the promise to keep entries."""

import sqlite3
import time

import pytest

from atoll.errors import Denied, Invalid, NotFound
from atoll.journal import Entry, Journal
from atoll.runtime import record
from atoll.runtime.view import Borders
from atoll.runtime.witnessing import Witness
from atoll.spec.event import Joined
from atoll.spec.model import Aliased, Deployed, Deployment, Undeployed


def started(name, model):
    return Deployed(deployment=Deployment(name=name, model=model), user="ana")


HISTORY = [
    Entry(1, 10.0, "ana", started("heart", "heart@1")),
    Entry(2, 20.0, "ana", Aliased(model="heart", alias="champion", version=1, user="ana")),
    Entry(3, 30.0, "bob", started("heart", "heart@2")),
    Entry(4, 40.0, "bob", Aliased(model="heart", alias="champion", version=2, user="bob")),
    Entry(5, 50.0, "bob", Undeployed(name="heart", user="bob")),
    Entry(6, 60.0, "ana", started("lung", "lung@1")),
]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (9.0, []),
        (10.0, [("heart", "heart@1", "", 1)]),
        (25.0, [("heart", "heart@1", "", 1), ("heart", "heart@1", "champion", 2)]),
        (35.0, [("heart", "heart@2", "", 3), ("heart", "heart@1", "champion", 2)]),
        (55.0, [("heart", "heart@2", "champion", 4)]),
        (99.0, [("lung", "lung@1", "", 6), ("heart", "heart@2", "champion", 4)]),
    ],
)
def test_what_was_live_at_a_time_is_what_had_begun_and_not_ended(at, expected):
    found = record.live(HISTORY, at)
    assert [(one.name, one.model, one.alias, one.entry) for one in found] == expected


@pytest.fixture
def home(tmp_path):
    for owner, folder in (("hub", "hub"), ("lyon", "sites/lyon")):
        with Journal(tmp_path / folder / "journal.db", owner) as journal:
            journal.append(*(Joined(run=f"run-{number}", site="lyon") for number in range(10)), actor=owner)
    return tmp_path


def test_the_journals_of_a_home_are_verified_from_their_files(home):
    connection = sqlite3.connect(home / "sites" / "lyon" / "journal.db")
    connection.execute("drop trigger entries_stay")
    connection.execute("update entries set body = cast(replace(body, 'run-4', 'run-5') as blob)")
    connection.commit()
    connection.close()
    hub, lyon = record.verified(home, lambda owner, seq: None)
    assert (hub.intact, hub.entries) == (True, 10)
    assert (lyon.intact, lyon.bad) == (False, 5)
    (home / "sites" / "lyon" / "journal.db").write_text("no journal")
    hub, lyon = record.verified(home, lambda owner, seq: None)
    assert hub.intact
    assert (lyon.intact, lyon.journal) == (False, str(home / "sites" / "lyon" / "journal.db"))


def test_a_home_without_journals_and_an_owner_without_one_are_told(home, tmp_path):
    with pytest.raises(NotFound, match="there is no journal here yet"):
        record.verified(tmp_path / "elsewhere", lambda owner, seq: None)
    for owner in ("bern", "../hub", "hub/../../x"):
        with pytest.raises(NotFound, match="there is hub, lyon"):
            record.opened(home, owner)


def test_a_promise_to_keep_a_journal_is_an_entry_and_is_never_shortened(home):
    soon, later = time.time() + 1000, time.time() + 5000
    assert record.retain(home, "hub", soon, "ana") == 0.0
    assert record.retain(home, "hub", later, "ana") == soon
    with pytest.raises(Denied, match="cannot be shortened"):
        record.retain(home, "hub", soon, "ana")
    record.retain(home, "hub", later, "ana")  # the same again is nothing new
    with pytest.raises(Invalid, match="has gone by"):
        record.retain(home, "lyon", 1000.0, "ana")
    with record.opened(home, "hub") as journal:
        kept = [entry.event.until for entry in journal.entries(kinds=("journal.retained",))]
        assert kept == [soon, later]
        assert journal.verify().intact


def test_a_promise_is_made_while_the_owner_is_at_work(home):
    with Journal(home / "hub" / "journal.db", "hub") as journal:
        record.retain(home, "hub", time.time() + 1000, "ana")
        (entry,) = journal.append(Joined(run="later", site="lyon"), actor="hub")
        assert entry.seq == 12
        assert journal.verify().intact


@pytest.fixture
def witnessed(home):
    """A home whose hub and site have seen each other's ten entries."""
    folders = {"hub": home / "hub", "lyon": home / "sites" / "lyon"}
    journals = {owner: Journal(folder / "journal.db", owner) for owner, folder in folders.items()}
    hub, lyon = (Witness(folders[owner] / "witness", journals[owner]) for owner in folders)
    hub.heard("lyon", "lyon", lyon.heard("hub", "hub", hub.ask("lyon")).answer)
    lyon.heard("hub", "hub", hub.heard("lyon", "lyon", lyon.ask("hub")).answer)
    for journal in journals.values():
        journal.close()
    return home


def rewritten(folder, owner, count, key=None):
    """Put another history in a journal's place, by another key or by the same."""
    for file in folder.glob("journal.*"):
        file.unlink()
    if key is not None:
        (folder / "journal.key").write_bytes(key)
        (folder / "journal.key").chmod(0o600)
    with Journal(folder / "journal.db", owner) as journal:
        journal.append(*(Joined(run="another", site="lyon") for _ in range(count)), actor=owner)


@pytest.mark.parametrize(("owner", "folder", "witness"), [("hub", "hub", "lyon"), ("lyon", "sites/lyon", "hub")])
def test_a_journal_that_is_rewritten_under_another_key_is_not_the_one_that_was_seen(witnessed, owner, folder, witness):
    assert all(one.intact for one in record.verified(witnessed, lambda *_: None))
    rewritten(witnessed / folder, owner, 9)
    (found,) = (one for one in record.verified(witnessed, lambda *_: None) if not one.intact)
    assert found.journal == str(witnessed / folder / "journal.db")
    assert f"the witness {witness} saw 10 entries that atoll/{owner}/" in found.words


@pytest.mark.parametrize("count", [9, 10, 11])
def test_one_that_is_rewritten_under_its_own_key_is_held_against_what_was_seen(witnessed, count):
    rewritten(witnessed / "hub", "hub", count, (witnessed / "hub" / "journal.key").read_bytes())
    hub, lyon = record.verified(witnessed, lambda *_: None)
    assert (hub.intact, lyon.intact) == (False, True)
    assert "the witness lyon" in hub.words


def test_the_running_hub_holds_its_journal_against_what_was_seen_too(witnessed):
    rewritten(witnessed / "hub", "hub", 12)
    with Journal(witnessed / "hub" / "journal.db", "hub") as journal:
        hub, lyon = record.Record(journal, witnessed, Borders(), lambda run: None).verify()
    assert (hub.intact, lyon.intact) == (False, True)


def test_a_journal_is_not_signed_by_another_key_than_the_one_beside_it(home):
    key = home / "sites" / "lyon" / "journal.key"
    (home / "hub" / "journal.key").write_bytes(key.read_bytes())
    hub, lyon = record.verified(home, lambda *_: None)
    assert (hub.intact, lyon.intact) == (False, True)
    assert "another key signs it than the one beside it" in hub.words
    (home / "hub" / "journal.key").unlink()  # of a copy without it nothing is said
    assert all(one.intact for one in record.verified(home, lambda *_: None))


def test_a_site_of_another_hub_has_seen_another_journal(witnessed):
    (witnessed / "sites" / "lyon" / "identity.json").write_text("{}")
    note = witnessed / "sites" / "lyon" / "witness" / "hub"
    note.rename(note.with_name("41a09c1f2c9e77d0"))
    rewritten(witnessed / "hub", "hub", 9)
    rewritten(witnessed / "sites" / "lyon", "lyon", 9)
    assert all(one.intact for one in record.verified(witnessed, lambda *_: None))
