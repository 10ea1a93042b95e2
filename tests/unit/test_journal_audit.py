"""What was done to a journal's file behind its back is found: the first entry that is not what it was is named."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from atoll.errors import Corrupt
from atoll.journal.key import Key
from atoll.journal.note import Checkpoint, Witnessed, cosigned
from atoll.journal.sqlite import Journal
from atoll.journal.tree import Frontier, leaf
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
    connection.execute("begin")
    for statement in statements:
        connection.execute(statement)
    connection.execute("commit")
    connection.close()


def verdict(path: Path) -> Verdict:
    with Journal(path, "hub", read_only=True) as journal:
        return journal.verify()


def rehashed(path: Path, seq: int, old: str, new: str) -> None:
    """Edit an entry and store the hash that fits its new text."""
    connection = sqlite3.connect(path)
    body = connection.execute("select body from entries where seq = ?", (seq,)).fetchone()[0]
    connection.close()
    fitting = f"cast(x'{leaf(body := body.replace(old.encode(), new.encode())).hex()}' || substr(hashes, 33) as blob)"
    tamper(path, f"update entries set body = x'{body.hex()}', hashes = {fitting} where seq = {seq}")


def rewritten(path: Path, old: str, new: str) -> None:
    """Edit every entry with a word in it and make all hashes anew, as whoever lacks only the key could do."""
    connection = sqlite3.connect(path)
    found = connection.execute("select seq, body from entries order by seq").fetchall()
    connection.close()
    frontier, statements = Frontier(), []
    for seq, body in found:
        body = body.replace(old.encode(), new.encode())
        hashes = b"".join(frontier.append(leaf(body))).hex()
        statements.append(f"update entries set body = x'{body.hex()}', hashes = x'{hashes}' where seq = {seq}")
    tamper(path, *statements)


def test_an_untouched_journal_verifies(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    with Journal(path, "hub", read_only=True) as journal:
        assert journal.verify() == Verdict(journal=str(path), entries=10, intact=True, key=str(journal.key))


def test_an_empty_journal_verifies(tmp_path: Path):
    path = written(tmp_path / "journal.db", 0)
    assert verdict(path).intact
    assert verdict(path).entries == 0


def test_the_root_can_be_recomputed_with_hashlib_alone(tmp_path: Path):
    with Journal(written(tmp_path / "journal.db"), "hub", read_only=True) as journal:
        signed = journal.checkpoint()[0]
    connection = sqlite3.connect(tmp_path / "journal.db")
    level = [hashlib.sha256(b"\0" + body).digest() for (body,) in connection.execute("select body from entries")]
    connection.close()
    assert signed.size == len(level) == 10
    while len(level) > 1:  # a node without a sibling goes up as it is
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(pair)).digest() if len(pair) == 2 else pair[0] for pair in pairs]
    assert signed.root == level[0]


def test_an_edited_entry_is_named(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "update entries set body = cast(replace(body, 'berlin', 'zurich') as blob) where seq = 4")
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, 4, 3)
    assert "entry 4 is edited" in found.words
    with Journal(path, "hub", read_only=True) as journal, pytest.raises(Corrupt, match="journal entry 4: edited"):
        list(journal.entries())


def test_an_edit_with_a_fitting_hash_does_not_fit_the_hash_of_its_pair(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    rehashed(path, 4, "berlin", "zurich")
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, 3, 2)
    assert "one of entries 3 to 4 is not what it was, for the hash over them does not fit" in found.words


def test_an_edit_with_all_hashes_made_anew_is_not_what_was_signed(tmp_path: Path):
    path = written(tmp_path / "journal.db", 0)
    with Journal(path, "hub") as journal:
        journal.append(*(joined(number) for number in range(1500)), actor="hub")
        journal.append(*(joined(number) for number in range(1500)), actor="hub")
        journal.append(Cancelled(run="run-1", user="ana"), actor="hub")
    rewritten(path, '"ana"', '"eve"')
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, 1501, 1500)
    assert "one of entries 1501 to 3001 is not what it was, for what its owner's signature says" in found.words
    with pytest.raises(Corrupt, match="are not the 3001 that its owner signed"):
        Journal(path, "hub")


def test_a_checkpoint_of_another_key_vouches_for_nothing(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    rewritten(path, "berlin", "zurich")
    with Journal(path, "hub", read_only=True) as journal:
        forged = Checkpoint(journal.key.name, 10, Frontier.load(10, journal.stored).root())
    signature = forged.signed(Key.new("hub")).hex()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"update checkpoints set root = x'{forged.root.hex()}', signature = x'{signature}'")
    found = verdict(path)
    assert (found.intact, found.bad) == (False, 1)
    assert "a checkpoint that its owner's key did not sign" in found.words


def test_entries_that_were_not_signed_are_named(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "delete from checkpoints")
    assert verdict(path).bad == 1
    assert "not signed" in verdict(path).words


def test_entries_cut_off_at_the_end_are_missed(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    tamper(path, "delete from entries where seq > 8")
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, 9, 8)
    assert "its owner's signature says that there are 10" in found.words
    with pytest.raises(Corrupt, match="its 8 entries are not the 10 that its owner signed"):
        Journal(path, "hub")


def test_what_a_witness_cosigned_is_missed_after_a_roll_back_by_who_has_the_key(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    lyon = Key.new("lyon")
    with Journal(path, "hub") as journal:
        before = journal.checkpoint()[0]
        journal.append(*(joined(number) for number in range(5)), actor="hub")
        seen, signature = journal.checkpoint()
        journal.keep(Witnessed(seen, signature, cosigned(seen, lyon, 1_700_000_000)))
        assert journal.verify().witnesses == {"lyon": 15}
    signature = before.signed(Key.kept(tmp_path / "journal.key", "hub", make=False)).hex()
    again = f"insert into checkpoints values (10, x'{before.root.hex()}', x'{signature}')"
    tamper(path, "delete from entries where seq > 10", "delete from checkpoints", again)
    found = verdict(path)
    assert (found.intact, found.bad, found.entries) == (False, 11, 10)
    assert "the witness lyon says that there are 15" in found.words


def test_a_word_that_its_witness_did_not_sign_is_found(tmp_path: Path):
    path = written(tmp_path / "journal.db")
    with Journal(path, "hub") as journal:
        seen, signature = journal.checkpoint()
        journal.keep(Witnessed(seen, signature, cosigned(seen, Key.new("lyon"), 1_700_000_000)))
    tamper(path, "update cosignatures set time = 1800000000")
    assert "a word that lyon's key did not sign" in verdict(path).words


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
        assert journal.verify().bad == 9
