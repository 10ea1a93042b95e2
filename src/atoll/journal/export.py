"""A journal as signed JSON Lines, which anybody can verify who has the file and knows the owner's key.

    {"checkpoint": ..., "entries": ..., "journal": ..., "key": ..., "witnesses": [...]}    first, the newest checkpoint
    {"entry": {...}, "hashes": "..."}                                                      each entry, as it was hashed
    {"checkpoint": ...}                                                                    after the entry it ends with

The text of an entry is in the file as it is in the journal, byte for byte: it is what the leaf's hash was made from.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field

from atoll.errors import Corrupt, Invalid, NotFound
from atoll.journal import note, proofs
from atoll.journal.audit import Word, examine
from atoll.journal.entry import Row
from atoll.journal.key import PublicKey
from atoll.journal.sqlite import Journal
from atoll.spec.document import Document, canonical, parse_json
from atoll.spec.record import KeyText, NoteText, Proof, Size
from atoll.spec.run import Verdict

_ENTRY, _HASHES, _END = b'{"entry":', b',"hashes":"', b'"}\n'
_MARK = b'{"checkpoint":'
_LINE = 64 << 20  # bytes of the longest line that is read


class Header(Document):
    """The first line: whose journal it is, how long, and the newest checkpoint."""

    checkpoint: NoteText
    entries: Size
    journal: str
    key: KeyText
    witnesses: Annotated[tuple[KeyText, ...], Field(max_length=10_000)] = ()


class Mark(Document):
    """A checkpoint's line, after the entry that it ends with."""

    checkpoint: NoteText


def lines(journal: Journal) -> Iterator[bytes]:
    """Yield the export of a journal up to its newest checkpoint. Raises `NotFound` for one without entries."""
    newest, signature = journal.checkpoint()
    notes = {one.size: one.note(journal.key, signed) for one, signed in journal.checkpoints() if one.size < newest.size}
    notes[newest.size] = newest.note(journal.key, signature)
    words = [word for word in journal.cosignatures() if word.checkpoint.size <= newest.size]
    for word in words:
        size = word.checkpoint.size
        notes[size] = notes.get(size) or word.checkpoint.note(journal.key, word.signature)
        notes[size] += word.cosignature.line
    header = Header(
        checkpoint=newest.note(journal.key, signature),
        entries=newest.size,
        journal=journal.owner,
        key=str(journal.key),
        witnesses=tuple(str(word.cosignature.key) for word in words),
    )
    yield canonical(header) + b"\n"
    for row in journal.rows(0, newest.size):
        yield _ENTRY + row.body + _HASHES + row.hashes.hex().encode() + _END
        if row.seq in notes:
            yield canonical(Mark(checkpoint=notes[row.seq])) + b"\n"


def verify(path: Path, key: PublicKey | None = None) -> Verdict:
    """Verify an export by itself, and name the first bad entry. ``key`` is the owner's, known from elsewhere.

    Raises `NotFound` for no file and `Invalid` for one that is no export.
    """
    header = _header(path)
    named = PublicKey.read(header.key)
    found = Verdict(journal=str(path), entries=0, intact=False, key=str(named))
    if named.owner != header.journal or (key is not None and named != key):
        return found.model_copy(update={"words": f"it is signed by {named.name}, and not by the key of that journal"})
    try:
        newest = note.opened(header.checkpoint, named)
        if newest.size != header.entries:
            raise Corrupt(f"its first line says {header.entries} entries, and its checkpoint {newest.size}")
        witnesses = {name: PublicKey.read(text) for text in header.witnesses for name in [PublicKey.read(text).name]}
        words, seen = _words(path, named, witnesses)
    except (Corrupt, Invalid) as error:
        return found.model_copy(update={"words": str(error)})
    words.append(Word(newest.size, newest.root, "its owner's signature"))
    told = examine(lambda after: _rows(path, after), words, newest.size)
    data = {"entries": told.entries, "bad": told.bad, "words": told.words, "intact": not told.words}
    return found.model_copy(update={**data, "witnesses": {} if told.words else seen})


def is_proof(path: Path) -> bool:
    """Tell whether a file is one entry's proof: its first line is none of an export's. Raises `NotFound`."""
    return not _first(path).startswith(_MARK)


def verify_proof(path: Path, key: PublicKey | None = None) -> Verdict:
    """Verify the proof of one entry, as `prove` made it. Raises `Invalid` for a file that is none."""
    with path.open("rb") as file:
        proof = parse_json(Proof, file.read(_LINE), str(path))
    found = Verdict(journal=str(path), entries=0, intact=False, key=proof.key[:200])
    try:
        checkpoint = proofs.check(proof, key)
    except (Corrupt, Invalid) as error:
        return found.model_copy(update={"bad": proof.seq, "words": str(error)})
    seen = {PublicKey.read(text).owner: checkpoint.size for text in proof.witnesses}
    words = f"entry {proof.seq} of {checkpoint.size}"
    return found.model_copy(update={"entries": 1, "intact": True, "words": words, "witnesses": seen})


def _first(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.readline(_LINE)
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file; check the path") from None


def _header(path: Path) -> Header:
    return parse_json(Header, _first(path), str(path))


def _words(path: Path, key: PublicKey, witnesses: Mapping[str, PublicKey]) -> tuple[list[Word], dict[str, int]]:
    """Return what the checkpoints in the file say, and up to where each witness cosigned."""
    words, seen = list[Word](), dict[str, int]()
    for line in _lines(path):
        if not line.startswith(_MARK):
            continue
        text = parse_json(Mark, line, "checkpoint").checkpoint
        checkpoint = note.opened(text, key)
        words.append(Word(checkpoint.size, checkpoint.root, "its owner's signature"))
        for witness in witnesses.values():
            for word in note.cosignatures(text, witness):
                if not word.holds(checkpoint):
                    raise Corrupt(f"a word of {witness.owner} up to entry {checkpoint.size} is not by its key")
                seen[witness.owner] = checkpoint.size
    return words, seen


def _rows(path: Path, after: int) -> Iterator[Row]:
    seq = 0
    for line in _lines(path):
        if line.startswith(_MARK):
            continue
        seq += 1
        if seq <= after:
            continue
        body, mark, hashes = line.removeprefix(_ENTRY).removesuffix(_END).rpartition(_HASHES)
        try:
            if not (mark and line.startswith(_ENTRY) and line.endswith(_END)):
                raise ValueError
            yield Row(seq, _kind(body), body, bytes.fromhex(hashes.decode("ascii")))
        except ValueError:
            raise Corrupt(f"{path}: a line is no entry of an export; ask for another copy") from None


def _kind(body: bytes) -> str:
    """Return the kind of the event: in the file there is no index that could say another."""
    try:
        return json.loads(body)["event"]["kind"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""  # what is wrong with it is told in full by whoever reads the entry


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines after the first."""
    with path.open("rb") as file:
        file.readline(_LINE)
        while line := _line(file):
            yield line


def _line(file: BinaryIO) -> bytes:
    line = file.readline(_LINE)
    if len(line) == _LINE:
        raise Corrupt(f"{file.name}: a line is longer than {_LINE} bytes; ask for another copy")
    return line
