"""What an agent tells its workers to do, and what they say of it. Tensors lie in files that both name."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter

from atoll.spec.compute import Compute
from atoll.spec.document import Digest, Document, Words
from atoll.spec.event import Metrics
from atoll.spec.fleet import Profile
from atoll.spec.job import Data, Optimiser, TaskRef
from atoll.spec.model import Model, Moments, Patterns, Signature
from atoll.spec.pace import Pace
from atoll.spec.plan import Layout
from atoll.spec.pretrained import Pretrained
from atoll.spec.privacy import PrivateSteps
from atoll.spec.sync import Sync


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
    private: PrivateSteps | None = None  # of a promise about rows: examples are drawn at random, and noise is added
    sync: Sync
    inputs: str = ""  # digest of what lies at the paths that it begins from, where who orders knows it
    checkpoint: str | None = None  # a folder for the state within the round: whoever is given it again goes on from it
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
    private: bool = False  # the job promises something of rows: a loss that is not finite ends nothing


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


class Fault(Document):
    """Why a worker came to nothing. User code can say anything here, so no agent passes a field of it on unseen:
    what may leave a site is for `atoll.runtime.sentences` to say."""

    kind: Annotated[str, Field(max_length=100)]  # the error's class
    words: Words = ""
    file: Annotated[str, Field(max_length=100)] = ""  # of the bundle, where user code raised it
    line: Annotated[int, Field(ge=0, le=10_000_000)] = 0


class Reply(Document):
    """A worker's word on an order."""

    generation: NonNegativeInt = 0  # of the group that it comes from; 0: it is in none yet
    failed: Fault | None = None
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
