"""What an owner decides about code that would run at the site: events of its journal, and what is told of them."""

from typing import Annotated, Literal

from pydantic import Field

from atoll.spec.document import Digest, Document, Name

Text = Annotated[str, Field(max_length=200)]


class CodeKept(Document):
    """Code came in to be read. It does not run: the owner's rules want it approved, or signed by a trusted key."""

    kind: Literal["code.kept"] = "code.kept"
    code: Digest
    task: Text  # file and class, by which earlier code of it is found
    job: Name
    user: str
    key: Text = ""  # of who signed it; "" where nobody did


class CodeReviewed(Document):
    """The owner has read code, and lets it run or not. The newest word on a digest counts."""

    kind: Literal["code.reviewed"] = "code.reviewed"
    code: Digest
    task: Text
    approved: bool
    user: str  # of the site's machine


class CodeTrusted(Document):
    """The owner trusts code that a key signed, or does so no more. Rules know its user by this name."""

    kind: Literal["code.trusted"] = "code.trusted"
    name: Name
    key: Text
    trusted: bool
    user: str


CodeEvent = CodeKept | CodeReviewed | CodeTrusted


class CodeView(Document):
    """Code as its site's owner sees it listed."""

    code: Digest
    task: str
    state: Literal["waiting", "approved", "rejected"]
    job: str = ""
    user: str = ""  # who submitted it, or who decided
    signer: str = ""  # by what name its key is trusted, or the key; "" where nobody signed it
