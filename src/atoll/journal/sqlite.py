"""A journal in one SQLite file: append-only, a Merkle tree, signed, durable when `append` returns, safe for threads."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from atoll.errors import Corrupt, Invalid, NotFound
from atoll.journal.audit import Finding, Word, examine
from atoll.journal.entry import HASH, Entry, Row, read, written
from atoll.journal.key import Key, PublicKey
from atoll.journal.note import Checkpoint, Cosignature, Witnessed
from atoll.journal.store import Store
from atoll.journal.tree import Frontier, leaf
from atoll.spec.event import Event
from atoll.spec.run import Verdict

_KEPT = 1024  # entries, of which the last checkpoint is kept: what is changed by all rules is found to lie in so many

_TOLD = 10_000  # entries between two words on how far a verification is


class Journal:
    """The journal of `owner` (a site's name, or "hub") in the file `path`, made if it is not there.

    Beside it lies the key that signs it, `journal.key` for `journal.db`: with every transaction the checkpoint over all
    entries is signed anew. With `read_only` the file must exist and is not written to, and no key is needed. `patience`
    is how many seconds another process may keep the file busy. Raises `Invalid` for a file that is another owner's
    journal or no journal at all, `Corrupt` for one that is not SQLite or, to be written, does not end as it was signed,
    `NotFound` for a missing one to read, `Unavailable` for a place that cannot be used.
    """

    def __init__(self, path: Path, owner: str, *, read_only: bool = False, patience: float = 5.0) -> None:
        self.path, self.owner, self.read_only = path, owner, read_only
        self._store = Store(path, owner, read_only, patience)
        self.key = self._store.public
        self._frontier = Frontier()
        if read_only:
            return
        try:
            with self._store.held(), self._store.transaction():
                self._frontier = self._signed_frontier()
        except BaseException:
            self._store.close()
            raise

    def append(self, *events: Event, actor: str) -> list[Entry]:
        """Write events in one transaction; when this returns they are on disk and signed, and when it raises none is.

        Raises `Unavailable` when the disk is full, the file is busy for longer than `patience`, or cannot be written.
        """
        key = self.signer
        if not events:
            return []
        with self._store.held():
            with self._store.transaction():
                frontier = self._current()
                entries, rows = list[Entry](), list[tuple[int, str, bytes, bytes]]()
                for event in events:
                    body, entry = written(frontier.size + 1, time.time(), actor, event)
                    rows.append((entry.seq, event.kind, body, b"".join(frontier.append(leaf(body)))))
                    entries.append(entry)
                self._store.connection.executemany("insert into entries values (?, ?, ?, ?)", rows)
                self._sign(key, frontier, len(rows))
            self._frontier = frontier
        return entries

    def entries(self, after: int = 0, kinds: Collection[str] = (), run: str | None = None) -> Iterator[Entry]:
        """Yield the entries after number `after`, of these kinds and of this run or of all, as far as there are any.

        The lock is not held between entries. Raises `Corrupt` at an entry that is not what its hash says.
        """
        for row in self._store.rows(after, tuple(kinds), run):
            yield read(row)

    # --- what it can prove

    def rows(self, after: int = 0, upto: int | None = None) -> Iterator[Row]:
        """Yield entries as they are stored, up to a number or to the end. Raises `Corrupt` for one of another type."""
        for row in self._store.rows(after):
            if upto is not None and row.seq > upto:
                return
            yield row

    def stored(self, level: int, index: int) -> bytes:
        """Return the hash of a complete subtree, as `atoll.journal.tree.Stored`. Raises `NotFound` for none such."""
        with self._store.held():
            return self._stored(level, index)

    def checkpoints(self) -> list[tuple[Checkpoint, bytes]]:
        """Return what its owner signed, and the signatures: the last of every 1,024 entries, and the newest."""
        with self._store.held():
            return self._signed()

    def checkpoint(self) -> tuple[Checkpoint, bytes]:
        """Return the newest checkpoint and its signature. Raises `NotFound` for a journal without entries."""
        with self._store.held():
            found = self._newest()
        if found is None:
            raise NotFound(f"{self.path}: has no entries yet, so there is nothing to prove; look again later")
        return found

    def cosignatures(self) -> list[Witnessed]:
        """Return the newest word of each witness."""
        with self._store.held():
            return self._cosigned()

    def keep(self, word: Witnessed) -> None:
        """Keep a witness's word on a checkpoint of this journal, in place of its last one."""
        size, root, by = word.checkpoint.size, word.checkpoint.root, word.cosignature
        values = (by.key.owner, str(by.key), size, root, word.signature, by.time, by.signature)
        with self._store.held(), self._store.transaction():
            self._store.connection.execute("insert or replace into cosignatures values (?, ?, ?, ?, ?, ?, ?)", values)

    @property
    def signer(self) -> Key:
        """The private key of who may write. Raises `Invalid` for a journal that was opened to read only."""
        if self._store.key is None:
            raise Invalid(f"{self.path}: opened to read only; open it without read_only to append or to sign")
        return self._store.key

    def verify(self, watch: Callable[[int], None] | None = None, seen_by: Sequence[Word] = ()) -> Verdict:
        """Make every hash again from the stored texts, and name the first entry that does not fit.

        The roots are held against what the owner signed, what witnesses cosigned, what this process wrote, and what
        others have ``seen_by`` themselves. Then the indexes, by which entries of a kind or of a run are found, are
        compared with the entries. ``watch`` is told now and then how far it is.
        """
        seen = dict[str, int]()
        try:
            last, words, covered, seen = self._said()
            with ThreadPoolExecutor(1) as beside:  # SQLite looks at the indexes while the hashes are made here
                indexes = beside.submit(self._store.indexed, last)
                found = examine(lambda after: _watched(self.rows(after, last), watch), [*words, *seen_by], covered)
                if not found.words:
                    found = indexes.result()
        except (Corrupt, Invalid) as error:
            found = Finding(0, None, f"unreadable: {error}")
        return Verdict(
            journal=str(self.path),
            entries=found.entries,
            intact=not found.words,
            bad=found.bad,
            words=found.words,
            key=str(self.key),
            witnesses={} if found.words else seen,
        )

    def _said(self) -> tuple[int, list[Word], int, dict[str, int]]:
        """Return how many entries there are, what everybody says of them, up to which they are signed, and up to which
        each witness saw them: all of one moment, for others write meanwhile."""
        with self._store.held(), self._store.moment():
            last, known = self._size(), self._frontier.copy()
            signed, cosigned = self._signed(), self._cosigned()
        words = [Word(known.size, known.root(), "this process, which wrote or saw them,")] if known.size else []
        for checkpoint, signature in signed:
            good = checkpoint.is_signed(self.key, signature)
            whose = "its owner's signature" if good else "a checkpoint that its owner's key did not sign"
            words.append(Word(checkpoint.size, checkpoint.root if good else b"", whose))
        for word in cosigned:
            name, checkpoint = word.cosignature.key.owner, word.checkpoint
            whose = f"the witness {name}" if word.holds else f"a word that {name}'s key did not sign"
            words.append(Word(checkpoint.size, checkpoint.root if word.holds else b"", whose))
        covered = signed[-1][0].size if signed else 0
        return last, words, covered, {word.cosignature.key.owner: word.checkpoint.size for word in cosigned}

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the tree and its signature, in a transaction or under the lock

    def _stored(self, level: int, index: int) -> bytes:
        seq = (index + 1) << level
        found = self._store.connection.execute(
            "select substr(hashes, ?, ?) from entries where seq = ?", (level * HASH + 1, HASH, seq)
        ).fetchone()
        if found is None or len(found[0]) != HASH:
            raise NotFound(f"{self.path}: has no hash of {1 << level} entries up to {seq}; give entries that are there")
        return found[0]

    def _signed(self) -> list[tuple[Checkpoint, bytes]]:
        found = self._store.connection.execute("select * from checkpoints order by size").fetchall()
        return [(Checkpoint(self.key.name, size, root), signature) for size, root, signature in found]

    def _cosigned(self) -> list[Witnessed]:
        found = self._store.connection.execute(
            "select key, size, root, signature, time, cosignature from cosignatures order by witness"
        ).fetchall()
        name = self.key.name
        return [
            Witnessed(Checkpoint(name, size, root), signature, Cosignature(PublicKey.read(key), at, cosignature))
            for key, size, root, signature, at, cosignature in found
        ]

    def _newest(self) -> tuple[Checkpoint, bytes] | None:
        found = self._store.connection.execute("select * from checkpoints order by size desc limit 1").fetchone()
        return (Checkpoint(self.key.name, found[0], found[1]), found[2]) if found else None

    def _size(self) -> int:
        return self._store.connection.execute("select coalesce(max(seq), 0) from entries").fetchone()[0]

    def _current(self) -> Frontier:
        """Return the tree to append to: the one in memory, unless another process wrote meanwhile."""
        size = self._size()
        if size < self._frontier.size:
            raise Corrupt(f"{self.path}: entries after {size} are gone; restore the journal from a copy")
        return self._frontier.copy() if size == self._frontier.size else self._signed_frontier()

    def _signed_frontier(self) -> Frontier:
        """Return the tree as it is stored, once it is the one that was signed: no other is ever signed as our own."""
        try:
            frontier = Frontier.load(self._size(), self._stored)
        except NotFound as error:
            raise Corrupt(f"{error}: one was changed or taken out; restore the journal from a copy") from None
        newest = self._newest()
        if newest is None and not frontier.size:
            return frontier
        expected = Checkpoint(self.key.name, frontier.size, frontier.root())
        if newest is None or newest[0] != expected or not expected.is_signed(self.key, newest[1]):
            signed = newest[0].size if newest is not None else 0
            raise Corrupt(
                f"{self.path}: its {frontier.size} entries are not the {signed} that its owner signed; run atoll audit "
                "verify and restore the journal from a copy"
            )
        return frontier

    def _sign(self, key: Key, frontier: Frontier, new: int) -> None:
        """Sign the whole, and forget the checkpoint before it unless it was the last one of its 1,024 entries."""
        size, before = frontier.size, frontier.size - new
        checkpoint = Checkpoint(key.public.name, size, frontier.root())
        if before // _KEPT == size // _KEPT:
            self._store.connection.execute("delete from checkpoints where size = ?", (before,))
        self._store.connection.execute(
            "insert into checkpoints values (?, ?, ?)", (size, checkpoint.root, checkpoint.signed(key))
        )


def _watched(rows: Iterator[Row], watch: Callable[[int], None] | None) -> Iterator[Row]:
    for row in rows:
        if watch is not None and not row.seq % _TOLD:
            watch(row.seq)
        yield row
