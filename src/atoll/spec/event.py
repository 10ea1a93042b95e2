"""What happened: the entries of a journal. A run is the fold of its events (`atoll.runtime.machine`)."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, TypeAdapter

from atoll.spec.budget import PrivacyEvent
from atoll.spec.code import CodeEvent
from atoll.spec.document import Digest, Document, Label, Name
from atoll.spec.fleet import Fleet, Link, Profile, Site
from atoll.spec.job import Job
from atoll.spec.model import Model, ModelEvent, Moments, Signature
from atoll.spec.pace import Pace
from atoll.spec.plan import Plan
from atoll.spec.policy import Crossing, Decision, Request
from atoll.spec.record import Disputed
from atoll.spec.sweep import Trial
from atoll.spec.user import Kinds, UserEvent

Work = Literal["probe", "measure", "initialise", "train", "evaluate", "predict", "query", "publish"]


class Totals(Document):
    """A metric as it leaves a site: a sum and a count, or a histogram of scores per class."""

    total: float = 0.0
    count: NonNegativeInt = 0
    power: bool = False  # e to the power of the mean is meant
    positives: Annotated[tuple[NonNegativeInt, ...], Field(max_length=64)] = ()
    negatives: Annotated[tuple[NonNegativeInt, ...], Field(max_length=64)] = ()


# User code names its metrics, so their names and number are bounded like everything that crosses beside the numbers.
Metrics = Annotated[dict[Label, Totals], Field(max_length=32)]


class ColumnSums(Document):
    """Count, sum and sum of squares of one column at one site, missing values left out."""

    count: NonNegativeInt
    total: float
    squares: float


class Group(Document):
    """One group of a query at one site: its key, its row count, and partial aggregates by output column."""

    key: tuple[str | int | float | bool | None, ...] = ()
    rows: NonNegativeInt
    partials: dict[str, tuple[float | int | None, ...]] = {}


class Answer(Document):
    """What a site gives back for one assignment. Tensors lie in the hub's spool under `update`."""

    site: Name
    position: NonNegativeInt
    epoch: NonNegativeInt
    version: NonNegativeInt = 0  # the model version it was computed from
    examples: NonNegativeInt = 0
    steps: NonNegativeInt = 0  # inner steps of a train round
    loss: float | None = None
    seconds: float = 0.0
    update: Digest | None = None
    bytes: NonNegativeInt = 0
    signature: Signature = ()
    profile: Profile | None = None
    sums: dict[str, ColumnSums] = {}
    totals: Metrics = {}
    groups: tuple[Group, ...] = ()
    suppressed: bool = False  # whether the site held groups back for being too small
    pace: Pace | None = None  # of the train round's newest steps
    via: Annotated[tuple[Name, ...], Field(max_length=16)] = ()  # relays that merged its update, from the hub's on


class Result(Document):
    """What a finished run has to show."""

    metrics: dict[str, float] = {}  # over all evaluated examples
    by_site: dict[Name, dict[str, float]] = {}
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str | int | float | bool | None, ...], ...] = ()
    suppressed: bool = False
    missing: tuple[Name, ...] = ()  # sites that were asked, outside training, and gave no answer in time
    failed: dict[Name, str] = {}  # sites that failed in a stage which went on without them, in their words
    model: str | None = None


class Submitted(Document):
    kind: Literal["run.submitted"] = "run.submitted"
    run: Name
    user: str
    roles: Kinds = ()  # of the user then: they are the run's to its end
    job: Job
    code: Digest | None = None
    holders: tuple[Name, ...] = ()  # sites that had the dataset then: the plan waits for those of them that died since
    trial: Trial | None = None  # of a sweep


class Planned(Document):
    kind: Literal["run.planned"] = "run.planned"
    run: Name
    plan: Plan
    fleet: Fleet = Fleet()  # the plan's sites as they were when it was made


class Restarted(Document):
    """The hub began anew and goes on with the run under a higher epoch."""

    kind: Literal["run.restarted"] = "run.restarted"
    run: Name
    missing: tuple[Name, ...] = ()  # sites whose update of the open round is not in the spool any more


class Joined(Document):
    """A site of the run is connected and can work."""

    kind: Literal["run.joined"] = "run.joined"
    run: Name
    site: Name


class Lost(Document):
    kind: Literal["run.lost"] = "run.lost"
    run: Name
    site: Name


class Answered(Document):
    """A site answered; with `others`, a relay's one update for all of them: they count together or not at all."""

    kind: Literal["run.answered"] = "run.answered"
    run: Name
    answer: Answer
    others: tuple[Answer, ...] = ()

    @property
    def answers(self) -> tuple[Answer, ...]:
        return (self.answer, *self.others)


class Rejected(Document):
    """The hub did not take what a site brought. The run goes on by its rule: without it, or asking again."""

    kind: Literal["run.rejected"] = "run.rejected"
    run: Name
    site: Name
    position: NonNegativeInt
    epoch: NonNegativeInt
    words: str  # site, tensor and reason
    late: bool = False  # nothing was wrong with it but that it came when nobody waited for it any more


