"""A journal in one SQLite file: append-only, hash-chained, durable when `append` returns, safe for threads."""

import sqlite3
import threading
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from atoll.errors import AtollError, Corrupt, Invalid, NotFound, Unavailable
from atoll.journal.chain import Entry, Row, fault, genesis, link, read
from atoll.spec.event import Event
from atoll.spec.run import Verdict

_APPLICATION = 0x41746F6C  # "Atol", in the file's header
_VERSION = 1  # of the tables
_PAGE = 500  # rows read under the lock at a time
_TEXT = "cast(body as text)"
# Computed by SQLite from the text itself, so it cannot say anything else. What is no JSON has no run.
_RUN = (
    f"case when json_valid({_TEXT}) then "
    f"coalesce(json_extract({_TEXT}, '$.event.run'), json_extract({_TEXT}, '$.event.crossing.run')) end"
)
_SCHEMA = (
    "create table owner (name text not null) strict",
    "create table entries"
    " (seq integer primary key, kind text not null, body blob not null, digest text not null) strict",
    "create index entries_by_kind on entries (kind, seq)",
    # A guard against our own mistakes and a careless hand; against a determined one there is the chain.
    "create trigger entries_keep before delete on entries begin select raise(abort, 'a journal only grows'); end",
    "create trigger entries_stay before update on entries begin select raise(abort, 'a journal only grows'); end",
    "create trigger entries_next before insert on entries"
    " when new.seq is not (select coalesce(max(seq), 0) + 1 from entries)"
    " begin select raise(abort, 'a journal only grows'); end",
    f"pragma application_id = {_APPLICATION}",
    f"pragma user_version = {_VERSION}",
)


