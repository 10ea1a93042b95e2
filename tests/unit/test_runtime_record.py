"""What a home's journals tell without a hub: verdicts, what was live at a time, and the promise to keep entries."""

import sqlite3
import time

import pytest

from atoll.errors import Denied, Invalid, NotFound
from atoll.journal import Entry, Journal
from atoll.runtime import record
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
