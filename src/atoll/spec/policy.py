"""What may be done and what may cross: the question put to a policy, and its answer in words."""

from typing import Literal

from atoll.spec.document import Digest, Document, Name
from atoll.spec.fleet import Dataset

CrossingKind = Literal["update", "metric", "query", "model", "prediction", "code", "log", "data"]
Action = Literal["submit", "plan", "open", "cross", "release", "promote", "deploy", "export"]


class Policy(Document):
    """One party's rules, in Cedar. `party` is the site's name, or "hub"."""

    party: str
    text: str


class Crossing(Document):
    """One thing that leaves or enters a site."""

    kind: CrossingKind
    direction: Literal["out", "in"]
    site: Name
    peer: str = "hub"
    run: Name | None = None
    round: int | None = None
    dataset: str | None = None
    purpose: str = ""
    bytes: int = 0
    rows: int = 0  # how many rows the smallest group in it stands for, where that can be said
    wire: tuple[str, ...] = ()  # transforms applied by the agent, in order
    digest: Digest | None = None


class Request(Document):
    """One question to a policy: may `user` do `action` with this resource in this context?

    The resource is the dataset when there is one, else the model, else the job.
    """

    action: Action
    user: str = "local"
    roles: tuple[str, ...] = ("scientist",)
    site: str = ""
    owner: str = ""
    region: str = ""
    dataset: Dataset | None = None
    model: str | None = None
    job: str | None = None
    job_kind: str = ""
    purpose: str = ""
    code: str = ""  # digest of the code bundle
    crossing: Crossing | None = None


class Decision(Document):
    """Allowed or not, by which rules, in words that name the party, the condition and the value."""

    allowed: bool
    party: str
    rules: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join(self.reasons) or f"{self.party} {'allows' if self.allowed else 'refuses'} it"
