"""The chain of a journal: whatever is changed, taken out or moved is found, at its place."""

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest

from atoll.errors import Corrupt
from atoll.journal.sqlite import Journal
from atoll.spec.event import Cancelled, Event, Joined
from atoll.spec.run import Verdict


def joined(number: int) -> Event:
    return Joined(run=f"run-{number}", site="berlin")


def written(path: Path, count: int = 10) -> Path:
    with Journal(path, "hub") as journal:
        journal.append(*(joined(number) for number in range(count)), actor="site:berlin")
    return path


def tamper(path: Path, *statements: str) -> None:
    """Change the file as someone with an SQLite shell would: first the triggers, then the rows."""
    connection = sqlite3.connect(path, isolation_level=None)
    for trigger in ("entries_keep", "entries_stay", "entries_next"):
        connection.execute(f"drop trigger {trigger}")
    for statement in statements:
        connection.execute(statement)
    connection.close()


def verdict(path: Path) -> Verdict:
    with Journal(path, "hub", read_only=True) as journal:
        return journal.verify()


def rehashed(path: Path, seq: int, old: str, new: str) -> None:
    """Edit an entry and store the digest that fits its new text."""
    connection = sqlite3.connect(path)
    body = connection.execute("select body from entries where seq = ?", (seq,)).fetchone()[0]
    connection.close()
    body = body.replace(old.encode(), new.encode())
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    tamper(path, f"update entries set body = x'{body.hex()}', digest = '{digest}' where seq = {seq}")


def test_an_untouched_journal_verifies(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    assert verdict(path) == Verdict(journal=str(path), entries=10, intact=True)


def test_an_empty_journal_verifies(tmp_path: Path):
    path = written(tmp_path / "journal.db", 0)
    assert verdict(path).intact
    assert verdict(path).entries == 0


def test_the_chain_can_be_recomputed_with_hashlib_alone(tmp_path: Path):
    connection = sqlite3.connect(written(tmp_path / "journal.db"))
    prev = "sha256:" + hashlib.sha256(b"atoll journal hub").hexdigest()
    for seq, body, digest in connection.execute("select seq, body, digest from entries order by seq").fetchall():
        entry = json.loads(body)
        assert (entry["seq"], entry["prev"]) == (seq, prev)
        prev = "sha256:" + hashlib.sha256(body).hexdigest()
        assert digest == prev
    assert seq == 10
    connection.close()


def test_an_edited_entry_is_named(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "update entries set body = cast(replace(body, 'berlin', 'zurich') as blob) where seq = 4")
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, 4, 3)
    assert "entry 4 is edited" in found.words
    with Journal(path, "hub", read_only=True) as journal, pytest.raises(Corrupt, match="journal entry 4: edited"):
        list(journal.entries())


def test_an_edit_with_a_fitting_digest_breaks_the_link_after_it(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    rehashed(path, 4, "berlin", "zurich")
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 5)
    assert "does not follow entry 4" in found.words


def test_an_entry_that_is_taken_out_is_missed(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "delete from entries where seq = 6")
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 6)
    assert "entry 6 is missing: after entry 5 comes entry 7" in found.words


def test_an_entry_taken_out_and_the_rest_moved_up_is_found(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "delete from entries where seq = 6", "update entries set seq = seq - 1 where seq > 6")
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 6)
    assert "was written as entry 7" in found.words


def test_the_first_entries_taken_out_are_missed(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "delete from entries where seq <= 3")
    assert verdict(path).bad == 1


def test_two_entries_that_changed_places_are_found(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(
        path,
        "update entries set seq = 99 where seq = 3",
        "update entries set seq = 3 where seq = 4",
        "update entries set seq = 4 where seq = 99",
    )
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 3)
    assert "moved" in found.words


def test_an_entry_indexed_as_another_kind_is_found(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "update entries set kind = 'run.lost' where seq = 2")
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 2)
    assert "indexed as 'run.lost'" in found.words


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"actor"', '"aktor"', "not a table of actor"),
        ('{"actor"', '"actor"', "not JSON"),
        ("run.joined", "run.jolned", "wrong fields"),
        ('"berlin"', "12", "wrong fields"),
        ('"seq":7', '"seq":8', "was written as entry 8"),
        ('"actor":"site:berlin"', '"actor":null', "actor"),
    ],
)
def test_an_entry_that_is_no_entry_is_named(tmp_path: Path, old: str, new: str, words: str):
    path = written(tmp_path / "journal.db")
    rehashed(path, 7, old, new)
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 7)
    assert words in found.words


def test_rows_of_another_type_are_found_and_not_read(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(
        path,
        "create table looser as select * from entries",
        "drop table entries",
        "alter table looser rename to entries",
        "update entries set body = 99999999999999 where seq = 3",
    )
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 3)


def test_an_index_that_hides_entries_is_found(tmp_path: Path):
    path = written(tmp_path / "journal.db", 60)
    connection = sqlite3.connect(path, isolation_level=None)
    root = connection.execute("select rootpage from sqlite_schema where name = 'entries_by_run'").fetchone()[0]
    size = connection.execute("pragma page_size").fetchone()[0]
    connection.execute("pragma wal_checkpoint(truncate)")
    connection.close()
    content = bytearray(path.read_bytes())
    content[(root - 1) * size + 3 : (root - 1) * size + 5] = (59).to_bytes(2, "big")  # one cell fewer on that page
    path.write_bytes(content)
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, None, 60)
    assert "not the indexes over them" in found.words


def test_a_page_that_was_overwritten_is_found(tmp_path: Path):
    path = written(tmp_path / "journal.db", 200)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    assert not verdict(path).intact


def test_a_file_cut_in_half_is_corrupt(tmp_path: Path):
    path = written(tmp_path / "journal.db", 200)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(Corrupt, match="damaged"):
        Journal(path, "hub", read_only=True)


def test_entries_cut_off_under_an_open_journal_are_missed(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    with Journal(path, "hub") as journal:
        tamper(path, "delete from entries where seq > 8")
        found = journal.verify()
        assert (found.intact, found.bad) == (False, 9)
        with pytest.raises(Corrupt, match="after 8 are gone"):
            journal.append(Cancelled(run="r", user="ana"), actor="user:ana")


def test_a_last_entry_replaced_under_an_open_journal_is_found(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    with Journal(path, "hub") as journal:
        rehashed(path, 10, "berlin", "zurich")
        assert journal.verify().bad == 10
