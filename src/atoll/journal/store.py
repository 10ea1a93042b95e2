"""The SQLite file of a journal: its tables, that it is ours and this owner's, transactions, and troubles in words."""

import sqlite3
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from atoll.errors import AtollError, Corrupt, Invalid, NotFound, Unavailable
from atoll.journal.audit import Finding
from atoll.journal.entry import Row
from atoll.journal.key import Key, PublicKey

_APPLICATION = 0x41746F6C  # "Atol", in the file's header
_VERSION = 2  # of the tables
_PAGE = 500  # rows read under the lock at a time
_TEXT = "cast(body as text)"
# Computed by SQLite from the text itself, so it cannot say anything else. What is no JSON has no run.
_RUN = (
    f"case when json_valid({_TEXT}) then "
    f"coalesce(json_extract({_TEXT}, '$.event.run'), json_extract({_TEXT}, '$.event.crossing.run')) end"
)
_KIND = f"case when json_valid({_TEXT}) then json_extract({_TEXT}, '$.event.kind') end"
_SCHEMA = (
    "create table owner (name text not null, key text not null) strict",
    "create table entries"
    " (seq integer primary key, kind text not null, body blob not null, hashes blob not null) strict",
    "create index entries_by_kind on entries (kind, seq)",
    "create table checkpoints (size integer primary key, root blob not null, signature blob not null) strict",
    "create table cosignatures (witness text primary key, key text not null, size integer not null,"
    " root blob not null, signature blob not null, time integer not null, cosignature blob not null) strict",
    # A guard against our own mistakes and a careless hand; against a determined one there are signatures and witnesses.
    "create trigger entries_keep before delete on entries begin select raise(abort, 'a journal only grows'); end",
    "create trigger entries_stay before update on entries begin select raise(abort, 'a journal only grows'); end",
    "create trigger entries_next before insert on entries"
    " when new.seq is not (select coalesce(max(seq), 0) + 1 from entries)"
    " begin select raise(abort, 'a journal only grows'); end",
    f"pragma application_id = {_APPLICATION}",
    f"pragma user_version = {_VERSION}",
)


class Store:
    """The file at `path`, opened. What may be done with it, and what is raised, `Journal` says.

    `connection` is used in `held`, by one thread at a time; `public` is the key that signs the journal, and `key` the
    private one beside the file, for who may write.
    """

    def __init__(self, path: Path, owner: str, read_only: bool, patience: float) -> None:
        self.path, self.owner, self.read_only = path, owner, read_only
        self._patience = patience
        self._turn = threading.Lock()
        self._closed = False
        self.key: Key | None = None
        self.connection = self._open()
        try:
            with self.held():
                self.public = self._prepare()
        except BaseException:
            self.connection.close()
            raise

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Have the connection alone, and what SQLite says as errors of Atoll."""
        with self._turn, self._told():
            yield

    def close(self) -> None:
        with self._turn:
            self._closed = True
            self.connection.close()

    @contextmanager
    def transaction(self) -> Generator[None, None, None]:
        self.connection.execute("begin immediate")
        try:
            yield
            self.connection.execute("commit")
        finally:
            if self.connection.in_transaction:  # SQLite has rolled back by itself after some failures
                self.connection.execute("rollback")

    @contextmanager
    def moment(self) -> Generator[None, None, None]:
        """See the file as it is at one moment, whoever writes to it meanwhile."""
        self.connection.execute("begin")
        try:
            yield
        finally:
            self.connection.execute("rollback")  # nothing was written

    def rows(self, after: int = 0, kinds: tuple[str, ...] = (), run: str | None = None) -> Iterator[Row]:
        """Yield entries as they are stored; others have their turn between pages of them."""
        # The plus keeps SQLite from taking the index of kinds where the one of runs leads to fewer rows.
        chosen = f" and {_RUN} = ?" if run is not None else ""
        chosen += f" and {'+' if run is not None else ''}kind in ({', '.join('?' * len(kinds))})" if kinds else ""
        select = f"select seq, kind, body, hashes from entries where seq > ?{chosen} order by seq limit {_PAGE}"  # noqa: S608
        wanted = (*(() if run is None else (run,)), *kinds)
        while True:
            with self.held():
                page = self.connection.execute(select, (after, *wanted)).fetchall()
            for seq, kind, body, hashes in page:
                if not (isinstance(kind, str) and isinstance(body, bytes) and isinstance(hashes, bytes)):
                    raise Corrupt(f"journal entry {seq}: not stored as text and bytes; restore the journal from a copy")
                yield Row(seq, kind, body, hashes)
            if len(page) < _PAGE:
                return
            after = page[-1][0]

    def indexed(self, size: int) -> Finding:
        """Compare the indexes with so many entries, which are whole; it takes long, so writers are not kept."""
        with self._told(), closing(sqlite3.connect(self._uri("ro"), uri=True, timeout=self._patience)) as connection:
            wrong = connection.execute(
                f"select seq, kind from entries where kind is not {_KIND} order by seq limit 1"  # noqa: S608
            ).fetchone()
            if wrong is not None:
                told = f"entry {wrong[0]} is edited: it is indexed as {str(wrong[1])[:80]!r}, and is of another kind"
                return Finding(wrong[0] - 1, wrong[0], told)
            told = str(connection.execute("pragma integrity_check(1)").fetchone()[0])
        if told == "ok":
            return Finding(size)
        mend = "restore the journal from a copy"
        return Finding(size, None, f"the entries are whole, but not the indexes over them ({told}); {mend}")

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

    def _prepare(self) -> PublicKey:
        """Make the tables of a new file, or check that these are ours; return the key that signs it."""
        beside = self.path.with_suffix(".key")
        if not self.read_only:
            self._write_ahead()
            self.connection.execute("pragma synchronous = full")  # WAL syncs at each commit only with this
            with self.transaction():
                if not self.connection.execute("select count(*) from sqlite_schema").fetchone()[0]:
                    key = Key.kept(beside, self.owner, make=True)
                    for statement in _SCHEMA:
                        self.connection.execute(statement)
                    self.connection.execute("insert into owner values (?, ?)", (self.owner, str(key.public)))
        if self.connection.execute("pragma application_id").fetchone()[0] != _APPLICATION:
            raise Invalid(f"{self.path}: is a database and no journal of Atoll; give the journal its own path")
        version = self.connection.execute("pragma user_version").fetchone()[0]
        if version != _VERSION:
            raise Invalid(
                f"{self.path}: has format {version}, and this Atoll reads {_VERSION}; use the Atoll that wrote it"
            )
        name, key = self.connection.execute("select name, key from owner").fetchone() or (None, "")
        if name != self.owner:
            named = repr(name) if name else "nobody"
            raise Invalid(f"{self.path}: is the journal of {named} and not of {self.owner!r}; give each its own path")
        if not self.read_only:
            self.key = Key.kept(beside, self.owner, make=False)
            if key != str(self.key.public):
                raise Corrupt(f"{self.path}: another key signs it than the one beside it; restore both from one copy")
            with self.transaction():
                self.connection.execute(f"create index if not exists entries_by_run on entries ({_RUN}, seq)")
        return PublicKey.read(key)

    def _write_ahead(self) -> None:
        """Switch to WAL. SQLite does not wait by itself when two processes open a new file at the same moment."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self.connection.execute("pragma journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

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
