"""What is told of a journal to who does not have it: how far it is, that an entry is in it, what was live at a time."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints

from atoll.spec.document import Document, Name

# A SHA-256 in base64, of which there is one spelling.
Hash = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{43}=$"), Field(examples=["A" * 43 + "="])]
Path = Annotated[tuple[Hash, ...], Field(max_length=128)]  # of a proof: at most two for each of a tree's 63 levels
Size = Annotated[int, Field(ge=0, le=1 << 53)]  # entries of a journal
KeyText = Annotated[str, Field(max_length=200)]  # of a journal, as `atoll.journal.key` spells it
NoteText = Annotated[str, Field(max_length=20_000)]  # a checkpoint with its signatures


class Proof(Document):
    """That `entry` is number `seq` of the journal with this checkpoint: RFC 6962's audit path from it to the root.

    `witnesses` are the keys of those who cosigned the checkpoint.
    """

    journal: Name
    key: KeyText
    seq: PositiveInt
    entry: str
    path: Path
    checkpoint: NoteText
    witnesses: Annotated[tuple[KeyText, ...], Field(max_length=100)] = ()


class Live(Document):
    """A model that answered, or bore an alias, at a time: since when, by which entry of the journal, and by whom."""

    name: Name  # of the deployment; of the model, with an alias
    model: str  # name@version
    alias: str = ""
    since: float  # seconds since the epoch
    entry: PositiveInt
    actor: str


# --- either way between hub and agent, each about its own journal: messages of `atoll.spec.message` -----------------


class Attest(Document):
    """Show me the end of your journal, and that it begins with the `seen` entries that I saw last: 0 for none yet."""

    kind: Literal["attest"] = "attest"
    seen: Size = 0


class Attested(Document):
    """The newest checkpoint of my journal, signed by `key`, with the proof that it extends what you had `seen`."""

    kind: Literal["attested"] = "attested"
    seen: Size
    key: KeyText
    checkpoint: Annotated[str, Field(max_length=1000)]
    proof: Path = ()


class Cosigned(Document):
    """I have seen your journal so far: a line for the note of that checkpoint. With `words`: I do not accept it."""

    kind: Literal["cosigned"] = "cosigned"
    size: Size
    key: KeyText
    line: Annotated[str, Field(max_length=500)] = ""
    words: Annotated[str, Field(max_length=2000)] = ""


class Disputed(Document):
    """A witness does not accept another's journal: what it is shown does not extend what it saw, by their notes."""

    kind: Literal["journal.disputed"] = "journal.disputed"
    party: Name
    words: str
    seen: str  # the note of the last checkpoint that was accepted
    shown: str  # the one that does not extend it
