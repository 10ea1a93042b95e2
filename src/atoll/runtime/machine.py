"""A run as a pure state machine: (state, event) -> (state, commands). No clock, no I/O, no tensors.

A run is a row of stages: measure, initialise, train (once per round), evaluate, publish for a training job; one
stage for the others. A stage hands each of its sites the same assignment, gathers answers until the plan's `wait`
is satisfied (`atoll.runtime.waits`), and is merged; the merge opens the next stage. Whoever performs the commands must
journal an event before folding it here, so that folding the journal again gives this very state after a crash.
"""

from dataclasses import dataclass, replace

from atoll.runtime import waits
from atoll.runtime.state import Phase, State, expects, spent, spooled, stages
from atoll.spec.event import (
    Answer,
    Answered,
    Barred,
    Broken,
    Cancelled,
    Expired,
    Joined,
    Lost,
    Merged,
    Outdone,
    Planned,
    Pruned,
    Published,
    Refused,
    Rejected,
    Restarted,
    RunEvent,
    Submitted,
    Swept,
)


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Ask the sites' policies, measure, choose; ends in Planned, Refused or Broken."""


@dataclass(frozen=True, slots=True)
class Search:
    """Have a sweep's trials run, until it is over; ends in Swept or Broken."""


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


Command = MakePlan | Search | AssignTo | Merge | Publish | Alarm | Dismiss
Next = tuple[State, list[Command]]


def begin(event: Submitted) -> Next:
    """Return the state a submitted job starts in."""
    state = State(run=event.run, job=event.job, user=event.user, roles=event.roles, code=event.code)
    state = replace(state, holders=event.holders)
    if state.sweep is not None:
        return replace(state, phase="running"), [Search()]
    return replace(state, trial=event.trial), [MakePlan()]


def step(state: State, event: RunEvent) -> Next:  # noqa: C901, PLR0911, PLR0912 - one arm for each event
    """Fold one event. Events of a run that is over, or that come too late, change nothing."""
    if state.over:
        return state, []
    if state.sweep is not None:
        return _search(state, event)
    match event:
        case Planned():
            return _planned(state, event)
        case Joined():
            return _joined(state, event.site)
        case Lost():
            return _settle(replace(state, live=state.live - {event.site}))
        case Barred():
            return _barred(state, event)
        case Answered():
            return _answered(state, event.answers)
        case Rejected():
            return _rejected(state, event)
        case Merged():
            return _merged(state, event)
        case Expired():
            return _expired(state, event)
        case Restarted():
            return _restarted(state, event)
        case Refused():
            return _refused(state, event)
        case Broken():
            return _broken(state, event)
        case Cancelled():
            return _cancelled(state, event)
        case Pruned():
            return _end(replace(state, pruned=True), "cancelled", event.words)
        case Outdone():
            return _end(state, "finished", event.words)
        case Published():
            result = state.result.model_copy(update={"model": event.model.reference})
            return _end(replace(state, result=result), "finished", "")
        case Submitted() | Swept():
            return state, []


def _search(state: State, event: RunEvent) -> Next:
    match event:
        case Restarted():
            return replace(state, epoch=state.epoch + 1), [Search()]
        case Swept():
            return _end(replace(state, result=event.result), "finished", event.words)
        case Broken():
            return _fail(state, event)
        case Cancelled():
            return _cancelled(state, event)
        case _:
            return state, []


def _planned(state: State, event: Planned) -> Next:
    if state.phase != "planning":
        return state, []
    plan = event.plan
    row = stages(state.job, plan)
    return _open(replace(state, phase="running", plan=plan, fleet=event.fleet, stages=row))


def _open(state: State) -> Next:
    """Enter the current stage: assignments to the sites that are there, and the stage's alarms."""
    assert state.plan is not None
    if state.work == "publish":
        return state, [Publish()]
    if state.work == "initialise":
        state = replace(state, asked=waits.initialisers(state.plan, state.gone)[:1])
    if not state.members:  # every evaluator has refused since: the model goes out without metrics
        return _open(replace(state, position=state.position + 1, lapsed=False))
    commands: list[Command] = [AssignTo(site) for site in state.members if site in state.live and state.idle(site)]
    return state, commands + _alarms(state)


def _alarms(state: State) -> list[Command]:
    assert state.plan is not None
    wait = state.plan.sync.wait
    alarms: list[Command] = [Alarm(state.position, wait.patience, final=True)]
    if state.rule == "quorum":
        alarms.append(Alarm(state.position, wait.deadline, final=False))
    return alarms


