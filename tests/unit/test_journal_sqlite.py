"""A journal in a file: it only grows, several may write, and what was written is there after a kill."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import atoll
from atoll.errors import Corrupt, Invalid, NotFound, Unavailable
from atoll.journal.sqlite import Journal
from atoll.spec.event import Answer, Answered, Cancelled, Event, Joined, Lost, Merged


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
        assert journal.head() == (3, written[-1].digest)


def test_entries_can_be_chosen_by_number_and_kind(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(*(joined(number) for number in range(700)), actor="hub")
        journal.append(Lost(run="run-1", site="berlin"), Cancelled(run="run-1", user="ana"), actor="hub")
        assert [entry.seq for entry in journal.entries(after=698)] == [699, 700, 701, 702]
        assert [entry.seq for entry in journal.entries(kinds=("run.lost", "run.cancelled"))] == [701, 702]
        assert len(list(journal.entries(kinds=("run.joined",)))) == 700
        assert list(journal.entries(after=702)) == []


def test_reading_does_not_keep_others_from_writing(path: Path):
    with Journal(path, "hub") as journal:
        journal.append(joined(1), joined(2), actor="hub")
        reader = journal.entries()
        next(reader)
        journal.append(joined(3), actor="hub")  # would hang if the reader held the lock
        assert journal.head()[0] == 3


def test_a_reopened_journal_continues_its_chain(path: Path):
    with Journal(path, "hub") as journal:
        first = journal.append(joined(1), actor="hub")
    with Journal(path, "hub") as journal:
        assert journal.head() == (1, first[0].digest)
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
        "insert into entries values (5, 'x', x'00', 'x')",
        "insert or replace into entries values (1, 'x', x'00', 'x')",
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
        pages = journal._connection.execute("pragma page_count").fetchone()[0]
        journal._connection.execute(f"pragma max_page_count = {pages}")
        with pytest.raises(Unavailable, match=r"journal\.db: no space left on its disk; free some"):
            journal.append(*(joined(number) for number in range(500)), actor="hub")
        assert journal.head()[0] == 1
        journal._connection.execute("pragma max_page_count = 100000")
        assert journal.append(joined(2), actor="hub")[0].seq == 2
        assert journal.verify().intact


def test_an_event_that_cannot_be_read_back_is_not_written(path: Path):
    good = Merged(run="run-1", position=1, sites=("berlin",), loss=0.5)
    with Journal(path, "hub") as journal:
        for bad in (good.model_copy(update={"loss": float("nan")}), good.model_copy(update={"position": -1})):
            with pytest.raises(Invalid, match=r"event 'run\.merged'"):
                journal.append(joined(1), bad, actor="hub")
        assert journal.head()[0] == 0


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
            assert view.head()[0] == 2


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


def test_waiting_ends_with_a_new_entry(path: Path):
    with Journal(path, "hub") as journal:
        assert not journal.wait(0, timeout=0)
        seen: list[bool] = []
        waiter = threading.Thread(target=lambda: seen.append(journal.wait(0, timeout=60)))
        waiter.start()
        journal.append(joined(1), actor="hub")
        waiter.join()
        assert seen == [True]
        assert journal.wait(0, timeout=0)
        assert not journal.wait(1, timeout=0)


def test_closing_wakes_who_waits_and_ends_all_use(path: Path):
    journal = Journal(path, "hub")
    raised: list[str] = []

    def follow() -> None:
        try:
            journal.wait(0, timeout=60)
        except Unavailable as error:
            raised.append(str(error))

    waiter = threading.Thread(target=follow)
    waiter.start()
    journal.close()
    waiter.join()
    journal.close()
    assert len(raised) == 1
    with pytest.raises(Unavailable, match="closed"):
        journal.append(joined(1), actor="hub")
    with pytest.raises(Unavailable, match="closed"):
        list(journal.entries())


_WRITER = """
import sys
from pathlib import Path
from atoll.journal.sqlite import Journal
from atoll.spec.event import Joined
with Journal(Path(sys.argv[1]), "hub", patience=30) as journal:
    for number in range(int(sys.argv[2])):
        entries = journal.append(Joined(run=f"run-{number}", site="berlin"),
                                 Joined(run=f"run-{number}", site="zurich"), actor=sys.argv[3])
        print(entries[-1].seq, flush=True)
"""


def writer(path: Path, count: int, actor: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(atoll.__file__).parents[1])}
    command = [sys.executable, "-c", _WRITER, str(path), str(count), actor]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.system
@pytest.mark.parametrize("after", [1, 17])
def test_a_writer_killed_in_the_middle_leaves_an_intact_chain(path: Path, after: int):
    process = writer(path, 1_000_000, "hub")
    assert process.stdout is not None
    promised = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    promised += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    with Journal(path, "hub") as journal:
        found = journal.verify()
        assert found.intact, found.words
        assert found.entries >= promised[-1]
        assert found.entries % 2 == 0  # each call's two events, or neither
        assert journal.append(joined(1), actor="hub")[0].seq == found.entries + 1
        assert journal.verify().intact


@pytest.mark.system
def test_processes_that_begin_one_journal_at_once_write_one_chain(path: Path):
    processes = [writer(path, 20, f"process:{number}") for number in range(3)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    with Journal(path, "hub", read_only=True) as journal:
        assert journal.verify().intact
        entries = list(journal.entries())
    assert len(entries) == 120
    assert {entry.actor for entry in entries} == {"process:0", "process:1", "process:2"}