class Journal:
    """The journal of `owner` (a site's name, or "hub") in the file `path`, made if it is not there.

    With `read_only` the file must exist and is not written to. `patience` is how many seconds another process may keep
    the file busy. Raises `Invalid` for a file that is another owner's journal or no journal at all, `Corrupt` for one
    that is not SQLite, `NotFound` for a missing one to read, `Unavailable` for a place that cannot be used.
    """

    def __init__(self, path: Path, owner: str, *, read_only: bool = False, patience: float = 5.0) -> None:
        self.path = path
        self.owner = owner
        self.read_only = read_only
        self._patience = patience
        self._lock = threading.Lock()
        self._closed = False
        self._connection = self._open()
        try:
            with self._lock, self._told():
                self._prepare()
                self._last = self._head()
        except BaseException:
            self._connection.close()
            raise

    def append(self, *events: Event, actor: str) -> list[Entry]:
        """Write events in one transaction; when this returns they are on disk, and when it raises none of them is.

        Raises `Unavailable` when the disk is full, the file is busy for longer than `patience`, or cannot be written.
        """
        if self.read_only:
            raise Invalid(f"{self.path}: opened to read only; open it without read_only to append")
        if not events:
            return []
        with self._lock, self._told():
            with self._transaction():
                seq, prev = self._head()
                if seq < self._last[0]:
                    raise Corrupt(f"{self.path}: entries after {seq} are gone; restore the journal from a copy")
                entries: list[Entry] = []
                for event in events:
                    row, entry = link(seq + 1, time.time(), actor, event, prev)
                    self._connection.execute(
                        "insert into entries (seq, kind, body, digest) values (?, ?, ?, ?)",
                        (row.seq, row.kind, row.body, row.digest),
                    )
                    entries.append(entry)
                    seq, prev = row.seq, row.digest
            self._last = (seq, prev)
        return entries

    def entries(self, after: int = 0, kinds: Collection[str] = (), run: str | None = None) -> Iterator[Entry]:
        """Yield the entries after number `after`, of these kinds and of this run or of all, as far as there are any.

        The lock is not held between entries. Raises `Corrupt` at an entry that is not what its digest says.
        """
        for row in self._rows(after, tuple(kinds), run):
            yield read(row)

    def verify(self) -> Verdict:
        """Recompute the chain from the stored texts and name the first entry that does not fit.

        Then compare the indexes, by which entries of a kind or of a run are found, with the entries.
        """
        seq, prev = 0, genesis(self.owner)
        known = self._last
        try:
            for row in self._rows():
                problem = fault(row, seq + 1, prev)
                if not problem and row.seq == known[0] and row.digest != known[1]:
                    problem = "replaced: this process wrote or saw another entry here"
                if problem:
                    return self._verdict(seq, seq + 1, problem)
                seq, prev = row.seq, row.digest
            if seq < known[0]:
                return self._verdict(seq, seq + 1, f"missing: this process wrote or saw entries up to {known[0]}")
            problem = self._indexed()
        except Corrupt as error:
            return self._verdict(seq, seq + 1, f"unreadable: {error}")
        if problem != "ok":
            words = f"the entries are whole, but not the indexes over them ({problem}); restore the journal from a copy"
            return Verdict(journal=str(self.path), entries=seq, intact=False, words=words)
        return Verdict(journal=str(self.path), entries=seq, intact=True)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _indexed(self) -> str:
        """Return "ok" when every entry stands in every index as it should; it takes long, so writers are not kept."""
        with self._told(), closing(sqlite3.connect(self._uri("ro"), uri=True, timeout=self._patience)) as connection:
            return str(connection.execute("pragma integrity_check(1)").fetchone()[0])

    def _verdict(self, good: int, bad: int, problem: str) -> Verdict:
        return Verdict(journal=str(self.path), entries=good, intact=False, bad=bad, words=f"entry {bad} is {problem}")

    def _rows(self, after: int = 0, kinds: tuple[str, ...] = (), run: str | None = None) -> Iterator[Row]:
        # The plus keeps SQLite from taking the index of kinds where the one of runs leads to fewer rows.
        chosen = f" and {_RUN} = ?" if run is not None else ""
        chosen += f" and {'+' if run is not None else ''}kind in ({', '.join('?' * len(kinds))})" if kinds else ""
        select = f"select seq, kind, body, digest from entries where seq > ?{chosen} order by seq limit {_PAGE}"  # noqa: S608
        wanted = (*(() if run is None else (run,)), *kinds)
        while True:
            with self._lock, self._told():
                page = self._connection.execute(select, (after, *wanted)).fetchall()
            for seq, kind, body, digest in page:
                if not (isinstance(kind, str) and isinstance(body, bytes) and isinstance(digest, str)):
                    raise Corrupt(f"journal entry {seq}: not stored as text and bytes; restore the journal from a copy")
                yield Row(seq, kind, body, digest)
            if len(page) < _PAGE:
                return
            after = page[-1][0]

    def _head(self) -> tuple[int, str]:
        found = self._connection.execute("select seq, digest from entries order by seq desc limit 1").fetchone()
        return (found[0], found[1]) if found else (0, genesis(self.owner))

    def _open(self) -> sqlite3.Connection:
        with self._told():
            if self.read_only:
                if not self.path.is_file():
                    raise NotFound(f"{self.path}: there is no such journal; check the path")
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch(mode=0o600)  # names of people and data are in it; SQLite's other files take this mode
            where = self._uri("ro" if self.read_only else "rw")
            return sqlite3.connect(
                where, uri=True, timeout=self._patience, isolation_level=None, check_same_thread=False
            )

    def _uri(self, mode: str) -> str:
        return f"{self.path.absolute().as_uri()}?mode={mode}"

    def _prepare(self) -> None:
        """Make the tables of a new file, or check that these are ours."""
        if not self.read_only:
            self._write_ahead()
            self._connection.execute("pragma synchronous = full")  # WAL syncs at each commit only with this
            with self._transaction():
                if not self._connection.execute("select count(*) from sqlite_schema").fetchone()[0]:
                    for statement in _SCHEMA:
                        self._connection.execute(statement)
                    self._connection.execute("insert into owner values (?)", (self.owner,))
        if self._connection.execute("pragma application_id").fetchone()[0] != _APPLICATION:
            raise Invalid(f"{self.path}: is a database and no journal of Atoll; give the journal its own path")
        version = self._connection.execute("pragma user_version").fetchone()[0]
        if version != _VERSION:
            raise Invalid(
                f"{self.path}: has format {version}, and this Atoll reads {_VERSION}; use the Atoll that wrote it"
            )
        owner = self._connection.execute("select name from owner").fetchone()
        if owner is None or owner[0] != self.owner:
            named = repr(owner[0]) if owner else "nobody"
            raise Invalid(f"{self.path}: is the journal of {named} and not of {self.owner!r}; give each its own path")
        if not self.read_only:
            with self._transaction():
                self._connection.execute(f"create index if not exists entries_by_run on entries ({_RUN}, seq)")

    def _write_ahead(self) -> None:
        """Switch to WAL. SQLite does not wait by itself when two processes open a new file at the same moment."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._connection.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _transaction(self) -> Generator[None, None, None]:
        self._connection.execute("begin immediate")
        try:
            yield
            self._connection.execute("commit")
        finally:
            if self._connection.in_transaction:  # SQLite has rolled back by itself after some failures
                self._connection.execute("rollback")

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """Turn what SQLite and the file system say into errors of Atoll."""
        if self._is_closed():
            raise Unavailable(f"{self.path}: this journal is closed; open it again")
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise self._explained(error) from error
        except OSError as error:
            raise Unavailable(
                f"{self.path}: cannot be used ({error.strerror}); check the place and its rights"
            ) from error

    def _is_closed(self) -> bool:
        return self._closed

    def _explained(self, error: sqlite3.DatabaseError) -> AtollError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (
            sqlite3.SQLITE_NOTADB,
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_ERROR,
        ):  # the last: tables not as made
            return Corrupt(f"{self.path}: is damaged or no journal ({error}); restore it from a copy")
        if code == sqlite3.SQLITE_FULL:
            return Unavailable(f"{self.path}: no space left on its disk; free some and try again")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Unavailable(f"{self.path}: another process kept it busy for {self._patience:g} s; end it or wait")
        return Unavailable(f"{self.path}: cannot be used ({error}); check the disk and the rights of the file")