def _joined(state: State, site: str) -> Next:
    state = replace(state, live=state.live | {site})
    if site in state.members:
        # What is being merged takes no more answers, and the next stage asks this site too. Only a buffer does.
        useful = state.idle(site) and site not in state.spoiled | state.failed
        useful = useful and (not state.merging or state.rule == "buffer")
        return state, [AssignTo(site)] if useful else []
    if state.work == "initialise" and (state.lapsed or not state.members) and not state.merging:
        return _ask_another(state)
    return state, []


def _ask_another(state: State) -> Next:
    """Ask one more site that is there for the first weights. While there is none, the next one that joins is asked."""
    assert state.plan is not None
    for site in waits.initialisers(state.plan, state.gone):
        if site in state.live and site not in state.asked:
            alarms = _alarms(state)[1:] if state.lapsed else []  # it has a deadline of its own
            return replace(state, asked=(*state.asked, site), lapsed=False), [AssignTo(site), *alarms]
    return state, []


def _answered(state: State, answers: tuple[Answer, ...]) -> Next:
    """Take an answer, or all those of one update together: no merge ever sees a part of a relay's sum."""
    if not all(expects(state, answer) for answer in answers):
        return state, []
    return _settle(replace(state, arrived=(*state.arrived, *answers)))


def _rejected(state: State, event: Rejected) -> Next:
    """Ask the site again, unless the stage can go on without it: then the site is given the next one like the others.

    How often it is asked again is bounded from outside: who brings nothing but such answers is barred.
    """
    site = event.site
    if event.late or event.epoch < state.epoch or site not in state.members or not state.idle(site):
        return state, []
    if site in state.failed:
        return state, []
    if state.rule == "buffer":  # no round is anybody's own: it begins again from the newest version
        return state, [AssignTo(site)] if site in state.live else []
    if event.position < state.position or state.merging:  # the site has other work by now
        return state, []
    state = replace(state, spoiled=state.spoiled | {site})
    if state.work == "initialise":
        another, commands = _ask_another(state)
        if commands:
            return another, commands
    return _settle(state)


def _barred(state: State, event: Barred) -> Next:
    """Do without a site as if it had been lost, until it joins again; where all are waited for, end the run."""
    if state.phase != "running":
        return state, []
    if state.awaits(event.site):
        return _end(state, "failed", event.words, "Invalid")
    return _settle(replace(state, live=state.live - {event.site}))


def _broken(state: State, event: Broken) -> Next:
    """End the run, unless it was a site that failed, and its stage can go on with others. What a site says of a stage
    that has ended, or of one that it has answered, is nobody's any more."""
    site, position = event.site, event.position
    if position is None or state.phase == "planning" or site not in state.everyone:
        return _fail(state, event)
    if spent(state, position, site):
        return state, []
    if state.rule == "all":
        return _fail(state, event)
    if site not in state.members or site in state.failed or not state.idle(site):
        return state, []
    failed = {site: event.words, **state.result.failed}
    state = replace(state, failures=(*state.failures, event), spoiled=state.spoiled - {site})
    return _without(replace(state, result=state.result.model_copy(update={"failed": failed})), site)


def _without(state: State, site: str) -> Next:
    """Go on without a site that has just failed. A mistake of the user's fails everywhere: then too few are left, and
    the run ends in the words of the first."""
    plan = state.plan
    assert plan is not None
    if state.work == "initialise":  # others may make the first weights, and this one may still train
        state = replace(state, declined=state.declined | {site})
        if state.merging:
            return state, []
        if waits.initialisers(plan, state.gone | state.declined):
            return _ask_another(state)
    elif state.merging or waits.suffice(plan, state.work, state.sound):
        return _settle(state)
    return _fail(state, state.failures[0])


def _fail(state: State, event: Broken) -> Next:
    told = event.site == "hub" or event.words.startswith(event.site)  # the words name a site by themselves
    return _end(state, "failed", event.words if told else f"{event.site}: {event.words}", event.error)


def _settle(state: State) -> Next:
    """Merge when enough answers are in; otherwise keep waiting, also for those that the stage cannot do without."""
    if state.merging or not (state.arrived or state.spoiled):
        return state, []
    assert state.plan is not None
    members = state.members
    if state.spoiled and not waits.dispensable(state.plan, state.work, len(members), state.able):
        again = [AssignTo(site) for site in members if site in state.spoiled & state.live]
        return replace(state, spoiled=frozenset()), [*again]
    if len(state.arrived) < waits.needed(state.plan, state.work, state.sound - len(state.spoiled), state.lapsed):
        return state, []
    # Sorted by plan order, so that what is merged never depends on who was first.
    answers = tuple(sorted(state.arrived, key=lambda answer: members.index(answer.site)))
    return replace(state, arrived=(), merging=answers), [Merge(answers)]


