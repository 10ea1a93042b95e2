"""The journal: entries a second, flushed to the disk one by one and in batches, and how long a million take to verify.

Entries are crossings, which are the most of any journal. The limits are a file that is flushed after each line of the
same length, and SQLite that keeps such lines in a table, in the same run: neither hashes nor signs.
"""

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from reporting import Report, fresh

from atoll.journal import Journal
from atoll.spec.event import Crossed, Event
from atoll.spec.policy import Crossing, Decision

KEYS = ("journal_appends_per_s", "journal_batched_per_s", "journal_verify_million_s")
GOALS = {"journal_appends_per_s": 700, "journal_batched_per_s": 20_000, "journal_verify_million_s": 10}
_BATCH = 100  # entries in one transaction, as many sites answering at once are in one
_LINE = b"x" * 450  # about an entry's text with its hashes


def measure(report: Report, quick: bool) -> dict[str, float]:
    """Return the figures of `KEYS`, the limits beside them, and processor time for each entry."""
    single, many, whole = (300, 10_000, 50_000) if quick else (3000, 200_000, 1_000_000)
    home = fresh("trust-journal")
    found = {
        "file_flushes_per_s": _file(home / "file", single),
        "sqlite_appends_per_s": _table(home / "bare.db", single),
    }
    with Journal(home / "journal.db", "hub") as journal:
        events = [_crossed(number) for number in range(1000)]
        for event in events[:50]:  # SQLite's first pages
            journal.append(event, actor="hub")
        found["journal_appends_per_s"] = _rate(
            lambda: [journal.append(events[number % 1000], actor="hub") for number in range(single)], single
        )
        began = time.process_time()
        found["journal_batched_per_s"] = _rate(lambda: _fill(journal, events, many, _BATCH), many)
        found["journal_batched_cpu_us"] = 1e6 * (time.process_time() - began) / many
        size = journal.checkpoint()[0].size
        _fill(journal, events, whole - size, 1000)
        began, cpu = time.perf_counter(), time.process_time()
        verdict = journal.verify()
        assert verdict.intact, verdict.words
        found["journal_verify_million_s"] = (time.perf_counter() - began) * 1e6 / verdict.entries
        found["journal_verify_million_cpu_s"] = (time.process_time() - cpu) * 1e6 / verdict.entries
        found["journal_mb_per_million"] = journal.path.stat().st_size / verdict.entries
    found = {key: round(value, 2) for key, value in found.items()}
    rows = [(key, found[key], GOALS.get(key, "")) for key in found]
    report.table(("journal", ">figure", ">goal"), rows)
    ratio = found["journal_appends_per_s"] / found["sqlite_appends_per_s"]
    report.say(f"One by one it is {ratio:.2f} of SQLite's own rate; {verdict.entries:,} entries were verified.")
    return found


def _crossed(number: int) -> Event:
    crossing = Crossing(kind="update", direction="out", site="zurich", run=f"run-{number % 50}", bytes=25_000_000)
    return Crossed(crossing=crossing, decision=Decision(allowed=True, party="zurich"))


def _fill(journal: Journal, events: list[Event], count: int, batch: int) -> None:
    for start in range(0, count, batch):
        journal.append(*(events[(start + number) % 1000] for number in range(min(batch, count - start))), actor="hub")


def _rate(work: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def _file(path: Path, count: int) -> float:
    def work() -> None:
        with path.open("ab", buffering=0) as file:
            for _ in range(count):
                file.write(_LINE)
                os.fdatasync(file.fileno())

    return _rate(work, count)


def _table(path: Path, count: int) -> float:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = full")
    connection.execute("create table lines (seq integer primary key, line blob not null)")

    def work() -> None:
        for _ in range(count):
            connection.execute("insert into lines (line) values (?)", (_LINE,))

    try:
        return _rate(work, count)
    finally:
        connection.close()
