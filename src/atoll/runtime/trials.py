"""What the trials of a sweep come to: which of them is the best, what each has to tell, and how all of it is shown."""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from atoll.errors import Invalid
from atoll.runtime.state import State
from atoll.spec.document import near_miss
from atoll.spec.event import Broken, Swept
from atoll.spec.job import Job
from atoll.spec.sweep import Parameters, Sweep, SweepView, Trial, TrialView


@dataclass(frozen=True, slots=True)
class Began:
    """A trial was submitted."""

    number: int
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Told:
    """A round of a trial was merged; after the last one nothing is left to save."""

    number: int
    round: int
    loss: float
    last: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial is over. Without a value it was pruned, or counts as failed."""

    number: int
    value: float | None
    pruned: bool


Fact = Began | Told | Ended


@dataclass(slots=True)
class Story:
    """What happened in one sweep, in the order of the journal: whoever folds it again knows what was known then."""

    sweep: Sweep
    runs: list[str] = field(default_factory=list[str])  # of its trials, in the order of their numbers
    facts: list[Fact] = field(default_factory=list[Fact])
    _told: dict[str, int] = field(default_factory=dict[str, int])  # trial's run -> losses told
    _over: set[str] = field(default_factory=set[str])

    def learn(self, state: State) -> None:
        """Take in what is new of a trial's run."""
        trial, run = state.trial, state.run
        assert trial is not None
        if run not in self._told:
            self.runs.append(run)
            self._told[run] = 0
            self.facts.append(Began(trial.number, trial.parameters))
        if len(state.losses) > self._told[run]:
            self._told[run] = len(state.losses)
            last = state.plan is not None and state.version == state.plan.rounds
            self.facts.append(Told(trial.number, state.version, state.losses[-1], last))
        if state.over and run not in self._over:
            self._over.add(run)
            self.facts.append(Ended(trial.number, objective(self.sweep, state), state.pruned))


def trial_run(job: Job, number: int) -> str:
    """Return a new name for a trial's run. Nobody can tell it beforehand, and so take it."""
    return f"{job.name[:46]}-t{number:03}-{secrets.token_hex(4)}"


def objective(sweep: Sweep, state: State) -> float | None:
    """Return what a finished trial is compared by; None where it has not finished or does not report it."""
    if state.phase != "finished":
        return None
    return _reported(sweep, state)


def _reported(sweep: Sweep, state: State) -> float | None:
    found = state.result.metrics.get(sweep.objective)
    return state.losses[-1] if found is None and sweep.objective == "loss" and state.losses else found


def best(sweep: Sweep, trials: Iterable[State]) -> State | None:
    """Return the finished trial with the best objective, of equal ones the first by number."""
    known = [(value, state) for state in trials if (value := objective(sweep, state)) is not None]
    sign = 1 if sweep.direction == "minimise" else -1
    return min(known, key=lambda one: (sign * one[0], _number(one[1])))[1] if known else None


def outdone(state: State, states: Mapping[str, State]) -> str:
    """Say why nothing of a trial that has come to its end is registered; "" where it is the best so far, or no trial.

    So the newest version of the model is the best that there is, also where the sweep goes no further.
    """
    sweep = states[state.trial.sweep].sweep if state.trial is not None else None
    if state.trial is None or sweep is None:
        return ""
    value = _reported(sweep, state)
    if value is None:
        return "not registered: " + _unreported(sweep, state)
    others = [one for one in tuple(states.values()) if one.trial is not None and one.trial.sweep == state.trial.sweep]
    first = best(sweep, others)
    mark = objective(sweep, first) if first is not None else None
    if first is None or mark is None or (value < mark if sweep.direction == "minimise" else value > mark):
        return ""
    return f"not registered: {sweep.objective} {value:.4g}, and trial {_number(first)} has {mark:.4g}"


def _unreported(sweep: Sweep, state: State) -> str:
    known = list(state.result.metrics)
    near = near_miss(sweep.objective, known) if known else "; it reports no metric, so use loss"
    return f"sweep.objective: {sweep.objective!r} is not among what the task reports{near}"


def check_reported(sweep: Sweep, trials: Iterable[State]) -> None:
    """Raise `Invalid` where a trial has finished without the objective: no other one will have it."""
    for state in trials:
        if state.phase == "finished" and objective(sweep, state) is None:
            raise Invalid(_unreported(sweep, state))


def outcome(run: str, sweep: Sweep, trials: list[State]) -> Swept | Broken:
    """Return how a sweep ends whose trials are all over."""
    first = best(sweep, trials)
    counts = {"pruned": sum(one.pruned for one in trials), "failed": sum(one.phase == "failed" for one in trials)}
    counts["cancelled"] = sum(one.phase == "cancelled" and not one.pruned for one in trials)
    others = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if first is None or first.trial is None:
        failed = next((one for one in trials if one.phase == "failed"), None)
        why = f"; the first that failed is {failed.run}: {failed.words}" if failed is not None else ""
        words = f"none of {len(trials)} trials finished ({others}){why}"
        return Broken(run=run, site="hub", words=words, error=failed.error if failed is not None else "AtollError")
    value = objective(sweep, first)
    words = f"trial {first.trial.number} of {len(trials)} is the best ({first.run}): {sweep.objective} {value:.4g}"
    words += f" with {in_words(first.trial.parameters)}" + (f"; {others}" if others else "")
    return Swept(run=run, result=first.result, words=words)


def in_words(parameters: Parameters) -> str:
    """Return a trial's values in one line."""
    shown = {path: f"{value:.4g}" if isinstance(value, float) else _json(value) for path, value in parameters.items()}
    return ", ".join(f"{path}={value}" for path, value in shown.items())


def view(sweep: Sweep, trials: list[State], here: Iterable[str]) -> SweepView:
    """Return a sweep as it is now; ``here``: the runs that this hub conducts."""
    first, conducted = best(sweep, trials), set(here)
    return SweepView(
        objective=sweep.objective,
        direction=sweep.direction,
        asked=sweep.trials,
        trials=tuple(_shown(sweep, state, state.trial, state.run in conducted) for state in trials if state.trial),
        best=_number(first) if first is not None else None,
    )


def _shown(sweep: Sweep, state: State, trial: Trial, here: bool) -> TrialView:
    shown = "pruned" if state.pruned else state.phase if state.over or here else "interrupted"
    return TrialView(
        number=trial.number,
        run=state.run,
        parameters=trial.parameters,
        state=shown,
        round=state.version,
        rounds=state.plan.rounds if state.plan else 0,
        loss=state.losses[-1] if state.losses else None,
        objective=objective(sweep, state),
        model=state.result.model,
        words=state.words,
    )


def _number(state: State) -> int:
    assert state.trial is not None
    return state.trial.number


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