class Barred(Document):
    """A site of the run is in quarantine: it counts as lost until it joins again."""

    kind: Literal["run.barred"] = "run.barred"
    run: Name
    site: Name
    words: str


class Merged(Document):
    """The hub combined a stage's answers: the new weights, statistics or metrics."""

    kind: Literal["run.merged"] = "run.merged"
    run: Name
    position: NonNegativeInt
    sites: tuple[Name, ...]
    weights: Digest | None = None
    outer: Digest | None = None
    signature: Signature = ()
    loss: float | None = None
    outliers: tuple[Name, ...] = ()  # whose updates a bound or a robust rule shortened or left out
    statistics: dict[str, Moments] = {}
    result: Result | None = None


class Expired(Document):
    """A deadline passed: the round's (it may go on with a quorum), or with `final` its patience (it may not)."""

    kind: Literal["run.expired"] = "run.expired"
    run: Name
    position: NonNegativeInt
    final: bool = False


class Refused(Document):
    """A site's policy said no to its part of the run."""

    kind: Literal["run.refused"] = "run.refused"
    run: Name
    site: Name
    words: str


class Broken(Document):
    """The task or the machine under it failed, at a site or in the hub. The run ends and publishes nothing, unless it
    was a site, and the stage's wait lets it go on with the others."""

    kind: Literal["run.broken"] = "run.broken"
    run: Name
    site: str
    position: NonNegativeInt | None = None  # the stage that the site failed in
    words: str
    error: str = "AtollError"  # its class in `atoll.errors`


class Cancelled(Document):
    kind: Literal["run.cancelled"] = "run.cancelled"
    run: Name
    user: str
    words: str = ""  # why, where it was not for the user's asking


class Pruned(Document):
    """A trial is no longer worth its rounds: others of its sweep did better."""

    kind: Literal["run.pruned"] = "run.pruned"
    run: Name
    words: str


class Outdone(Document):
    """A trial came to its end, and none of it is registered: an earlier one of its sweep is as good."""

    kind: Literal["run.outdone"] = "run.outdone"
    run: Name
    words: str


class Swept(Document):
    """Every trial of a sweep is over; the result is the best one's."""

    kind: Literal["run.swept"] = "run.swept"
    run: Name
    result: Result
    words: str


class Published(Document):
    kind: Literal["run.published"] = "run.published"
    run: Name
    model: Model


class Invited(Document):
    """A site may join: the token itself is never kept, only its digest."""

    kind: Literal["site.invited"] = "site.invited"
    site: Name
    token: Digest
    expires: float  # seconds since the epoch
    relay: str = ""  # where sites dial it, if it is to be a relay
    behind: Name | None = None  # the relay that it is to dial in the hub's place


class Certified(Document):
    """A site was given a certificate for its key; with ``token``, its first one, for an invitation of this digest."""

    kind: Literal["site.certified"] = "site.certified"
    site: Name
    key: Digest  # of the public key
    serial: str
    expires: float  # seconds since the epoch
    token: Digest | None = None


class Revoked(Document):
    """A site is shut out; it comes back only by another invitation and another key."""

    kind: Literal["site.revoked"] = "site.revoked"
    site: Name
    user: str


class Quarantined(Document):
    """A site brought nothing for a while that could be taken: it is given no work until somebody releases it."""

    kind: Literal["site.quarantined"] = "site.quarantined"
    site: Name
    words: str


class SiteReleased(Document):
    """A site is out of quarantine."""

    kind: Literal["site.released"] = "site.released"
    site: Name
    user: str


class Retained(Document):
    """No entry of this journal may be dropped before a time, in seconds since the epoch; it can only be put off."""

    kind: Literal["journal.retained"] = "journal.retained"
    until: float
    user: str


class Connected(Document):
    kind: Literal["site.connected"] = "site.connected"
    site: Site
    link: Link | None = None


class Disconnected(Document):
    kind: Literal["site.disconnected"] = "site.disconnected"
    site: Name
    words: str = ""


class Crossed(Document):
    """A gate was asked to let something through; the decision says whether it did."""

    kind: Literal["crossing"] = "crossing"
    crossing: Crossing
    decision: Decision


class Decided(Document):
    """A policy was asked at a point that is no crossing: submit, plan, release, deploy, ..."""

    kind: Literal["decision"] = "decision"
    action: str
    subject: str
    run: Name | None = None
    decision: Decision
    request: Request | None = None  # what was asked, so that other rules can be asked it later


RunEvent = (
    Submitted
    | Planned
    | Restarted
    | Joined
    | Lost
    | Answered
    | Rejected
    | Barred
    | Merged
    | Expired
    | Refused
    | Broken
    | Cancelled
    | Pruned
    | Outdone
    | Swept
    | Published
)
Event = Annotated[
    RunEvent
    | ModelEvent
    | Invited
    | Certified
    | Revoked
    | Quarantined
    | SiteReleased
    | Disputed
    | Retained
    | Connected
    | Disconnected
    | Crossed
    | Decided
    | PrivacyEvent
    | CodeEvent
    | UserEvent,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
