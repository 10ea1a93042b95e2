"""A journal in a file: it only grows, several may read and write, and what is wrong with its place is told."""

import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from atoll.errors import Corrupt, Invalid, NotFound, Unavailable
from atoll.journal.sqlite import Journal
from atoll.spec.event import Answer, Answered, Cancelled, Crossed, Event, Invited, Joined, Lost, Merged
from atoll.spec.policy import Crossing, Decision


def joined(number: int) -> Event:
    return Joined(run=f"run-{number}", site="berlin")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


def test_what_was_appended_is_read_back(path: Path):
    answer = Answer(site="berlin", position=3, epoch=1, loss=0.25, totals={})
    events: list[Event] = [joined(1), Answered(run="run-1", answer=answer), Cancelled(run="run-1", user="ana")]
    with Journal(path, "hub") as journal:
        written = journal.append(*events, actor="user:ana")
        assert [entry.event for entry in written] == events
        assert [entry.seq for entry in written] == [1, 2, 3]
        assert list(journal.entries()) == written
        assert journal.append(actor="user:ana") == []
        assert journal.verify().entries == 3


def test_entries_can_be_chosen_by_number_and_kind(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(*(joined(number) for number in range(700)), actor="hub")
        journal.append(Lost(run="run-1", site="berlin"), Cancelled(run="run-1", user="ana"), actor="hub")
        assert [entry.seq for entry in journal.entries(after=698)] == [699, 700, 701, 702]
        assert [entry.seq for entry in journal.entries(kinds=("run.lost", "run.cancelled"))] == [701, 702]
        assert len(list(journal.entries(kinds=("run.joined",)))) == 700
        assert list(journal.entries(after=702)) == []


def crossed(run: str | None) -> Event:
    allowed = Decision(allowed=True, party="berlin")
    return Crossed(crossing=Crossing(kind="update", direction="out", site="berlin", run=run), decision=allowed)


def test_the_entries_of_a_run_are_chosen_without_reading_others(path: Path):
    invited = Invited(site="oslo", token="sha256:" + 64 * "0", expires=1.0)
    with Journal(path, "hub") as journal:
        for number in range(300):
            journal.append(joined(number % 3), crossed(f"run-{number % 3}"), crossed(None), invited, actor="hub")
        of_run = [entry for entry in journal.entries() if "run-1" in str(entry.event)]
        statements: list[str] = []
        journal._store.connection.set_trace_callback(statements.append)
        assert list(journal.entries(run="run-1")) == of_run
        assert len(of_run) == 200
        assert list(journal.entries(run="run-1", kinds=("crossing",))) == of_run[1::2]
        assert list(journal.entries(after=of_run[-2].seq, run="run-1")) == of_run[-1:]
        assert list(journal.entries(run="run-9")) == []
        journal._store.connection.set_trace_callback(None)
        for statement in statements:
            (plan,) = journal._store.connection.execute(f"explain query plan {statement}").fetchall()
            assert "SEARCH entries USING INDEX entries_by_run" in plan[3]


def test_a_journal_without_the_index_of_runs_gets_it_from_its_entries(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(joined(1), joined(2), crossed("run-1"), actor="hub")
        journal._store.connection.execute("drop index entries_by_run")
    with Journal(path, "hub", read_only=True) as journal:
        assert [entry.seq for entry in journal.entries(run="run-1")] == [1, 3]
    with Journal(path, "hub") as journal:
        assert [entry.seq for entry in journal.entries(run="run-1")] == [1, 3]
        assert journal._store.connection.execute("pragma index_list(entries)").fetchone()[1] == "entries_by_run"
        assert journal.verify().intact


def test_reading_does_not_keep_others_from_writing(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(joined(1), joined(2), actor="hub")
        reader = journal.entries()
        next(reader)
        journal.append(joined(3), actor="hub")  # would hang if the reader held the lock
        assert journal.verify().entries == 3


def test_a_reopened_journal_continues_its_chain(path: Path):
    with Journal(path, "hub") as journal:
        first = journal.append(joined(1), actor="hub")
    with Journal(path, "hub") as journal:
        assert list(journal.entries()) == first
        journal.append(joined(2), actor="hub")
        assert journal.verify().intact
        assert journal.verify().entries == 2


def test_rows_cannot_be_changed_by_hand(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(joined(1), actor="hub")
    connection = sqlite3.connect(path)
    for statement in (
        "update entries set kind = 'x'",
        "delete from entries",
        "insert into entries values (5, 'x', x'00', x'00')",
        "insert or replace into entries values (1, 'x', x'00', x'00')",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="a journal only grows"):
            connection.execute(statement)
    connection.close()


def test_threads_append_one_chain(path: Path):
    with Journal(path, "hub") as journal:

        def write(thread: int) -> None:
            for number in range(10):
                journal.append(joined(number), joined(number + 100), actor=f"thread:{thread}")

        threads = [threading.Thread(target=write, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.verify().intact
        entries = list(journal.entries())
    assert len(entries) == 100
    for first, second in zip(entries[::2], entries[1::2], strict=True):
        assert first.actor == second.actor  # the events of one call lie together
    for thread in range(5):
        runs = [entry.event.run for entry in entries if entry.actor == f"thread:{thread}"]
        assert runs[::2] == [f"run-{number}" for number in range(10)]


def test_two_writers_of_one_file_take_turns(path: Path):
    with Journal(path, "hub") as one, Journal(path, "hub") as two:
        for number in range(5):
            one.append(joined(number), actor="one")
            two.append(joined(number), actor="two")
        assert one.verify().entries == 10
        assert [entry.actor for entry in two.entries()] == ["one", "two"] * 5


def test_a_file_that_stays_busy_is_reported(path: Path):
    with Journal(path, "hub", patience=0.05) as journal:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("begin immediate")
        with pytest.raises(Unavailable, match=r"another process kept it busy for 0\.05 s"):
            journal.append(joined(1), actor="hub")
        other.execute("rollback")
        other.close()
        assert journal.append(joined(1), actor="hub")[0].seq == 1


def test_a_full_disk_leaves_nothing_half_written(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(joined(1), actor="hub")
        # SQLite's own limit gives the error of a full disk without one.
        pages = journal._store.connection.execute("pragma page_count").fetchone()[0]
        journal._store.connection.execute(f"pragma max_page_count = {pages}")
        with pytest.raises(Unavailable, match=r"journal\.db: no space left on its disk; free some"):
            journal.append(*(joined(number) for number in range(500)), actor="hub")
        assert journal.verify().entries == 1
        journal._store.connection.execute("pragma max_page_count = 100000")
        assert journal.append(joined(2), actor="hub")[0].seq == 2
        assert journal.verify().intact


def test_an_event_that_cannot_be_read_back_is_not_written(path: Path):
    good = Merged(run="run-1", position=1, sites=("berlin",), loss=0.5)
    with Journal(path, "hub") as journal:
        for bad in (good.model_copy(update={"loss": float("nan")}), good.model_copy(update={"position": -1})):
            with pytest.raises(Invalid, match=r"event 'run\.merged'"):
                journal.append(joined(1), bad, actor="hub")
        assert journal.verify().entries == 0


def test_a_file_that_is_no_database_is_corrupt(tmp_path: Path):
    path = tmp_path / "journal.db"
    path.write_bytes(b"these are the notes of a careful person\n" * 200)
    for read_only in (True, False):
        with pytest.raises(Corrupt, match="no journal"):
            Journal(path, "hub", read_only=read_only)
    assert path.read_bytes().startswith(b"these are the notes")


def test_another_database_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("create table entries (name text)")
    connection.close()
    with pytest.raises(Invalid, match="no journal of Atoll"):
        Journal(path, "hub")
    connection = sqlite3.connect(path)
    assert connection.execute("select count(*) from sqlite_schema").fetchone() == (1,)
    connection.close()


def test_another_owners_journal_is_refused(path: Path):
    Journal(path, "berlin").close()
    with pytest.raises(Invalid, match="journal of 'berlin' and not of 'hub'"):
        Journal(path, "hub")


def test_reading_only_needs_a_file_and_does_not_write(path: Path):
    with pytest.raises(NotFound, match="there is no such journal"):
        Journal(path, "hub", read_only=True)
    assert not path.exists()
    with Journal(path, "hub") as journal:
        journal.append(joined(1), actor="hub")
        with Journal(path, "hub", read_only=True) as view:  # while the writer has it open
            assert [entry.seq for entry in view.entries()] == [1]
            with pytest.raises(Invalid, match="read only"):
                view.append(joined(2), actor="hub")
            journal.append(joined(2), actor="hub")
            assert view.verify().entries == 2


def test_a_place_that_cannot_be_used_is_reported(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Unavailable, match="cannot be used"):
        Journal(tmp_path / "file" / "journal.db", "hub")
    with pytest.raises(Unavailable, match="cannot be used"):
        Journal(tmp_path, "hub")


def test_only_the_owner_of_the_files_may_read_them(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(joined(1), actor="hub")
        modes = {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {0o600}


def test_a_path_with_signs_of_an_address_is_a_path(tmp_path: Path):
    path = tmp_path / "what? #1 50%.db"
    with Journal(path, "hub") as journal:
        journal.append(joined(1), actor="hub")
    assert path.is_file()


def test_closing_ends_all_use(path: Path):
    journal = Journal(path, "hub")
    journal.close()
    journal.close()
    with pytest.raises(Unavailable, match="closed"):
        journal.append(joined(1), actor="hub")
    with pytest.raises(Unavailable, match="closed"):
        list(journal.entries())


def test_a_journal_is_whole_whenever_it_is_verified_while_others_write(path: Path):
    with Journal(path, "hub") as journal, Journal(path, "hub") as other, Journal(path, "hub", read_only=True) as view:
        journal.append(joined(0), actor="hub")
        over = threading.Event()

        def write(writer: Journal) -> None:
            while not over.wait(0.002):  # a lock that is taken again at once is nobody else's
                writer.append(joined(1), joined(2), actor="hub")

        threads = [threading.Thread(target=write, args=(writer,)) for writer in (journal, other)]
        for thread in threads:
            thread.start()
        try:
            found = [reader.verify() for _ in range(10) for reader in (journal, view)]
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert [verdict.words for verdict in found] == [""] * 20
        assert journal.verify().entries >= found[-1].entries > 0
