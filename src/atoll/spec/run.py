"""What a run looks like from outside: a view folded from the journal and from live progress, never stored."""

from typing import Literal

from atoll.spec.document import Document, Name
from atoll.spec.event import Result
from atoll.spec.pace import Pace
from atoll.spec.plan import Plan
from atoll.spec.sweep import SweepView, Trial

RunState = Literal["waiting", "planning", "running", "finished", "failed", "cancelled", "interrupted"]


class SiteProgress(Document):
    """One site's part of a run, as last heard of."""

    connected: bool = False
    state: str = "waiting"  # "fetching code", "starting", "training", "sending", "answered", "lost"
    step: int = 0
    steps: int = 0
    pace: Pace | None = None  # while it trains


class RunView(Document):
    """State of one run. `waiting`: for another user's approval. `interrupted`: a hub died under it; `atoll resume` goes
    on with it."""

    run: Name
    name: str
    job_kind: str
    purpose: str
    user: str
    state: RunState
    work: str = ""  # the stage: measure, initialise, train, evaluate, ...
    round: int = 0  # train rounds merged; of a sweep, trials that are over
    rounds: int = 0
    loss: float | None = None  # weighted mean over sites in the last merged round
    losses: tuple[float, ...] = ()
    sites: dict[str, SiteProgress] = {}
    paces: dict[str, Pace] = {}  # at the end of its newest round, of each site that tells none now
    bytes_up: int = 0
    bytes_down: int = 0
    started: float = 0.0  # seconds since the epoch
    seconds: float = 0.0
    words: str = ""  # why it failed or was cancelled
    error: str = ""  # of a failed run: the class in `atoll.errors`
    plan: Plan | None = None
    result: Result | None = None
    trial: Trial | None = None  # of a sweep
    sweep: SweepView | None = None
    withheld: str = ""  # why whoever reads this is not shown what the run found

    @property
    def newest_paces(self) -> dict[str, Pace]:
        """The newest pace of each site that told one, by name."""
        live = {name: site.pace for name, site in self.sites.items() if site.pace is not None}
        return dict(sorted((self.paces | live).items()))

    @property
    def over(self) -> bool:
        """Tell whether nothing changes any more, for an interrupted run until it is resumed."""
        return self.state not in ("waiting", "planning", "running")

    def without_results(self) -> "RunView":
        """Return the view for those who may not read what the run found: the result, losses and what rests on them."""
        found = self.state == "finished" or (self.trial is not None and self.state == "cancelled")  # and words tell it
        return self.model_copy(
            update={
                "loss": None,
                "losses": (),
                "result": None,
                "words": "" if found else self.words,
                "sites": {site: one.model_copy(update={"pace": _bare(one.pace)}) for site, one in self.sites.items()},
                "paces": {site: one.model_copy(update={"loss": None}) for site, one in self.paces.items()},
                "sweep": self.sweep.without_results() if self.sweep is not None else None,
                "withheld": f"what it found is for {self.user}, and for whom the hub's rules let release it; "
                "ask an owner of the hub",
            }
        )


def _bare(pace: Pace | None) -> Pace | None:
    return pace.model_copy(update={"loss": None}) if pace is not None else None


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
    key: str = ""  # that signed it; whoever compares it with one from elsewhere knows that it is the owner's
    witnesses: dict[str, int] = {}  # who cosigned it, and up to which entry
