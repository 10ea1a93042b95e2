"""What hub and agent, and agent and worker, say to each other. Tensors travel beside these, never in them."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter

from atoll.spec.compute import Compute
from atoll.spec.document import Digest, Document, Label, Name
from atoll.spec.event import Answer, Metrics, Work
from atoll.spec.fleet import Link, Profile, Site
from atoll.spec.job import Data, Job, Optimiser, TaskRef
from atoll.spec.model import Model, Moments, Patterns, Signature
from atoll.spec.pace import Pace
from atoll.spec.plan import Layout, Sync
from atoll.spec.policy import Decision, Request
from atoll.spec.pretrained import Pretrained

# A sentence for a person; whoever sends a longer one is refused, so the sender shortens it.
WORDS_LIMIT = 2000
Words = Annotated[str, Field(max_length=WORDS_LIMIT)]

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
    fingerprint: Digest | None = None  # of the site's dataset when the plan was made: another one is another run
    task: "TaskName | None" = None
    keep_local: Patterns = ()  # of a registered model: tensors of these names are the site's own
    made_by: Name | None = None  # the run that made it, from which the site kept them
    branches: "tuple[Branch, ...]" = ()  # by relays on the way, the hub's first; none: updates are passed on one by one


class Branch(Document):
    """Whose updates of a stage a relay is to make one of: all of them, unless the stage's deadline comes before."""

    relay: Name
    sites: tuple[Name, ...]
    counted: NonNegativeInt | None = None  # the newest train stage that was merged with the relay's own update


class TaskName(Document):
    """The class to run: file and name in the bundle, and its keyword arguments."""

    file: str
    name: str
    params: dict[str, JsonValue] = {}
    pretrained: Digest | None = None

    @classmethod
    def of(cls, asked: TaskRef | Model) -> Self:
        """Return the task of a job, or of the model that came of one."""
        name = asked.name if isinstance(asked, TaskRef) else asked.task
        return cls(file=asked.file, name=name, params=asked.params, pretrained=asked.pretrained)


class Ask(Document):
    """May these be done at your site? The agent decides by the owner's policy."""

    kind: Literal["ask"] = "ask"
    number: NonNegativeInt
    requests: tuple[Request, ...]


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


# --- agent -> worker and back ---------------------------------------------------------------------------------


class Form(Document):
    """Be rank `rank` of so many from here on. Whoever comes first, or a rank that is lost, makes a new generation.

    The order under way is given again with it. With `abort` the group before it is broken: nobody waits for its sums.
    """

    kind: Literal["form"] = "form"
    generation: PositiveInt
    rank: NonNegativeInt
    ranks: NonNegativeInt  # 0: another has its place, and it ends when the others leave
    meeting: str  # a file that is not there, by which they meet
    abort: bool = False
    beat: PositiveFloat = 0.5  # seconds between two signs of life


class Ready(Document):
    """To who is to join a group at work: make the examples now, so that nobody has to wait for them then."""

    kind: Literal["ready"] = "ready"


class Open(Document):
    """First order: import the task and turn the granted dataset into examples. Paths are the site's own."""

    kind: Literal["open"] = "open"
    bundle: str  # folder of the approved code
    task: TaskName
    path: str  # the dataset
    format: str
    fingerprint: Digest  # of the file: another one is another dataset, also for a warm worker
    data: Data
    seed: int
    statistics: dict[str, Moments] = {}
    pretrained: Pretrained | None = None  # what the task names by digest, where it lies at this site
    layout: Layout | None = None  # of the ranks that are given this order; left out, data parallel
    compute: Compute = Compute()


class Initialise(Document):
    """Write a new model's flat weights to `output`, without the tensors that stay."""

    kind: Literal["initialise"] = "initialise"
    seed: int
    output: str
    keep_local: Patterns = ()


class Train(Document):
    """Take `steps` steps from `weights`; write the flat delta (or mean gradient) to `output`.

    With `goes_on` the steps begin from the site's own weights in `state_in`; what the round before merged is mixed in
    from `weights` after the first `sync.delay` of them.
    """

    kind: Literal["train"] = "train"
    seed: int
    weights: str | None  # None: not here yet, in what is ordered ahead
    signature: Signature
    output: str
    state_in: str | None = None  # what the site keeps from round to round: the optimiser's state, its own weights
    state_out: str | None = None
    control_in: str | None = None  # the site's control variates, zeros where there are none yet
    control_out: str | None = None
    local_in: str | None = None  # the site's personal tensors; those of the seed where there are none yet
    local_out: str | None = None
    version: NonNegativeInt = 0  # of `weights`
    goes_on: bool = False
    done: NonNegativeInt
    steps: NonNegativeInt
    place: NonNegativeInt = 0  # of the site among those that train, which are so many
    places: PositiveInt = 1
    batch: int
    shares: tuple[PositiveInt, ...] = ()  # of each batch for each part of the layout; none: even ones
    optimiser: Optimiser
    sync: Sync
    inputs: str = ""  # digest of what lies at the paths that it begins from, where who orders knows it
    checkpoint: str | None = (
        None  # a folder for the state within the round; a group given the order again goes on from it
    )
    checkpoint_seconds: PositiveFloat = 10.0  # between two of them
    checkpoint_steps: NonNegativeInt = 0  # and after every so many steps; 0: by time only


class Ahead(Document):
    """Take those steps of the next round that need no weights, and keep the round in memory for its own order.

    Whatever order comes instead drops it: nobody waits for it, and nothing is written.
    """

    kind: Literal["ahead"] = "ahead"
    round: Train


class Probe(Document):
    """Build the model, time a few steps of it and report a `Profile`; nothing is kept."""

    kind: Literal["probe"] = "probe"
    seed: int
    batch: int
    optimiser: Optimiser
    memory: PositiveInt | None = None  # bytes of the site's smallest device: what does not fit is not stepped


class Evaluate(Document):
    kind: Literal["evaluate"] = "evaluate"
    weights: str
    signature: Signature
    control: bool = False  # the second half of the weights is control variates, which no model has
    keep_local: Patterns = ()
    local_in: str | None = None  # the site's personal tensors


class Predict(Document):
    """Answer for every row; write the answers as Parquet to `output`."""

    kind: Literal["predict"] = "predict"
    weights: str
    signature: Signature
    output: str
    keep_local: Patterns = ()
    local_in: str | None = None  # the site's personal tensors


Order = Annotated[Open | Ready | Probe | Initialise | Train | Ahead | Evaluate | Predict, Field(discriminator="kind")]
ORDER: TypeAdapter[Form | Order] = TypeAdapter(Annotated[Form | Order, Field(discriminator="kind")])


class Reply(Document):
    """A worker's word on an order. `failed` is a sentence for the user; it says where, and never what a row holds."""

    generation: NonNegativeInt = 0  # of the group that it comes from; 0: it is in none yet
    failed: Words | None = None
    progress: NonNegativeInt | None = None  # a step was taken; the order goes on
    sign: Literal["alive", "broken", "leaving"] | None = None  # and nothing else: lost peers, or is told to end
    pace: Pace | None = None  # of this rank so far; of a group's reply that of all its ranks (`atoll.runtime.pacing`)
    examples: NonNegativeInt = 0
    steps: NonNegativeInt = 0  # that were taken
    loss: float | None = None
    signature: Signature = ()
    profile: Profile | None = None
    totals: Metrics = {}
    rows: NonNegativeInt = 0


Assign.model_rebuild()
