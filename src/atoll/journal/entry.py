"""One entry of a journal: the text that is hashed, and how it is read back.

The text is its canonical JSON, `{"actor", "event", "seq", "time"}`. It is a leaf of the journal's tree (`tree`), and
its row keeps the hashes of all complete subtrees that end with it, its own first, as the tree's proofs need them.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, ValidationError

from atoll.errors import Corrupt, Invalid
from atoll.journal.tree import leaf
from atoll.spec.document import Document, canonical
from atoll.spec.event import Event

HASH = 32  # bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened. `time` is seconds since the epoch by the writer's clock; `actor` is who caused it."""

    seq: int
    time: float
    actor: str
    event: Event


class Text(Document):
    """The text of an entry, read in one pass: a hub that starts reads its whole journal."""

    actor: str
    event: Event
    seq: Annotated[int, Field(strict=True)]
    time: Annotated[float, Field(strict=True)]


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as it is stored. `kind` repeats the event's, so that a database can select by it."""

    seq: int
    kind: str
    body: bytes
    hashes: bytes

    @property
    def whole(self) -> bool:
        """Tell whether the text is the one that its own hash was made from."""
        return leaf(self.body) == self.hashes[:HASH]


def written(seq: int, time: float, actor: str, event: Event) -> tuple[bytes, Entry]:
    """Return the text for an event, and the entry as it will be read from there.

    Raises `Invalid` for an event that could not be read back: one such entry would stop every later reading.
    """
    fields = {"seq": seq, "time": time, "actor": actor, "event": event.model_dump(mode="json")}
    try:
        body = canonical(fields)
    except ValueError as error:
        raise Invalid(f"event {event.kind!r}: has no JSON form ({error}); put finite numbers and text in it") from error
    text, problem = _parsed(body)
    if text is None:
        raise Invalid(f"event {event.kind!r}: cannot be read back ({problem}); make it from checked values")
    return body, _entry(text)


def read(row: Row) -> Entry:
    """Return the entry in a row; raise `Corrupt` when the row is not what its hash says."""
    text, problem = _examined(row)
    if text is None:
        raise Corrupt(f"journal entry {row.seq}: {problem}; run atoll audit verify and restore the journal from a copy")
    return _entry(text)


def fault(row: Row) -> str:
    """Return what is wrong with a row, looking at this row alone; "" when nothing is."""
    return _examined(row)[1]


def numbered(body: bytes, seq: int) -> bool:
    """Tell whether a text was written as entry `seq`: in canonical JSON nothing but the time comes after the number."""
    return body.rpartition(b',"time":')[0].endswith(b',"seq":%d' % seq)


def _entry(text: Text) -> Entry:
    return Entry(text.seq, text.time, text.actor, text.event)


def _examined(row: Row) -> tuple[Text | None, str]:
    if not row.whole:
        return None, "edited: its text is not what its hash was made from"
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
