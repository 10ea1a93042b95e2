"""A sweep's study: Optuna's sampler says what to try next, its pruner which trial is not worth more rounds.

Imported once a sweep is there, and nowhere else: a hub without one needs no Optuna.
"""

import hashlib

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from pydantic import JsonValue

from atoll.runtime.trials import Began, Ended, Fact, Told
from atoll.spec.document import canonical
from atoll.spec.sweep import Choice, Parameters, Range, Sweep

_SHARES = {2: "half", 3: "third", 4: "quarter"}


class Study:
    """A fold of what happened, in memory: the same facts in the same order make the same study, and so the same next
    suggestion, in whichever process. Optuna's part is told losses, so it always minimises."""

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._sweep = sweep
        self._grid = sweep.sampler == "grid"
        self._spaces = {path: _space(one, self._grid) for path, one in sweep.parameters.items()}
        self._study = optuna.create_study(sampler=RandomSampler(seed=0), pruner=_pruner(sweep))
        self._trials: dict[int, optuna.Trial] = {}
        self.doomed: dict[int, str] = {}  # trials under way that are to end -> why

    def learn(self, fact: Fact) -> None:
        """Take in what happened next."""
        match fact:
            case Began():
                self._study.enqueue_trial({path: self._index(path, value) for path, value in fact.parameters.items()})
                self._trials[fact.number] = self._study.ask(self._spaces)
            case Told():
                trial = self._trials[fact.number]
                trial.report(fact.loss, fact.round)
                if trial.should_prune() and not fact.last and fact.number not in self.doomed:
                    self.doomed[fact.number] = self._verdict(fact)
            case Ended():
                self.doomed.pop(fact.number, None)
                trial, value = self._trials[fact.number], fact.value
                if value is None:
                    self._study.tell(trial, state=TrialState.PRUNED if fact.pruned else TrialState.FAIL)
                else:
                    self._study.tell(trial, value if self._sweep.direction == "minimise" else -value)

    def suggest(self) -> Parameters:
        """Return the values of the next trial. It changes nothing: a trial is there once it began."""
        trials = self._study.get_trials(deepcopy=False)
        study = optuna.create_study(sampler=self._sampler(len(trials)))
        study.add_trials(trials)
        drawn: Parameters = study.ask(self._spaces).params
        return {path: self._value(path, value) for path, value in drawn.items()}

    def _sampler(self, number: int) -> BaseSampler:
        sweep = self._sweep
        match sweep.sampler:
            case "grid":  # all of its points in one order, which the seed draws; each number has its own
                points = {path: list(range(len(one.points or ()))) for path, one in sweep.parameters.items()}
                return GridSampler(points, seed=sweep.seed)
            case "random":
                return RandomSampler(seed=_seed(sweep, number))
            case "tpe":
                return TPESampler(seed=_seed(sweep, number))

    def _verdict(self, fact: Told) -> str:
        factor = self._sweep.pruner.factor
        share = _SHARES.get(factor, f"{factor}th")
        return f"pruned at round {fact.round}: loss {fact.loss:.4g}, above the best {share} of those that came so far"

    def _index(self, path: str, value: object) -> object:
        """Return a value as Optuna knows it: what is chosen, or a point of a grid, by its place; it may be a table."""
        points = self._points(path)
        return value if points is None else [canonical(point) for point in points].index(canonical(value))

    def _value(self, path: str, drawn: JsonValue) -> JsonValue:
        points = self._points(path)
        if points is None:
            return drawn
        assert isinstance(drawn, int)
        return points[drawn]

    def _points(self, path: str) -> tuple[JsonValue, ...] | None:
        one = self._sweep.parameters[path]
        return one.points if self._grid or isinstance(one, Choice) else None


def _space(one: Choice | Range, grid: bool) -> BaseDistribution:
    if isinstance(one, Choice) or grid:
        return CategoricalDistribution(tuple(range(len(one.points or ()))))
    if one.integer:
        return IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(one.low, one.high, log=one.log, step=one.step)


def _pruner(sweep: Sweep) -> BasePruner:
    pruner = sweep.pruner
    if pruner.kind == "none":
        return NopPruner()
    return SuccessiveHalvingPruner(min_resource=pruner.min_rounds, reduction_factor=pruner.factor)


def _seed(sweep: Sweep, number: int) -> int:
    """Return the seed of one suggestion, so that a hub which begins anew goes on as the one before it would have."""
    return int.from_bytes(hashlib.sha256(f"{sweep.seed} {number}".encode()).digest()[:4])
