"""The chain that makes a journal tamper-evident: each entry's digest covers its own text and the digest before it.

The text of an entry is its canonical JSON, `{"actor", "event", "prev", "seq", "time"}`. The digest is SHA-256 over
those bytes, and `prev` is the digest of the entry before; the first entry follows a digest made from the owner's name.
So changing, removing, inserting or moving an entry breaks the chain at that place. Not seen: entries cut off at the
end, and a chain rewritten from some place to its end, unless someone outside remembers a later digest.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, ValidationError

from atoll.errors import Corrupt, Invalid
from atoll.spec.document import Document, canonical, sha256
from atoll.spec.event import Event


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened. `time` is seconds since the epoch by the writer's clock; `actor` is who caused it."""

    seq: int
    time: float
    actor: str
    event: Event
    digest: str


class Text(Document):
    """The text of an entry, read in one pass: a hub that starts reads its whole journal."""

    actor: str
    event: Event
    prev: str
    seq: Annotated[int, Field(strict=True)]
    time: Annotated[float, Field(strict=True)]


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as it is stored. `kind` repeats the event's, so that a database can select by it."""

    seq: int
    kind: str
    body: bytes
    digest: str


def genesis(owner: str) -> str:
    """Return the digest that the first entry of `owner`'s journal follows."""
    return sha256(b"atoll journal " + owner.encode())


def link(seq: int, time: float, actor: str, event: Event, prev: str) -> tuple[Row, Entry]:
    """Return the row for an event that follows the digest `prev`, and the entry as it will be read from there.

    Raises `Invalid` for an event that could not be read back: one such entry would stop every later reading.
    """
    fields = {"seq": seq, "time": time, "actor": actor, "event": event.model_dump(mode="json"), "prev": prev}
    try:
        body = canonical(fields)
    except ValueError as error:
        raise Invalid(f"event {event.kind!r}: has no JSON form ({error}); put finite numbers and text in it") from error
    text, problem = _parsed(body)
    if text is None:
        raise Invalid(f"event {event.kind!r}: cannot be read back ({problem}); make it from checked values")
    row = Row(seq, event.kind, body, sha256(body))
    return row, _entry(text, row.digest)


def read(row: Row) -> Entry:
    """Return the entry in a row; raise `Corrupt` when the row is not what its digest says."""
    text, problem = _examined(row)
    if text is None:
        raise Corrupt(f"journal entry {row.seq}: {problem}; run atoll audit verify and restore the journal from a copy")
    return _entry(text, row.digest)


def fault(row: Row, seq: int, prev: str) -> str:
    """Return what is wrong with the row that should be entry `seq` and follow `prev`; "" when nothing is."""
    if row.seq != seq:
        return f"missing: after entry {seq - 1} comes entry {row.seq}"
    text, problem = _examined(row)
    if text is None:
        return problem
    if text.prev == prev:
        return ""
    before = f"entry {seq - 1}" if seq > 1 else "the beginning of this owner's journal"
    return f"does not follow {before}: one of the two was changed, or entries between them were taken out"


def _entry(text: Text, digest: str) -> Entry:
    return Entry(text.seq, text.time, text.actor, text.event, digest)


def _examined(row: Row) -> tuple[Text | None, str]:
    """Return the text of one row, or why it is none, looking at this row alone."""
    if sha256(row.body) != row.digest:
        return None, "edited: its text is not what its digest was made from"
    text, problem = _parsed(row.body)
    if text is None:
        return None, problem
    if text.seq != row.seq:
        return None, f"moved: it stands in place {row.seq} and was written as entry {text.seq}"
    if text.event.kind != row.kind:
        return None, f"edited: it is indexed as {row.kind!r} and is {text.event.kind!r}"
    return text, ""


def _parsed(body: bytes) -> tuple[Text | None, str]:
    try:
        return Text.model_validate_json(body), ""
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
    if wrong[0]["type"] == "json_invalid":
        return None, f"unreadable: not JSON ({wrong[0]['msg'].removeprefix('Invalid JSON: ')})"
    if all(item["loc"][:1] == ("event",) for item in wrong):
        return None, f"unreadable: its event has {len(wrong)} wrong fields for this version of Atoll"
    return None, f"unreadable: not a table of {', '.join(sorted(Text.model_fields))}"
