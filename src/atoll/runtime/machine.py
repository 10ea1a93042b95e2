"""A run as a pure state machine: (state, event) -> (state, commands). No clock, no I/O, no tensors.

A run is a row of stages: measure, initialise, train (once per round), evaluate, publish for a training job; one
stage for the others. A stage hands each of its sites the same assignment, gathers answers until the plan's `wait`
is satisfied, and is merged; the merge opens the next stage. Whoever performs the commands must journal an event
before folding it here, so that folding the journal again gives this very state after a crash.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from atoll.spec.event import (
    Answer,
    Answered,
    Broken,
    Cancelled,
    Expired,
    Joined,
    Lost,
    Merged,
    Planned,
    Published,
    Refused,
    Restarted,
    Result,
    RunEvent,
    Submitted,
    Work,
)
from atoll.spec.job import Job, TrainJob
from atoll.spec.model import Moments, Signature
from atoll.spec.plan import Plan, Wait

Phase = Literal["planning", "running", "finished", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class State:
    """Everything the conductor needs to go on with a run; a value."""

    run: str
    job: Job
    user: str
    code: str | None = None
    phase: Phase = "planning"
    plan: Plan | None = None
    stages: tuple[Work, ...] = ()
    position: int = 0
    epoch: int = 0
    version: int = 0  # train rounds merged
    live: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()  # refused: they take no further part
    arrived: tuple[Answer, ...] = ()
    merging: tuple[Answer, ...] = ()
    taken: dict[str, int] = field(default_factory=dict[str, int])  # site -> the newest stage merged with its answer
    lapsed: bool = False  # the round's deadline has passed
    weights: str | None = None
    outer: str | None = None
    signature: Signature = ()
    statistics: dict[str, Moments] = field(default_factory=dict[str, Moments])
    losses: tuple[float, ...] = ()
    result: Result = field(default_factory=Result)
    words: str = ""
    error: str = ""

    @property
    def work(self) -> Work | None:
        """The current stage's work, while there is one."""
        return self.stages[self.position] if self.phase == "running" else None

    @property
    def over(self) -> bool:
        return self.phase in ("finished", "failed", "cancelled")

    @property
    def members(self) -> tuple[str, ...]:
        """The sites whose answers the current stage needs, in plan order."""
        return _members(self, self.work)


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Ask the sites' policies, measure, choose; ends in Planned, Refused or Broken."""


@dataclass(frozen=True, slots=True)
class AssignTo:
    """Give `site` the current stage's work."""

    site: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Combine these answers; ends in Merged or Broken."""

    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Register the run's model; ends in Published or Broken."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Say Expired(position, final) in so many seconds, unless the stage has ended by then."""

    position: int
    seconds: float
    final: bool


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Tell the run's sites that it is over."""

    words: str


Command = MakePlan | AssignTo | Merge | Publish | Alarm | Dismiss
Next = tuple[State, list[Command]]


def begin(event: Submitted) -> Next:
    """Return the state a submitted job starts in."""
    return State(run=event.run, job=event.job, user=event.user, code=event.code), [MakePlan()]


def step(state: State, event: RunEvent) -> Next:  # noqa: C901, PLR0911, PLR0912 - one arm for each event
    """Fold one event. Events of a run that is over, or that come too late, change nothing."""
    if state.over:
        return state, []
    match event:
        case Planned():
            return _planned(state, event.plan)
        case Joined():
            return _joined(state, event.site)
        case Lost():
            return replace(state, live=state.live - {event.site}), []
        case Answered():
            return _answered(state, event.answer)
        case Merged():
            return _merged(state, event)
        case Expired():
            return _expired(state, event)
        case Restarted():
            return _restarted(state, event)
        case Refused():
            return _refused(state, event)
        case Broken():
            told = event.site == "hub" or event.words.startswith(event.site)  # the words name a site by themselves
            words = event.words if told else f"{event.site}: {event.words}"
            return _end(state, "failed", words, event.error)
        case Cancelled():
            return _end(state, "cancelled", f"cancelled by {event.user}")
        case Published():
            result = state.result.model_copy(update={"model": event.model.reference})
            return _end(replace(state, result=result), "finished", "")
        case Submitted():
            return state, []


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


def _members(state: State, work: Work | None) -> tuple[str, ...]:
    if state.plan is None or work is None or work == "publish":
        return ()
    if work == "initialise":
        return (state.plan.initialiser or state.plan.sites[0],)
    names = state.plan.evaluators if work == "evaluate" else state.plan.sites
    return tuple(name for name in names if name not in state.gone) if state.gone else names


def _wait(state: State) -> Wait:
    """Return whom this stage waits for. Only training rounds may go on without a site, or run ahead of one."""
    assert state.plan is not None
    wait = state.plan.sync.wait
    return wait if state.work == "train" else Wait(patience=wait.patience)


def _planned(state: State, plan: Plan) -> Next:
    if state.phase != "planning":
        return state, []
    return _open(replace(state, phase="running", plan=plan, stages=stages(state.job, plan)))


def _open(state: State) -> Next:
    """Enter the current stage: assignments to the sites that are there, and the stage's alarms."""
    if state.work == "publish":
        return state, [Publish()]
    if not state.members:  # every evaluator has refused since: the model goes out without metrics
        return _open(replace(state, position=state.position + 1))
    commands: list[Command] = [AssignTo(site) for site in state.members if site in state.live and _idle(state, site)]
    return state, commands + _alarms(state)


