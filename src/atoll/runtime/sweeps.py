"""Sweeps under way: a thread for each submits its trials as ordinary runs, prunes them, and says which is the best.

All that a search rests on is in the journal: trials with their values, their losses, their ends. A hub that begins anew
folds the same story and goes on as the one before it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from atoll.errors import AtollError, Invalid, Unavailable
from atoll.journal import Entry
from atoll.runtime.conductor import Conductor
from atoll.runtime.state import State
from atoll.runtime.trials import Story, check_reported, outcome, trial_run, view
from atoll.spec.event import Broken, Cancelled, Event, Pruned, Submitted
from atoll.spec.job import Job, TrainJob
from atoll.spec.sweep import Sweep, SweepView, Trial
from atoll.spec.user import User

if TYPE_CHECKING:
    from atoll.runtime.study import Study

_LOOK = 1.0  # seconds after which a thread looks around although nobody called it
_PATIENCE = 600.0  # seconds for which a trial that the hub's disk has no room for is submitted again
log = logging.getLogger(__name__)


class Sweeps:
    """Fed every journal entry in order, after it is folded. ``may_submit`` asks the hub's rules as for any other job;
    ``taken`` tells whether a run has a name or waits for approval under it; ``changed`` tells whoever watches a run."""

    def __init__(
        self,
        conductor: Conductor,
        may_submit: Callable[[User, Job], object],
        taken: Callable[[str], bool],
        changed: Callable[[str], None],
    ) -> None:
        self._conductor, self._may_submit, self._taken, self._changed = conductor, may_submit, taken, changed
        self._stories: dict[str, Story] = {}
        self._drawn: dict[str, tuple[int, str]] = {}  # sweep -> the number and the run's name of its newest trial
        self._news: dict[str, threading.Event] = {}  # of the sweeps that are searched here
        self._threads: list[threading.Thread] = []

    def seen(self, entry: Entry) -> None:
        """Take note of what concerns a sweep or a trial."""
        run = getattr(entry.event, "run", None)
        state = self._conductor.states.get(run or "")
        if state is None:
            return
        sweep = run = state.run
        if state.sweep is not None:
            self._stories.setdefault(run, Story(state.sweep))
        elif state.trial is not None:
            sweep = state.trial.sweep
            self._stories[sweep].learn(state)
            self._changed(sweep)
        if (news := self._news.get(sweep)) is not None:
            news.set()

    def view(self, run: str, sweep: Sweep) -> SweepView:
        """Return a sweep's trials as they are now."""
        return view(sweep, self._trials(run), self._conductor.here)

    def left(self, run: str, words: str) -> tuple[Event, ...]:
        """Return what ends those trials of a sweep that are not over, once it is; nothing for any other run."""
        return tuple(Cancelled(run=one.run, user="hub", words=words) for one in self._trials(run) if not one.over)

    def abandoned(self, state: State) -> bool:
        """Tell whether a run is a trial of a sweep that is over."""
        return state.trial is not None and self._conductor.states[state.trial.sweep].over

    def search(self, run: str) -> None:
        """Go on with a sweep, in a thread of its own, until it is over or the hub closes."""
        self._news[run] = threading.Event()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=self._search, args=(run,), name=f"sweep-{run}", daemon=True))
        self._threads[-1].start()

    def close(self) -> None:
        """Wait for the threads, once the conductor is closing."""
        for news in tuple(self._news.values()):
            news.set()
        for thread in self._threads:
            thread.join(10)

    def _trials(self, run: str) -> list[State]:
        story = self._stories.get(run)
        return [self._conductor.states[name] for name in tuple(story.runs)] if story is not None else []

    def _search(self, run: str) -> None:
        try:
            self._follow(run)
            ends: tuple[Event, ...] = ()
        except AtollError as error:
            ends = (Broken(run=run, site="hub", words=str(error), error=type(error).__name__),)
        except Exception as error:
            # Whatever it is, the sweep must end and say so; the log has the traceback.
            log.exception("sweep %s", run)
            ends = (Broken(run=run, site="hub", words=f"fault in the hub: {error!r}"),)
        if not self._conductor.closing:  # what a closing hub leaves is taken up by the one that resumes the sweep
            self._conductor.post(*ends, *self.left(run, f"its sweep {run} is over"))
        self._news.pop(run, None)
        self._drawn.pop(run, None)

    def _follow(self, run: str) -> None:
        """Learn what happened and do what follows from it, again and again, until the sweep is over."""
        story, news = self._stories[run], self._news[run]
        study, read, since = study_of(story.sweep), 0, None
        while not (self._conductor.closing or self._conductor.states[run].over):
            news.clear()
            facts = story.facts[read:]
            for fact in facts:
                study.learn(fact)
            read += len(facts)
            try:
                if self._act(run, story.sweep, study):
                    continue
                since = None
            except Unavailable:
                since = since or time.monotonic()
                if self._conductor.closing:
                    return
                if time.monotonic() - since > _PATIENCE:
                    raise
            news.wait(_LOOK)

    def _act(self, run: str, sweep: Sweep, study: "Study") -> bool:
        """Do the next thing there is to do for a sweep; False where there is nothing but to wait."""
        trials = self._trials(run)
        check_reported(sweep, trials)
        for number, words in study.doomed.items():
            if not trials[number - 1].over:
                self._conductor.record(Pruned(run=trials[number - 1].run, words=words))
                return True
        under_way = sum(not one.over for one in trials)
        if len(trials) < sweep.trials:
            if under_way == sweep.concurrent:
                return False
            self._submit(self._conductor.states[run], study, len(trials) + 1)
        elif not under_way:
            self._conductor.record(outcome(run, sweep, trials))
        else:
            return False
        return True

    def _submit(self, state: State, study: "Study", number: int) -> None:
        """Submit the next trial. It is planned with the sites that the sweep found, so that all are compared alike."""
        job, parameters = state.job, study.suggest()
        assert isinstance(job, TrainJob)
        try:
            one = job.trial(parameters)
        except ValueError as error:
            raise Invalid(f"trial {number}: {error}") from None
        run = self._name(job, state.run, number)
        self._may_submit(state.asker, one)  # where two people are wanted, they agreed to the sweep
        trial = Trial(sweep=state.run, number=number, parameters=parameters)
        about = {"run": run, "job": one, "code": state.code, "holders": state.holders, "trial": trial}
        try:
            self._conductor.record(Submitted(user=state.user, roles=state.roles, **about), actor=state.user)
        except Invalid:
            if not self._taken(run):
                raise  # otherwise somebody was faster, or this trial is there already: the next look tells

    def _name(self, job: Job, sweep: str, number: int) -> str:
        """Return the name of a trial's run: the one drawn for it, so that a trial which the journal takes late is not
        there twice, unless somebody else has it."""
        known, run = self._drawn.get(sweep, (0, ""))
        if known != number:
            run = trial_run(job, number)
        while self._taken(run) and not self._is_trial(run, sweep):
            run = trial_run(job, number)
        self._drawn[sweep] = (number, run)
        return run

    def _is_trial(self, run: str, sweep: str) -> bool:
        state = self._conductor.states.get(run)
        return state is not None and state.trial is not None and state.trial.sweep == sweep


def study_of(sweep: Sweep) -> "Study":
    """Return a study of nothing yet; raise `Unavailable` where Optuna is not installed."""
    try:
        from atoll.runtime.study import Study
    except ModuleNotFoundError:
        raise Unavailable("sweep: Optuna is not installed here; install it by: pip install 'atoll[sweep]'") from None
    return Study(sweep)
