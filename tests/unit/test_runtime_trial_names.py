"""What a sweep's trials are called: nobody tells it beforehand, and whoever has such a name keeps it."""

from itertools import pairwise

import pytest

from atoll.errors import Unavailable
from atoll.journal import Journal
from atoll.runtime.conductor import Conductor
from atoll.runtime.machine import Search
from atoll.runtime.sweeps import Sweeps
from atoll.spec.event import Cancelled, Submitted
from tests.unit.places import eventually
from tests.unit.runs import query_job
from tests.unit.test_runtime_sweeps import job


class Late(Conductor):
    """A conductor that says it had no time for the first trial, and takes it all the same."""

    late = False

    def record(self, *events, **more):
        if self.late or getattr(events[0], "trial", None) is None:
            return super().record(*events, **more)
        self.late = True
        self.post(*events)
        assert eventually(lambda: events[0].run in self.states)
        raise Unavailable("the hub's journal did not take an entry")


class Searching:
    """Sweeps over a conductor that plans nothing: each trial waits where it began. `asked` are the names that were
    looked at, the oldest first; what is to happen at a look, before a trial or before its story, a test sets."""

    def __init__(self, path, conductor=Conductor):
        self.journal = Journal(path, "hub")
        self.asked, self.at_look, self.at_ask = [], lambda run: False, lambda job: None
        self.at_seen = lambda event: None
        self.conductor = conductor(self.journal, self._perform, self._seen)
        self.sweeps = Sweeps(self.conductor, lambda user, job: self.at_ask(job), self._taken, lambda run: None)
        self.conductor.start()

    def _perform(self, state, command):
        if isinstance(command, Search):
            self.sweeps.search(state.run)

    def _seen(self, entry):
        self.at_seen(entry.event)
        self.sweeps.seen(entry)

    def _taken(self, run):
        self.asked.append(run)
        return run in self.conductor.states or self.at_look(run)

    def search(self, run="sweep", **fields):
        """Begin a sweep and return its trials once all that may be under way at a time are there."""
        self.conductor.record(Submitted(run=run, user="ada", job=job(trials=3, concurrent=2, **fields)))
        assert eventually(lambda: len(self.trials(run)) == 2)
        return self.trials(run)

    def trials(self, run="sweep"):
        return [one for one in list(self.conductor.states.values()) if one.trial is not None and one.trial.sweep == run]

    def take(self, run):
        """Have another user's run begin under this name."""
        self.conductor.record(Submitted(run=run, user="eve", job=query_job()))

    def close(self):
        for run, state in list(self.conductor.states.items()):
            if state.sweep is not None and not state.over:
                self.conductor.record(Cancelled(run=run, user="ada"))
        self.conductor.close()
        self.sweeps.close()
        self.journal.close()


@pytest.fixture
def conductor():
    return Conductor


@pytest.fixture
def searching(tmp_path, conductor):
    pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'atoll[sweep]'")
    made = Searching(tmp_path / "journal.db", conductor)
    yield made
    made.close()


def test_a_name_that_somebody_has_or_waits_for_stays_theirs_and_the_sweep_goes_on(searching):
    searching.at_look = lambda run: run == searching.asked[0]  # a request for it waits for approval
    trials = searching.search()
    assert [one.trial.number for one in trials] == [1, 2]
    assert searching.asked[0] not in searching.conductor.states
    assert not searching.conductor.states["sweep"].over


def test_who_takes_the_name_between_a_look_and_the_trial_does_not_end_the_sweep(searching):
    def at_ask(job):
        if len(searching.asked) == 1:
            searching.take(searching.asked[0])

    searching.at_ask = at_ask
    trials = searching.search()
    assert searching.conductor.states[searching.asked[0]].user == "eve"
    assert [(one.trial.number, one.user) for one in trials] == [(1, "ada"), (2, "ada")]
    assert not searching.conductor.states["sweep"].over


@pytest.mark.parametrize("conductor", [Late])
def test_a_trial_that_the_journal_takes_late_is_there_once(searching):
    def at_seen(event):
        if isinstance(event, Submitted) and event.trial is not None and event.trial.number == 1:
            assert eventually(lambda: len(searching.asked) > 1), "the sweep tries again before its story has the trial"

    searching.at_seen = at_seen
    assert [one.trial.number for one in searching.search()] == [1, 2]
    assert searching.conductor.late


def test_no_two_sweeps_call_their_trials_alike(searching):
    names = [{one.run for one in searching.search(run)} for run in ("a", "b", "c")]
    assert all(not one & other for one, other in pairwise(names))
    assert all(name.startswith(("job-t001-", "job-t002-")) for one in names for name in one)