def _merged(state: State, event: Merged) -> Next:
    if event.position != state.position or not state.merging:
        return state, []
    trained, failed = state.work == "train", state.failed
    result = event.result.model_copy(update={"failed": state.result.failed}) if event.result else state.result
    state = replace(
        state,
        position=state.position + 1,
        version=state.version + (1 if trained else 0),
        merging=(),
        seen=state.seen | {a.site for a in state.merging} if state.work in ("measure", "train") else state.seen,
        taken=state.taken | {one.site: one.position for one in state.merging},
        sums=state.sums | {relay: one.position for one in state.merging for relay in one.via},
        steps=state.steps | {one.site: state.steps.get(one.site, 0) + one.steps for one in state.merging},
        lapsed=False,
        spoiled=frozenset(),
        failures=(),
        weights=event.weights or state.weights,
        outer=event.outer or state.outer,
        signature=event.signature or state.signature,
        statistics=event.statistics or state.statistics,
        losses=(*state.losses, event.loss) if trained and event.loss is not None else state.losses,
        result=result,
    )
    if state.position == len(state.stages):
        return _end(state, "finished", "")
    if not trained or state.rule != "buffer":
        return _open(replace(state, arrived=()))
    # Asynchronous: whoever was merged, or failed, starts from the new version; the others are at work on an older one.
    back = [site for site in state.members if site in failed.union(event.sites) & state.live]
    state, settled = _settle(state)
    return state, [*(AssignTo(site) for site in back), *_alarms(state), *settled]


def _expired(state: State, event: Expired) -> Next:
    if event.position != state.position or state.work in (None, "publish") or state.merging:
        return state, []
    plan = state.plan
    assert plan is not None
    state, commands = _settle(replace(state, lapsed=True))
    if state.merging or (commands and not event.final):  # also at the end of its patience it takes what is enough
        return state, commands
    if not event.final:
        return _ask_another(state) if state.work == "initialise" else (state, [])
    awaited = [site for site in state.silent if site not in state.failed]
    silent = ", ".join(awaited or waits.initialisers(plan, state.gone | state.declined))
    patience = f"{plan.sync.wait.patience:g}"
    words = f"no answer to '{state.work}' from {silent} in {patience} s (sync.wait.patience)"
    return _end(state, "failed", "; ".join((words, *(event.words for event in state.failures[:1]))), "Unavailable")


def _restarted(state: State, event: Restarted) -> Next:
    """Go on after the hub died: a higher epoch, nobody connected yet, and the answers that are still at hand."""
    at_hand = set(state.members) - set(event.missing)
    kept = tuple(answer for answer in (*state.merging, *state.arrived) if answer.site in at_hand)
    kept = tuple(answer.model_copy(update={"epoch": state.epoch + 1}) for answer in kept)
    state = replace(state, epoch=state.epoch + 1, live=frozenset(), arrived=kept, merging=())
    state = replace(state, lapsed=False, spoiled=frozenset())
    if state.phase == "planning":
        return state, [MakePlan()]
    if state.work == "publish" or (state.work == "evaluate" and not state.members):
        return _open(state)
    settled, commands = _settle(state)
    return settled, commands + _alarms(settled)


def _refused(state: State, event: Refused) -> Next:
    words = event.words
    if state.phase == "planning":
        return _end(state, "failed", words, "Denied")
    if event.site not in state.members:
        return state, []
    assert state.plan is not None
    # What it answered before it refused is not merged either, unless that is under way; a relay that made one update of
    # it and of others is to make another.
    void = {spooled(answer) for answer in state.arrived if answer.site == event.site}
    kept = tuple(answer for answer in state.arrived if spooled(answer) not in void)
    left = replace(state, arrived=kept, spoiled=state.spoiled - {event.site})
    if state.work == "initialise":  # who gives no weights out may still train
        left = replace(left, declined=state.declined | {event.site})
        if not waits.initialisers(state.plan, left.gone | left.declined):
            return _end(state, "failed", words, "Denied")
        return (left, []) if left.merging else _ask_another(left)
    left = replace(left, gone=state.gone | {event.site})
    if waits.suffice(state.plan, state.work, left.sound):
        others = (one.site for one in state.arrived if spooled(one) in void and one.site != event.site)
        again = [AssignTo(site) for site in others if site in left.live]
        left, commands = _settle(left)
        return left, commands if left.merging else [*again, *commands]
    if state.work == "evaluate" and state.rule != "all" and not left.members and state.position + 1 < len(state.stages):
        return (left, []) if left.merging else _open(left)  # nobody is left to evaluate: it goes out without metrics
    return _end(state, "failed", words, "Denied")


def _cancelled(state: State, event: Cancelled) -> Next:
    return _end(state, "cancelled", event.words or f"cancelled by {event.user}")


def _end(state: State, phase: Phase, words: str, error: str = "") -> Next:
    state = replace(state, phase=phase, words=words, error=error, arrived=(), merging=())
    return state, [Dismiss(words or "the run is over")]
