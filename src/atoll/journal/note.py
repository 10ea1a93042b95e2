"""Checkpoints: a journal's size and root in the text of transparency logs, signed by its owner and cosigned by others.

    atoll/hub/1f0c4b1a9d3e5577           the origin, which is the name of the key
    812                                  entries
    q1J2...=                             the root over them, in base64

    — atoll/hub/1f0c4b1a9d3e5577 8jFv... the owner's signature
    — atoll/lyon/77ab... pQ2x...         a witness's: with the time, and that this is no other tree than it saw before

The forms are https://c2sp.org/tlog-checkpoint, https://c2sp.org/signed-note and https://c2sp.org/tlog-cosignature, so
that anybody's tools can check them.
"""

import base64
import re
import struct
from dataclasses import dataclass

from atoll.errors import Corrupt, Invalid
from atoll.journal.key import LOG, WITNESS, Key, PublicKey, decoded

NOTE_LIMIT = 20_000  # characters; a checkpoint with a hundred cosignatures has about 16,000
_TEXT = re.compile(r"([^\n]{1,200})\n(0|[1-9][0-9]{0,17})\n([A-Za-z0-9+/]{43}=)\n")
_LINE = re.compile(r"— ([^\s+]{1,200}) ([A-Za-z0-9+/=]{8,200})\n")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """That the journal of this origin has so many entries, and this root over them."""

    origin: str
    size: int
    root: bytes

    def __str__(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def signed(self, key: Key) -> bytes:
        return key.sign(str(self).encode())

    def is_signed(self, key: PublicKey, signature: bytes) -> bool:
        return self.origin == key.name and key.signed(str(self).encode(), signature)

    def note(self, key: PublicKey, signature: bytes) -> str:
        """Return it with its owner's signature."""
        return f"{self}\n{_line(key.name, key.id(LOG) + signature)}"


@dataclass(frozen=True, slots=True)
class Cosignature:
    """A witness's word, at a time in seconds since the epoch, that a checkpoint extends all that it saw before."""

    key: PublicKey
    time: int
    signature: bytes

    @property
    def line(self) -> str:
        """Return the line that is added to a checkpoint's note."""
        return _line(self.key.name, self.key.id(WITNESS) + struct.pack(">Q", self.time) + self.signature)

    def holds(self, checkpoint: Checkpoint) -> bool:
        return self.key.signed(_witnessed(checkpoint, self.time), self.signature)


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A checkpoint of one's own journal with its signature, and a witness's word on it."""

    checkpoint: Checkpoint
    signature: bytes
    cosignature: Cosignature

    @property
    def holds(self) -> bool:
        return self.cosignature.holds(self.checkpoint)


def cosigned(checkpoint: Checkpoint, key: Key, time: int) -> Cosignature:
    return Cosignature(key.public, time, key.sign(_witnessed(checkpoint, time)))


def opened(note: str, key: PublicKey) -> Checkpoint:
    """Return the checkpoint in a note that this key signed. Raises `Invalid` for no note, `Corrupt` for one that it did
    not sign."""
    text, lines = _parts(note)
    found = _TEXT.fullmatch(text)
    root = decoded(found[3]) if found is not None else None
    if found is None or root is None:
        raise Invalid("checkpoint: is not an origin, a size and a root with signatures; give the whole of it")
    checkpoint = Checkpoint(found[1], int(found[2]), root)
    for name, data in lines:
        if name == key.name and data[:4] == key.id(LOG) and checkpoint.is_signed(key, data[4:]):
            return checkpoint
    raise Corrupt(f"checkpoint: it is not signed by {key.name}; ask its owner for one that is")


def cosignature(line: str, key: PublicKey) -> Cosignature:
    """Return what a line says in the name of this witness; whether it holds is asked of it. Raises `Invalid`."""
    found = _LINE.fullmatch(line)
    data = decoded(found[2]) if found is not None else None
    if found is None or data is None or found[1] != key.name or len(data) != 76 or data[:4] != key.id(WITNESS):
        raise Invalid(f"cosignature: is no line of the witness {key.name}; update one of the two ends")
    return Cosignature(key, struct.unpack(">Q", data[4:12])[0], data[12:])


def cosignatures(note: str, key: PublicKey) -> list[Cosignature]:
    """Return what a note's lines say in the name of this witness. Raises `Invalid` for no note."""
    found = [(name, data) for name, data in _parts(note)[1] if name == key.name and data[:4] == key.id(WITNESS)]
    return [Cosignature(key, struct.unpack(">Q", data[4:12])[0], data[12:]) for _, data in found if len(data) == 76]


def _parts(note: str) -> tuple[str, list[tuple[str, bytes]]]:
    text, mark, lines = note.rpartition("\n\n")
    found = [(name, decoded(data)) for name, data in _LINE.findall(lines)]
    whole = "".join(match.group() for match in _LINE.finditer(lines)) == lines
    if len(note) > NOTE_LIMIT or not mark or not whole or not found:
        raise Invalid("checkpoint: is no signed note; give the whole of it, with its last line's end")
    return f"{text}\n", [(name, data) for name, data in found if data is not None]


def _line(name: str, data: bytes) -> str:
    return f"— {name} {base64.b64encode(data).decode()}\n"


def _witnessed(checkpoint: Checkpoint, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{checkpoint}".encode()
