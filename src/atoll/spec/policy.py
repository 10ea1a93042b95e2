"""What may be done and what may cross: the question put to a policy, and its answer in words."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt

from atoll.spec.budget import Guarantee
from atoll.spec.document import Digest, Document, Name
from atoll.spec.fleet import Dataset
from atoll.spec.job import TrainJob

CrossingKind = Literal["update", "metric", "query", "model", "prediction", "code", "log", "data"]
Action = Literal[
    "view",
    "submit",
    "cancel",
    "plan",
    "open",
    "cross",
    "release",
    "promote",
    "deploy",
    "export",
    "erase",
    "approve",
    "administer",
    "audit",
]
Part = Literal["runs", "sites", "users"]  # of a hub, that is administered


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
    clip: NonNegativeFloat = 0.0  # the L2 norm that its clips hold an update to; 0: to none
    noise: NonNegativeFloat = 0.0  # the standard deviation of its noise, over that norm
    region: str = ""  # of who receives it, as that one says; "" where nobody said
    digest: Digest | None = None


class Promise(Document):
    """What a train job does to hide the data, from which the site that has them counts what it costs."""

    job: TrainJob
    noise: NonNegativeFloat = 0.0  # on each update, over its clip's bound; 0: none
    rounds: NonNegativeInt = 0  # in each of which the site sends one update at most; 0: not planned yet

    @property
    def empty(self) -> bool:
        """Whether there is nothing to count, which may take seconds."""
        return self.noise == 0 and self.job.privacy is None


class Request(Document):
    """One question to a policy: may `user` do `action` with this resource in this context?

    The resource is the first of dataset, model, job and hub that the action can be about.
    """

    action: Action
    user: str = "local"
    roles: tuple[str, ...] = ("scientist",)
    projects: tuple[str, ...] = ("default",)
    by: str = ""  # who asked first, or whose run it is, where this user is to cancel or approve it
    part: Part | None = None
    site: str = ""
    owner: str = ""
    region: str = ""
    dataset: Dataset | None = None
    model: str | None = None
    job: str | None = None
    job_kind: str = ""
    project: str = "default"  # of the job
    purpose: str = ""
    code: str = ""  # digest of the code bundle
    approved: bool = False  # that code, by the owner of the site that is asked
    signer: str = ""  # the name under which that owner trusts the key that signed it
    sandbox: bool = False  # whether it would run in one there
    crossing: Crossing | None = None
    promise: Promise | None = None  # of a job that trains on the dataset
    guarantee: Guarantee | None = None  # what the dataset's site makes of it; none: no promise, or nobody counted
    overdrawn: dict[str, str] = {}  # what of it does not fit into the dataset's budget, and in words why

    @property
    def kept(self) -> Self:
        """What of it is journalled beside a decision: all that rules looked at, but for a crossing, which has an entry
        of its own."""
        bare = self.dataset.model_copy(update={"columns": {}}) if self.dataset is not None else None
        return self.model_copy(update={"crossing": None, "dataset": bare, "promise": None})


class Decision(Document):
    """Allowed or not, by which rules, in words that name the party, the condition and the value."""

    allowed: bool
    party: str
    rules: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    approvers: tuple[str, ...] = ()  # refused to one alone: another user with one of these roles may let it happen

    def __str__(self) -> str:
        return "; ".join(self.reasons) or f"{self.party} {'allows' if self.allowed else 'refuses'} it"


class Applied(Document):
    """One rule that a question comes under, and what became of it: a permit or forbid that applies, or why it does not.

    Of these a `Decision` names only those that settled it.
    """

    rule: str
    effect: Literal["permit", "forbid"]
    applies: bool
    words: str


class Account(Document):
    """A decision before it is needed, rule by rule."""

    decision: Decision
    rules: tuple[Applied, ...] = ()
    guarantee: Guarantee | None = None  # that the dataset's site counted


class Foreseen(Document):
    """What one party's rules would say at one point that a job comes to."""

    point: Action
    party: str  # whose rules
    subject: str  # what is asked about, in words
    decision: Decision
    rules: tuple[Applied, ...] = ()
