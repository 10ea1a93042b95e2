"""The chain that makes a journal tamper-evident: each entry's digest covers its own text and the digest before it.

The text of an entry is its canonical JSON, `{"actor", "event", "prev", "seq", "time"}`. The digest is SHA-256 over
those bytes, and `prev` is the digest of the entry before; the first entry follows a digest made from the owner's name.
So changing, removing, inserting or moving an entry breaks the chain at that place. Not seen: entries cut off at the
end, and a chain rewritten from some place to its end, unless someone outside remembers a later digest.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from atoll.errors import Corrupt, Invalid
from atoll.spec.document import canonical, sha256
from atoll.spec.event import EVENT, Event

_FIELDS = {"actor", "event", "prev", "seq", "time"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened. `time` is seconds since the epoch by the writer's clock; `actor` is who caused it."""

    seq: int
    time: float
    actor: str
    event: Event
    digest: str


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
    row = Row(seq, event.kind, body, sha256(body))
    entry, problem = _examine(row)
    if entry is None:
        raise Invalid(f"event {event.kind!r}: cannot be read back ({problem}); make it from checked values")
    return row, entry


def read(row: Row) -> Entry:
    """Return the entry in a row; raise `Corrupt` when the row is not what its digest says."""
    entry, problem = _examine(row)
    if entry is None:
        raise Corrupt(f"journal entry {row.seq}: {problem}; run atoll audit verify and restore the journal from a copy")
    return entry


def fault(row: Row, seq: int, prev: str) -> str:
    """Return what is wrong with the row that should be entry `seq` and follow `prev`; "" when nothing is."""
    if row.seq != seq:
        return f"missing: after entry {seq - 1} comes entry {row.seq}"
    entry, problem = _examine(row)
    if entry is None:
        return problem
    if json.loads(row.body)["prev"] == prev:
        return ""
    before = f"entry {seq - 1}" if seq > 1 else "the beginning of this owner's journal"
    return f"does not follow {before}: one of the two was changed, or entries between them were taken out"


def _examine(row: Row) -> tuple[Entry | None, str]:
    """Return the entry of one row, or why there is none, looking at this row alone."""
    if sha256(row.body) != row.digest:
        return None, "edited: its text is not what its digest was made from"
    try:
        data: Any = json.loads(row.body)
    except (ValueError, RecursionError) as error:
        return None, f"unreadable: not JSON ({error})"
    if not isinstance(data, dict) or set(cast("dict[str, Any]", data)) != _FIELDS:
        return None, f"unreadable: not a table of {', '.join(sorted(_FIELDS))}"
    body = cast("dict[str, Any]", data)
    if body["seq"] != row.seq:
        return None, f"moved: it stands in place {row.seq} and was written as entry {body['seq']!r}"
    if not isinstance(body["time"], int | float) or not isinstance(body["actor"], str):
        return None, "unreadable: its time is no number or its actor no text"
    try:
        event = EVENT.validate_python(body["event"])
    except ValidationError as error:
        return None, f"unreadable: its event has {error.error_count()} wrong fields for this version of Atoll"
    if event.kind != row.kind:
        return None, f"edited: it is indexed as {row.kind!r} and is {event.kind!r}"
    return Entry(row.seq, body["time"], body["actor"], event, row.digest), ""
