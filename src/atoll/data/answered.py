"""What a site has told of a dataset's rows: an answer that differs from an earlier one in too few of them is refused.

Two answers about nearly the same rows, subtracted, tell of the rows between them. So the sets of rows that were told of
are kept at the site, and an answer is not given if fewer than the dataset's minimum of rows tell some of its sets from
some of a kept answer's. That none at all do is no exception, unless it is one set beside one, asked for in the same
words: otherwise a refusal would tell that there is such a row. (An auditor must refuse by what may be, not by what is:
Kenthapadi, Mishra and Nissim, 2005.)

This holds for any two answers, with all of their sets. Three and more can be combined to fewer rows, and so can what is
known from elsewhere: against that helps noise, from a privacy budget.
"""

import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atoll.data.cuts import divisible, shared
from atoll.errors import Corrupt, Denied, Unavailable
from atoll.spec.fleet import Dataset

MOST = 1000  # answers that are kept of one content of a dataset; what comes after them is refused
_BUSY = 30.0  # seconds to wait for another thread that looks through them
_TABLE = (
    "CREATE TABLE IF NOT EXISTS answered (number INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, words BLOB NOT NULL,"
    " labels BLOB NOT NULL)"
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The sets of rows that one answer tells of. They share no row.

    `labels` has for each row of the dataset the number of its set, from 1, or 0; uint32 of shape ``(rows,)``. `words`
    says how each set was asked for, in its order.
    """

    labels: np.ndarray
    words: tuple[str, ...]

    def near(self, other: "Selection", least: int) -> bool:
        """Tell whether some sets of this answer are nearer than ``least`` rows to some of another's, in other words."""
        mine, theirs, rows = shared(self.labels, other.labels, len(other.words) + 1)
        both = (mine > 0) & (theirs > 0)
        sizes = np.bincount(mine, rows), np.bincount(theirs, rows)
        alike = np.flatnonzero(both & (rows == sizes[0][mine]) & (rows == sizes[1][theirs]))
        both[[pair for pair in alike if self.words[mine[pair] - 1] == other.words[theirs[pair] - 1]]] = False
        # What shares no row with the other answer only adds to the rows between, so it is taken for outside, and so is
        # a set that is told of again in its words.
        one = np.where(np.isin(mine, mine[both]), mine, 0)
        two = np.where(np.isin(theirs, theirs[both]), theirs + len(self.words), 0)
        edges = (one > 0) | (two > len(self.words))
        return divisible(one[edges], two[edges], rows[edges], least)


def selected(count: int, rows: np.ndarray, words: str) -> Selection:
    """Return that these rows (indices) of ``count`` are told of as one set; for all of them as a query says it."""
    labels = np.zeros(count, np.uint32)
    labels[rows] = 1
    return Selection(labels, ("" if len(rows) == count else words,))


class Answered:
    """The answers of the site ``name`` that lives in ``home``, in one private file."""

    def __init__(self, home: Path, name: str, most: int = MOST) -> None:
        self._path, self._name, self._most = home / "answered.db", name, most

    def admit(self, dataset: Dataset, asked: Selection) -> None:
        """Keep what an answer about a dataset, as it is now, tells of. Returning means that it may leave.

        Raises `Denied` where it must not, `Unavailable` or `Corrupt` where that cannot be told.
        """
        least = dataset.min_group
        if least <= 1 or not asked.labels.any():  # its owner lets any single row be told of, or none is
            return
        with self._turn() as file:
            count = 0
            for kept in _kept(file, dataset.fingerprint, len(asked.labels)):
                count += 1
                if asked.words == kept.words and np.array_equal(asked.labels, kept.labels):
                    return
                if asked.near(kept, least):
                    raise Denied(
                        f"{self._name} refuses: {dataset.name!r} was asked about rows before of which fewer than "
                        f"{least} are others than these, or none, so the two answers could be subtracted; "
                        "ask as before, or about other rows"
                    )
            if count >= self._most:
                raise Denied(
                    f"{self._name} refuses: it answered {count} different questions about {dataset.name!r}, which is "
                    f"the most; ask one of them again, or have its owner begin anew by removing {self._path.name} there"
                )
            words, labels = json.dumps(asked.words).encode(), asked.labels.astype("<u4").tobytes()
            packed = (dataset.fingerprint, zlib.compress(words, 1), zlib.compress(labels, 1))
            file.execute("INSERT INTO answered (fingerprint, words, labels) VALUES (?, ?, ?)", packed)

    @contextmanager
    def _turn(self) -> Iterator[sqlite3.Connection]:
        """Open the file for one at a time; what is written is on disk when this ends."""
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None)) as file:
                file.execute("PRAGMA synchronous = FULL")
                file.execute("BEGIN IMMEDIATE")
                file.execute(_TABLE)
                yield file
                file.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            words = error.strerror if isinstance(error, OSError) else str(error)
            raise Unavailable(
                f"{self._path.name}: cannot be used ({words}), so no query is answered; mend it"
            ) from None


def _kept(file: sqlite3.Connection, fingerprint: str, rows: int) -> Iterator[Selection]:
    found = file.execute("SELECT words, labels FROM answered WHERE fingerprint = ? ORDER BY number", (fingerprint,))
    for words, labels in found:
        try:
            kept = Selection(np.frombuffer(zlib.decompress(labels), "<u4"), tuple(json.loads(zlib.decompress(words))))
        except (ValueError, TypeError, zlib.error):
            kept = None
        if kept is None or len(kept.labels) != rows or kept.labels.max(initial=0) > len(kept.words):
            raise Corrupt("answered.db: it is not what was written there, so no query is answered; restore it")
        yield kept
