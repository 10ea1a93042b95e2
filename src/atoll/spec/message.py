"""What hub and agent say to each other. Tensors travel beside these, never in them."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter

from atoll.spec.budget import Guarantee
from atoll.spec.document import Digest, Document, Label, Name, Words
from atoll.spec.event import Answer, Work
from atoll.spec.fleet import Link, Site
from atoll.spec.job import Job
from atoll.spec.model import Moments, Patterns, Signature
from atoll.spec.order import TaskName
from atoll.spec.pace import Pace
from atoll.spec.plan import Layout
from atoll.spec.policy import Applied, Decision, Request
from atoll.spec.record import Attest, Attested, Cosigned
from atoll.spec.secret import MOST, Said, Told
from atoll.spec.sync import Sync
from atoll.spec.user import Kinds

# --- hub -> agent ---------------------------------------------------------------------------------------------


class Assign(Document):
    """Do this stage of the run. A lower (epoch, position) than one already seen is refused."""

    kind: Literal["assign"] = "assign"
    run: Name
    epoch: NonNegativeInt
    position: NonNegativeInt
    work: Work
    job: Job
    sync: Sync
    layout: Layout = Layout()
    version: NonNegativeInt = 0
    steps: NonNegativeInt = 0  # inner steps of this round
    done: NonNegativeInt = 0  # inner steps of the run before it; with `sync.seconds` those merged of this site
    counted: NonNegativeInt | None = None  # the newest train stage that was merged with this site's update
    place: NonNegativeInt = 0  # of this site among those that train; their number, and no name, is told with it
    places: PositiveInt = 1
    code: Digest | None = None
    code_bytes: NonNegativeInt = 0
    weights: Digest | None = None
    signature: Signature = ()
    statistics: dict[str, Moments] = {}
    user: str = "local"
    roles: Kinds = ()
    fingerprint: Digest | None = None  # of the site's dataset when the plan was made: another one is another run
    task: TaskName | None = None
    keep_local: Patterns = ()  # of a registered model: tensors of these names are the site's own
    made_by: Name | None = None  # the run that made it, from which the site kept them
    together: Annotated[
        tuple[Name, ...], Field(max_length=MOST)
    ] = ()  # whose updates the hub is to see the sum of only
    branches: "tuple[Branch, ...]" = ()  # by relays on the way, the hub's first; none: updates are passed on one by one


class Branch(Document):
    """Whose updates of a stage a relay is to make one of: all of them, unless the stage's deadline comes before."""

    relay: Name
    sites: tuple[Name, ...]
    counted: NonNegativeInt | None = None  # the newest train stage that was merged with the relay's own update


class Ask(Document):
    """May these be done at your site? The agent decides by the owner's policy."""

    kind: Literal["ask"] = "ask"
    number: NonNegativeInt
    requests: tuple[Request, ...]
    explain: bool = False  # tell of each rule, for people; nothing will be done


class Release(Document):
    """The run is over (or no longer yours): stop its work and drop what was kept for it."""

    kind: Literal["release"] = "release"
    run: Name
    words: str = ""
    made: bool = False  # a model came of it, whose personal tensors the site keeps


class Notice(Document):
    """A word for the site's owner, who finds it in the agent's log; it changes nothing."""

    kind: Literal["notice"] = "notice"
    words: Words


class Admitted(Document):
    """To a relay: the sites that may dial it, and the keys that may not any more. Anything else is not known."""

    kind: Literal["admitted"] = "admitted"
    sites: dict[Name, Digest] = {}  # each with the digest of its key
    out: tuple[Digest, ...] = ()


class Welcome(Document):
    """The session is open; beat at least every `heartbeat` seconds."""

    kind: Literal["welcome"] = "welcome"
    heartbeat: float
    region: str = ""  # where the hub is, as it says


# --- agent -> hub ---------------------------------------------------------------------------------------------


