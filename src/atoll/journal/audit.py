"""Whether a journal is what its owner signed and its witnesses saw: every hash made again, the first bad entry named.

Of an edit that whoever made it covered up by further hashes no single entry can be told: the range is named that lies
between what still fits before and what does not any more, by its first entry.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from atoll.errors import Corrupt
from atoll.journal.entry import HASH, Row, fault, numbered
from atoll.journal.tree import Frontier, leaf

Rows = Callable[[int], Iterable[Row]]  # the rows after number so and so, in order


@dataclass(frozen=True, slots=True)
class Word:
    """Somebody's word that the first `size` entries have this root; `whose` goes before "says"."""

    size: int
    root: bytes
    whose: str


@dataclass(frozen=True, slots=True)
class Finding:
    """So many entries are good; `bad` is the first that is not, or "" in `words`."""

    entries: int
    bad: int | None = None
    words: str = ""


def examine(rows: Rows, words: Sequence[Word], covered: int) -> Finding:
    """Make every hash of a journal again, and hold its roots against everybody's ``words``.

    ``covered`` is up to which entry its owner has signed it, who signs whenever one is written.
    """
    frontier = Frontier()
    try:
        return _examined(frontier, rows, sorted(words, key=lambda word: word.size), covered)
    except Corrupt as error:  # a page of the database, or a line of the file, that cannot be read
        return _bad(frontier.size + 1, f"unreadable: {error}")


def _examined(frontier: Frontier, rows: Rows, told: Sequence[Word], covered: int) -> Finding:
    given, good = 0, 0  # words that were held against it, and the newest size at which one was right
    for row in rows(0):
        seq = frontier.size + 1
        if row.seq != seq:
            return _bad(seq, f"missing: after entry {seq - 1} comes entry {row.seq}")
        ended = frontier.append(leaf(row.body))
        if not numbered(row.body, seq) or b"".join(ended) != row.hashes:
            return _told(rows, row, ended)
        while given < len(told) and told[given].size <= seq:
            if told[given].size == seq and told[given].root != frontier.root():
                return _otherwise(rows, told[given], good)
            good, given = told[given].size, given + 1
    return _end(frontier.size, told[given:], covered)


def _end(size: int, left: Sequence[Word], covered: int) -> Finding:
    if left:
        return _bad(size + 1, f"missing: {left[-1].whose} says that there are {left[-1].size}")
    if covered < size:
        return _bad(covered + 1, "not signed: its owner signs each as it is written, and did not write this one")
    return Finding(size)


def _told(rows: Rows, row: Row, ended: Sequence[bytes]) -> Finding:
    """Say what is wrong where the hashes stored with a row are not those that the texts give."""
    if problem := fault(row):
        return _bad(row.seq, problem)
    for level, hashed in enumerate(ended):
        if row.hashes[level * HASH : (level + 1) * HASH] != hashed:
            return _among(rows, row.seq - (1 << level) + 1, row.seq, "the hash over them")
    return _bad(row.seq, f"edited: {len(row.hashes)} bytes of hashes stand with it, and not {len(ended) * HASH}")


def _otherwise(rows: Rows, word: Word, good: int) -> Finding:
    return _among(rows, good + 1, word.size, f"what {word.whose} says of them")


def _among(rows: Rows, first: int, last: int, what: str) -> Finding:
    """Name the first row of a range that is wrong by itself, else the first of the range."""
    for row in rows(first - 1):
        if row.seq > last:
            break
        if problem := fault(row):
            return _bad(row.seq, problem)
    span = f"one of entries {first} to {last}" if last > first else "it"
    return _bad(first, f"the first that may be changed: {span} is not what it was, for {what} does not fit")


def _bad(seq: int, problem: str) -> Finding:
    return Finding(seq - 1, seq, f"entry {seq} is {problem}")
