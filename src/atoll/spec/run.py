"""What a run looks like from outside: a view folded from the journal and from live progress, never stored."""

from typing import Literal

from atoll.spec.document import Document, Name
from atoll.spec.event import Result
from atoll.spec.plan import Plan

RunState = Literal["planning", "running", "finished", "failed", "cancelled", "interrupted"]


class SiteProgress(Document):
    """One site's part of a run, as last heard of."""

    connected: bool = False
    state: str = "waiting"  # "fetching code", "starting", "training", "sending", "answered", "lost"
    step: int = 0
    steps: int = 0


class RunView(Document):
    """State of one run. `interrupted`: a hub died under it; `atoll resume` goes on with it."""

    run: Name
    name: str
    job_kind: str
    purpose: str
    user: str
    state: RunState
    work: str = ""  # the stage: measure, initialise, train, evaluate, ...
    round: int = 0  # train rounds merged
    rounds: int = 0
    loss: float | None = None  # weighted mean over sites in the last merged round
    losses: tuple[float, ...] = ()
    sites: dict[str, SiteProgress] = {}
    bytes_up: int = 0
    bytes_down: int = 0
    started: float = 0.0  # seconds since the epoch
    seconds: float = 0.0
    words: str = ""  # why it failed or was cancelled
    error: str = ""  # of a failed run: the class in `atoll.errors`
    plan: Plan | None = None
    result: Result | None = None

    @property
    def over(self) -> bool:
        """Tell whether nothing changes any more, for an interrupted run until it is resumed."""
        return self.state not in ("planning", "running")


class Traffic(Document):
    """What crossed one site's border, in one direction, of one kind; refusals counted apart."""

    site: str
    direction: Literal["out", "in"]
    kind: str
    count: int
    bytes: int
    refused: int = 0


class SiteView(Document):
    """A site as the hub sees it."""

    name: str
    owner: str
    region: str
    connected: bool
    datasets: tuple[str, ...] = ()
    devices: int = 0
    latency_ms: float | None = None
    words: str = ""
    quarantine: str = ""  # why it is given no work, until it is released
    relay: bool = False  # others dial it in the hub's place
    behind: str = ""  # the relay that it dials itself


class DeploymentView(Document):
    """A deployment and where it answers."""

    name: str
    model: str
    url: str
    state: Literal["starting", "answering", "stopped", "failed"]
    words: str = ""


class Verdict(Document):
    """What verifying a journal found; `bad` is the number of the first entry that does not fit."""

    journal: str
    entries: int
    intact: bool
    bad: int | None = None
    words: str = ""