class Hello(Document):
    kind: Literal["hello"] = "hello"
    site: Site
    link: Link | None = None
    runs: Annotated[tuple[Name, ...], Field(max_length=10_000)] = ()  # runs it keeps something of on its disk


class Decisions(Document):
    kind: Literal["decisions"] = "decisions"
    number: NonNegativeInt
    decisions: tuple[Decision, ...]
    rules: tuple[tuple[Applied, ...], ...] = ()  # of each decision, where they were asked for
    guarantees: tuple[Guarantee | None, ...] = ()  # what each of them counted the run to cost, where one does


class Done(Document):
    """An assignment's answer that carries no tensors."""

    kind: Literal["done"] = "done"
    run: Name
    answer: Answer


class Refusal(Document):
    kind: Literal["refusal"] = "refusal"
    run: Name
    words: Words


class Failure(Document):
    kind: Literal["failure"] = "failure"
    run: Name
    position: NonNegativeInt
    words: Words
    error: Label = "AtollError"  # its class in `atoll.errors`


class Progress(Document):
    """How far an assignment is: counts, and a pace where the owner lets metrics out, for its loss is one."""

    kind: Literal["progress"] = "progress"
    run: Name
    position: NonNegativeInt
    state: str  # "fetching code", "starting", "training", "sending"
    step: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    pace: Pace | None = None


class Beat(Document):
    """Either side: I am here."""

    kind: Literal["beat"] = "beat"


# --- secure sums, either way ----------------------------------------------------------------------------------


class SumSaid(Document):
    """A site's word in a secure sum, for its neighbours or for the hub."""

    kind: Literal["sum_said"] = "sum_said"
    run: Name
    position: NonNegativeInt
    attempt: NonNegativeInt
    said: Said


class SumTold(Document):
    """What a site hears of the others in one."""

    kind: Literal["sum_told"] = "sum_told"
    run: Name
    position: NonNegativeInt
    attempt: NonNegativeInt
    told: Told


# --- through a relay, either way ------------------------------------------------------------------------------


class Opened(Document):
    """A site began a session with the relay that it is behind."""

    kind: Literal["opened"] = "opened"


class Closed(Document):
    """That session ended; from the hub: it is not taken for one."""

    kind: Literal["closed"] = "closed"
    words: Words = ""


class Unusable(Document):
    """A relay did not take what a site brought."""

    kind: Literal["unusable"] = "unusable"
    run: Name
    position: NonNegativeInt
    epoch: NonNegativeInt
    words: Words  # site, tensor and reason


class Relayed(Document):
    """What a site behind a relay said, or is told; behind two relays it is wrapped twice."""

    kind: Literal["relayed"] = "relayed"
    site: Name
    message: "Message"


Message = Annotated[
    Assign
    | Ask
    | Release
    | Notice
    | Welcome
    | Hello
    | Decisions
    | Done
    | Refusal
    | Failure
    | Progress
    | Beat
    | Attest
    | Attested
    | Cosigned
    | SumSaid
    | SumTold
    | Admitted
    | Opened
    | Closed
    | Unusable
    | Relayed,
    Field(discriminator="kind"),
]
Relayed.model_rebuild()
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class Parcel(Document):
    """Header of a tensor stream: whose, for what, how long, how encoded."""

    run: Name
    purpose: Literal["update", "weights", "code", "probe"]
    size: NonNegativeInt  # elements of the flat float32 vector; bytes when purpose is code or probe
    digest: Digest | None = None  # asked for (weights, code)
    base: Digest | None = None  # weights that the asker has; in what is given: only the change from these comes
    content: Digest | None = None  # of an update as it was encoded: only the same one may go on where it broke off
    wire: tuple[str, ...] = ()
    answer: Answer | None = None  # with an update or initial weights
    answers: Annotated[tuple[Answer, ...], Field(max_length=10_000)] = ()  # with an update that a relay made of theirs
    site: Name | None = None  # for which site a relay fetches
    held: bool = False  # the relay has it and asks only whether that site may have it


Assign.model_rebuild()
