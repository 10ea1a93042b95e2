"""What the machine knows of a run: a value, who takes part in its stages, and which answers it still takes."""

from dataclasses import dataclass, field
from typing import Literal

from atoll.runtime import waits
from atoll.spec.event import Answer, Broken, Result, Work
from atoll.spec.fleet import Fleet
from atoll.spec.job import Job, TrainJob
from atoll.spec.model import Moments, Signature
from atoll.spec.plan import Plan
from atoll.spec.sweep import Sweep, Trial
from atoll.spec.user import Role, User

Phase = Literal["planning", "running", "finished", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class State:
    """Everything the conductor needs to go on with a run; a value."""

    run: str
    job: Job
    user: str
    roles: tuple[Role, ...] = ()
    code: str | None = None
    holders: tuple[str, ...] = ()  # sites that had the dataset when the job was submitted: its plan waits for them
    trial: Trial | None = None  # of a sweep
    phase: Phase = "planning"
    plan: Plan | None = None
    fleet: Fleet = field(default_factory=Fleet)  # the plan's sites as they were when it was made
    stages: tuple[Work, ...] = ()
    position: int = 0
    epoch: int = 0
    version: int = 0  # train rounds merged
    live: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()  # refused: they take no further part
    asked: tuple[str, ...] = ()  # for the first weights, in this order
    declined: frozenset[str] = frozenset()  # of those, who refused to give them; they may still train
    arrived: tuple[Answer, ...] = ()
    merging: tuple[Answer, ...] = ()
    taken: dict[str, int] = field(default_factory=dict[str, int])  # site -> the newest stage merged with its answer
    sums: dict[str, int] = field(default_factory=dict[str, int])  # relay -> the newest merged with a sum that it made
    steps: dict[str, int] = field(default_factory=dict[str, int])  # of each site's merged updates
    seen: frozenset[str] = frozenset()  # whose sums or updates were merged: the model rests on their data
    lapsed: bool = False  # the stage's deadline has passed
    spoiled: frozenset[str] = frozenset()  # their answers to this stage were rejected; it is to go on without them
    failures: tuple[Broken, ...] = ()  # of sites in this stage, the first one first; the next stage asks them again
    weights: str | None = None
    outer: str | None = None
    signature: Signature = ()
    statistics: dict[str, Moments] = field(default_factory=dict[str, Moments])
    losses: tuple[float, ...] = ()
    result: Result = field(default_factory=Result)
    words: str = ""
    error: str = ""
    pruned: bool = False  # a trial that was cancelled because others did better

    @property
    def asker(self) -> User:
        """Who submitted the job, with the roles of then, in the project that it is of."""
        return User(name=self.user, roles=self.roles, projects=(self.job.project,))

    @property
    def work(self) -> Work | None:
        """The current stage's work, while there is one."""
        return self.stages[self.position] if self.phase == "running" and self.stages else None

    @property
    def sweep(self) -> Sweep | None:
        """What is searched, where the run is a sweep: it has no plan and no stages, its trials have."""
        return self.job.sweep if isinstance(self.job, TrainJob) else None

    @property
    def over(self) -> bool:
        return self.phase in ("finished", "failed", "cancelled")

    @property
    def rule(self) -> waits.Rule:
        """How the current stage waits."""
        return waits.rule(self.plan, self.work) if self.plan is not None else "all"

    @property
    def everyone(self) -> tuple[str, ...]:
        """The sites that the plan gives a part to, also those that have refused since."""
        return tuple(dict.fromkeys((*self.plan.sites, *self.plan.evaluators))) if self.plan is not None else ()

    @property
    def members(self) -> tuple[str, ...]:
        """The sites whose answers the current stage can use, in plan order."""
        return self.members_of(self.work)

    def members_of(self, work: Work | None) -> tuple[str, ...]:
        """Return the sites whose answers a stage of this kind can use, in plan order."""
        if self.plan is None or work in (None, "publish"):
            return ()
        if work == "initialise":
            return tuple(site for site in self.asked if site not in self.declined)
        names = self.plan.evaluators if work == "evaluate" else self.plan.sites
        return tuple(name for name in names if name not in self.gone) if self.gone else names

    def idle(self, site: str) -> bool:
        """Tell whether nothing of the site's waits to be merged or is being merged."""
        return all(answer.site != site for answer in (*self.arrived, *self.merging))

    @property
    def failed(self) -> frozenset[str]:
        """The sites that failed in the current stage, or since the last version of a buffer: it does without them."""
        return frozenset(event.site for event in self.failures)

    @property
    def sound(self) -> int:
        """How many members have not failed in the current stage."""
        return sum(site not in self.failed for site in self.members)

    @property
    def silent(self) -> tuple[str, ...]:
        """The members that have not answered the current stage, in plan order."""
        answered = {answer.site for answer in (*self.arrived, *self.merging)}
        return tuple(site for site in self.members if site not in answered)

    @property
    def able(self) -> int:
        """How many members are here, or have answered, and were not rejected and have not failed."""
        answered = {answer.site for answer in self.arrived}
        without = self.spoiled | self.failed
        return sum(site not in without and (site in self.live or site in answered) for site in self.members)

    def awaits(self, site: str) -> bool:
        """Tell whether this stage or a later one ends with no fewer than all of its sites, and waits for this one."""
        assert self.plan is not None
        if self.rule == "all" and site in self.silent:
            return True
        later = set(self.stages[self.position + 1 :])
        return any(waits.rule(self.plan, work) == "all" and site in self.members_of(work) for work in later)

    @property
    def missing(self) -> tuple[str, ...]:
        """The sites to name in a result when this stage goes on: silent now, or in an earlier stage with a result."""
        return tuple(dict.fromkeys((*self.result.missing, *self.silent)))


def stages(job: Job, plan: Plan) -> tuple[Work, ...]:
    """Return the row of stages a job goes through under its plan."""
    if not isinstance(job, TrainJob):
        return (job.kind,)
    row: list[Work] = ["measure"] if job.data.statistics else []
    row.append("initialise")
    row.extend("train" for _ in range(plan.rounds))
    if plan.evaluators:
        row.append("evaluate")
    return (*row, "publish")


def spooled(answer: Answer) -> tuple[int, str]:
    """Return the name of an answer's update in the hub's spool: its own, or that of the relay which made it one of
    several."""
    return answer.position, answer.via[0] if answer.via else answer.site


def expects(state: State, answer: Answer) -> bool:
    """Tell whether an answer counts: of this epoch, from a member that has not answered, and not too late."""
    if state.phase != "running" or answer.epoch != state.epoch or answer.site not in state.members:
        return False
    behind = state.position - answer.position
    if not state.idle(answer.site) or behind < 0 or answer.version != state.version - behind:
        return False
    if answer.site in state.failed:
        return False
    if state.rule == "buffer":  # an answer to an earlier train round is welcome, once, and weighs less
        return state.stages[answer.position] == "train" and answer.position > state.taken.get(answer.site, -1)
    return behind == 0 and not state.merging and answer.site not in state.spoiled


def unexpected(state: State, answer: Answer) -> Literal["nobody's", "again", "late", "wrong"]:
    """Say what is the matter with an answer that the run does not expect.

    nobody's: the run is not running, or the site has no part in it
    again: what the site said of this stage counts already, or was rejected, or was that it failed
    late: the stage went on without it, or another epoch began
    wrong: no assignment can have asked for it
    """
    site, position = answer.site, answer.position
    if state.phase != "running" or site not in state.everyone or site in state.gone:
        return "nobody's"
    if position > state.position or answer.epoch > state.epoch:
        return "wrong"
    kept = max((one.position for one in (*state.arrived, *state.merging) if one.site == site), default=-1)
    if position <= max(kept, state.taken.get(site, -1)) or site in state.failed:
        return "again"
    if position == state.position and site in state.spoiled:
        return "again"
    current = position == state.position and not state.merging
    late = answer.epoch < state.epoch or not (current or (state.rule == "buffer" and state.stages[position] == "train"))
    return "late" if late else "wrong"  # what is left is of a version that the stage does not begin from


def spent(state: State, position: int, site: str) -> bool:
    """Tell whether a site's answer to that stage can never be merged any more: it was, or its stage has ended."""
    if state.rule == "buffer":
        return position <= state.taken.get(site, -1)
    return position < state.position
