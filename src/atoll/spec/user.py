"""Who uses a hub: people with roles, the projects they work in, and what is journalled when that changes."""

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints

from atoll.spec.document import Digest, Document, Name, Words
from atoll.spec.job import Job
from atoll.spec.model import Deployment

Role = Literal["viewer", "scientist", "operator", "owner", "auditor"]
ROLES: tuple[Role, ...] = get_args(Role)
# A local user's is a `Name`. With "sso:" before it, it is what an identity provider calls somebody: no local name has
# a colon, so neither kind can pass for the other.
UserName = Annotated[
    str,
    StringConstraints(pattern=r"^([a-z0-9][a-z0-9_.-]{0,62}|sso:[A-Za-z0-9_.@|+=-]{1,120})$"),
    Field(examples=["ada"]),
]
Kinds = Annotated[tuple[Role, ...], Field(max_length=len(ROLES))]


class User(Document):
    """One person, or program, with the roles that the hub vouches for to itself and to sites."""

    name: UserName
    roles: Kinds = ()
    projects: tuple[Name, ...] = ("default",)


# Who holds the hub's own token, which only the account that runs the hub can read, may do whatever that account may.
LOCAL = User(name="local", roles=ROLES)


class Project(Document):
    """What its runs may take together; nothing is bounded by a field that is left out."""

    name: Name
    runs_at_once: PositiveInt | None = None
    runs_per_day: PositiveInt | None = None  # within any 24 hours
    site_seconds: PositiveFloat | None = None  # of work at sites within any 24 hours, as the sites tell it


class UserSet(Document):
    """Somebody is a user from now on, with these roles and projects and no others."""

    kind: Literal["user.set"] = "user.set"
    user: User
    by: UserName


class UserRemoved(Document):
    """Somebody is no user any more; whatever tokens there are of that name are good for nothing."""

    kind: Literal["user.removed"] = "user.removed"
    name: UserName
    by: UserName


class TokenIssued(Document):
    """A token was made. It is nowhere kept; the journal has what is in it."""

    kind: Literal["token.issued"] = "token.issued"
    token: Name  # its `jti`
    name: UserName
    scope: tuple[Name, ...]
    expires: float  # seconds since the epoch
    by: UserName


class TokensRevoked(Document):
    kind: Literal["token.revoked"] = "token.revoked"
    tokens: tuple[Name, ...]
    by: UserName


class ProjectSet(Document):
    kind: Literal["project.set"] = "project.set"
    project: Project
    by: UserName


class Submission(Document):
    """To carry out a job, with the code of this digest."""

    kind: Literal["submission"] = "submission"
    run: Name
    job: Job
    code: Digest | None = None


class Promotion(Document):
    """To give a version of a model an alias."""

    kind: Literal["promotion"] = "promotion"
    model: str
    alias: Name


class Deploying(Document):
    """To have a version of a model answer."""

    kind: Literal["deploying"] = "deploying"
    deployment: Deployment


class Erasure(Document):
    """To remove a version of a model."""

    kind: Literal["erasure"] = "erasure"
    model: str


Wanted = Annotated[Submission | Promotion | Deploying | Erasure, Field(discriminator="kind")]


class ApprovalAsked(Document):
    """Somebody wants what a rule lets nobody do alone. It is kept as it was asked, and may be carried out once."""

    kind: Literal["approval.asked"] = "approval.asked"
    approval: Name
    run: Name | None = None  # of a submission
    user: User  # who wants it, as of then
    wanted: Wanted
    digest: Digest  # of what is wanted; whoever approves names it
    roles: tuple[str, ...]  # one of which whoever approves has
    words: str  # what is wanted, and by which rule somebody else must agree
    expires: float  # seconds since the epoch


class ApprovalAnswered(Document):
    """Another user said yes, in one entry of the journal with what came of it; or somebody said no."""

    kind: Literal["approval.answered"] = "approval.answered"
    approval: Name
    run: Name | None = None
    by: UserName
    approved: bool
    words: Words = ""


class ApprovalView(Document):
    """What waits for another's word, or has had it."""

    approval: Name
    user: UserName
    wanted: Wanted
    digest: Digest
    roles: tuple[str, ...]
    words: str
    asked: float  # seconds since the epoch
    expires: float
    state: Literal["waiting", "approved", "rejected", "expired"]
    by: str = ""  # who answered


class TokenView(Document):
    token: Name
    expires: float
    scope: tuple[Name, ...]


class UserView(Document):
    """A user as people see one: with the tokens that open something now."""

    user: User
    tokens: tuple[TokenView, ...] = ()


class ProjectView(Document):
    """A project with what its runs took within the last 24 hours."""

    project: Project
    running: int = 0
    runs: int = 0
    site_seconds: float = 0.0


UserEvent = UserSet | UserRemoved | TokenIssued | TokensRevoked | ProjectSet | ApprovalAsked | ApprovalAnswered