def _alarms(state: State) -> list[Command]:
    wait = _wait(state)
    alarms: list[Command] = [Alarm(state.position, wait.patience, final=True)]
    if wait.kind == "quorum":
        alarms.append(Alarm(state.position, wait.deadline, final=False))
    return alarms


def _idle(state: State, site: str) -> bool:
    return all(answer.site != site for answer in (*state.arrived, *state.merging))


def _joined(state: State, site: str) -> Next:
    state = replace(state, live=state.live | {site})
    if site in state.members and _idle(state, site):
        return state, [AssignTo(site)]
    return state, []


def _answered(state: State, answer: Answer) -> Next:
    if not expects(state, answer):
        return state, []
    return _settle(replace(state, arrived=(*state.arrived, answer)))


def expects(state: State, answer: Answer) -> bool:
    """Tell whether an answer counts: of this epoch, from a member that has not answered, and not too late."""
    if state.phase != "running" or answer.epoch != state.epoch or answer.site not in state.members:
        return False
    behind = state.position - answer.position
    if not _idle(state, answer.site) or behind < 0 or answer.version != state.version - behind:
        return False
    if _wait(state).kind == "buffer":  # an answer to an earlier train round is welcome, once, and weighs less
        return state.stages[answer.position] == "train" and answer.position > state.taken.get(answer.site, -1)
    return behind == 0 and not state.merging


def spent(state: State, position: int, site: str) -> bool:
    """Tell whether a site's answer to that stage can never be merged any more: it was, or its stage has ended."""
    if state.phase == "running" and _wait(state).kind == "buffer":
        return position <= state.taken.get(site, -1)
    return position < state.position


def _settle(state: State) -> Next:
    """Merge when enough answers are in; otherwise keep waiting."""
    if state.merging or not state.arrived:
        return state, []
    wait, members = _wait(state), state.members
    needed = len(members)
    if wait.kind == "buffer":
        needed = min(wait.count or 1, len(members))
    elif wait.kind == "quorum" and state.lapsed:
        needed = min(wait.count or needed, needed)
    if len(state.arrived) < needed:
        return state, []
    # Sorted by plan order, so that what is merged never depends on who was first.
    answers = tuple(sorted(state.arrived, key=lambda answer: members.index(answer.site)))
    return replace(state, arrived=(), merging=answers), [Merge(answers)]


def _merged(state: State, event: Merged) -> Next:
    if event.position != state.position or not state.merging:
        return state, []
    trained = state.work == "train"
    state = replace(
        state,
        position=state.position + 1,
        version=state.version + (1 if trained else 0),
        merging=(),
        taken=state.taken | {answer.site: answer.position for answer in state.merging},
        lapsed=False,
        weights=event.weights or state.weights,
        outer=event.outer or state.outer,
        signature=event.signature or state.signature,
        statistics=event.statistics or state.statistics,
        losses=(*state.losses, event.loss) if trained and event.loss is not None else state.losses,
        result=event.result or state.result,
    )
    if state.position == len(state.stages):
        return _end(state, "finished", "")
    if not trained or state.work != "train" or _wait(state).kind != "buffer":
        return _open(replace(state, arrived=()))
    # Asynchronous: whoever was merged starts from the new version; the others are still at work on an older one.
    back = [site for site in state.members if site in event.sites and site in state.live]
    state, settled = _settle(state)
    return state, [*(AssignTo(site) for site in back), *_alarms(state), *settled]


def _expired(state: State, event: Expired) -> Next:
    if event.position != state.position or state.phase != "running" or state.merging:
        return state, []
    if not event.final:
        return _settle(replace(state, lapsed=True))
    answered = {answer.site for answer in state.arrived}
    silent = ", ".join(site for site in state.members if site not in answered)
    patience = f"{_wait(state).patience:g}"
    words = f"no answer to '{state.work}' from {silent} in {patience} s (sync.wait.patience)"
    return _end(state, "failed", words, "Unavailable")


def _restarted(state: State, event: Restarted) -> Next:
    """Go on after the hub died: a higher epoch, nobody connected yet, and the answers that are still at hand."""
    at_hand = set(state.members) - set(event.missing)
    kept = tuple(answer for answer in (*state.merging, *state.arrived) if answer.site in at_hand)
    kept = tuple(answer.model_copy(update={"epoch": state.epoch + 1}) for answer in kept)
    state = replace(state, epoch=state.epoch + 1, live=frozenset(), arrived=kept, merging=(), lapsed=False)
    if state.phase == "planning":
        return state, [MakePlan()]
    if state.work == "publish":
        return state, [Publish()]
    settled, commands = _settle(state)
    return settled, commands + _alarms(settled)


def _refused(state: State, event: Refused) -> Next:
    words = event.words
    if state.phase == "planning":
        return _end(state, "failed", words, "Denied")
    if event.site not in state.members:
        return state, []
    # What it answered before it refused is not merged either, unless that is under way.
    arrived = tuple(answer for answer in state.arrived if answer.site != event.site)
    left = replace(state, gone=state.gone | {event.site}, arrived=arrived)
    wait = _wait(state)
    if wait.kind == "all" or not left.members or len(left.members) < (wait.count or 1):
        return _end(state, "failed", words, "Denied")
    return _settle(left)


def _end(state: State, phase: Phase, words: str, error: str = "") -> Next:
    state = replace(state, phase=phase, words=words, error=error, arrived=(), merging=())
    return state, [Dismiss(words or "the run is over")]
