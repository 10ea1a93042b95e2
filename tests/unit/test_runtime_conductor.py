"""The conductor: one order for all events, one flush for those that wait together, and a full disk loses nobody's."""

import sqlite3
import threading
import time

import pytest

from atoll.errors import Invalid, Unavailable
from atoll.journal import Journal
from atoll.runtime.conductor import Conductor
from atoll.runtime.machine import AssignTo, Dismiss, MakePlan, Merge
from atoll.spec.event import Answer, Answered, Cancelled, Expired, Joined, Lost, Merged, Planned, Result, Submitted
from atoll.spec.job import parse_job
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync

WAIT = 20.0
QUERY = {"kind": "query", "name": "ask", "purpose": "care", "sql": "select count(*) from rows", "dataset": "rows"}
JOB = parse_job(QUERY, "job")


class Counted(Journal):
    """A journal that counts its transactions."""

    appends = 0

    def append(self, *events, actor):
        self.appends += 1
        return super().append(*events, actor=actor)


class House:
    """A conductor whose commands are kept; `hold` keeps its thread in the performing of the next command."""

    def __init__(self, path):
        self.path = path
        self.journal = Counted(path, "hub", patience=0.05)
        self.performed, self.seen = [], []
        self.free = threading.Event()
        self.free.set()
        self.held = threading.Event()
        self.conductor = Conductor(self.journal, self.perform, self.seen.append, retry=0.05)
        self.conductor.start()

    def perform(self, state, command):
        self.performed.append((state, command))
        self.held.set()
        assert self.free.wait(WAIT)

    def hold(self):
        self.free.clear()
        self.held.clear()

    def submit(self, run="run"):
        return self.conductor.record(Submitted(run=run, user="ada", job=JOB), actor="ada")

    def settled(self):
        """Wait until everything posted so far is folded."""
        self.conductor.record(Lost(run="nobody", site="nobody"))

    def commands(self, kind):
        return [(state, command) for state, command in self.performed if isinstance(command, kind)]

    def close(self):
        self.free.set()
        self.conductor.close()
        self.journal.close()


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path / "journal.db")
    yield made
    made.close()


def plan(*sites):
    layouts = {site: Layout() for site in sites}
    return Planned(run="run", plan=Plan(sites=sites, layouts=layouts, sync=Sync(), rounds=0))


def answer(site, position=0):
    return Answered(run="run", answer=Answer(site=site, position=position, epoch=0))


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_recorded_means_journalled_folded_and_seen(house):
    [entry] = house.submit()
    assert (entry.event.kind, entry.actor) == ("run.submitted", "ada")
    assert house.conductor.states["run"].phase == "planning"
    assert [kept.seq for kept in house.journal.entries()] == [kept.seq for kept in house.seen] == [1]
    until(lambda: house.performed)
    assert [command for _, command in house.performed] == [MakePlan()]


def test_events_that_wait_together_are_journalled_in_one_transaction_in_their_order(house):
    house.hold()
    house.submit()
    assert house.held.wait(WAIT)
    before = house.journal.appends
    sites = [f"site-{number}" for number in range(40)]
    for site in sites:
        house.conductor.post(Joined(run="run", site=site), actor="sites")
    house.free.set()
    house.settled()
    assert house.journal.appends - before <= 2  # theirs, and the one that waited for them
    joined = [entry.event.site for entry in house.journal.entries() if isinstance(entry.event, Joined)]
    assert joined == sites


def test_each_who_records_gets_its_own_entries_from_a_shared_transaction(house):
    house.hold()
    house.submit()
    assert house.held.wait(WAIT)
    got = {}

    def record(number):
        events = [Lost(run="run", site=f"{name}{number}") for name in ("a", "b")]
        got[number] = [entry.event.site for entry in house.conductor.record(*events)]

    threads = [threading.Thread(target=record, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    house.free.set()
    for thread in threads:
        thread.join(WAIT)
    assert got == {number: [f"a{number}", f"b{number}"] for number in range(8)}


def test_nothing_begins_under_the_name_of_a_run_that_there_is(house):
    house.submit()
    before = house.conductor.states["run"]
    other = Submitted(run="run", user="eve", job=JOB)
    with pytest.raises(Invalid, match="'run' is the name of another run; choose another"):
        house.conductor.record(Cancelled(run="run", user="eve"), other, actor="eve")
    house.conductor.post(other)
    house.settled()
    assert house.conductor.states["run"] is before, "and nothing of what came with it happened"
    assert [entry.event.kind for entry in house.journal.entries()] == ["run.submitted", "run.lost"]


def test_of_two_runs_of_one_name_that_wait_together_the_first_begins(house):
    house.hold()
    house.submit("before")
    assert house.held.wait(WAIT)
    for user in ("ada", "eve"):
        house.conductor.post(Submitted(run="run", user=user, job=JOB), actor=user)
    house.free.set()
    house.settled()
    assert house.conductor.states["run"].user == "ada"
    assert [entry.event.run for entry in house.journal.entries(kinds=("run.submitted",))] == ["before", "run"]


def test_a_command_is_performed_with_the_state_it_came_out_of(house):
    """What is folded in the same breath may end the run; its earlier commands must not meet a run that is over."""
    house.hold()
    house.submit()
    assert house.held.wait(WAIT)
    joined = [Joined(run="run", site="a"), Joined(run="run", site="b")]
    house.conductor.post(*joined, plan("a", "b"), Cancelled(run="run", user="ada"), actor="one")
    house.free.set()
    until(lambda: house.commands(Dismiss))
    assert [(state.phase, state.work, command.site) for state, command in house.commands(AssignTo)] == [
        ("running", "query", "a"),
        ("running", "query", "b"),
    ]


def test_a_whole_run_is_the_fold_of_its_journal(house, tmp_path):
    house.submit()
    house.conductor.post(Joined(run="run", site="a"), plan("a"))
    house.conductor.record(answer("a"))
    assert len(house.commands(Merge)) <= 1
    house.conductor.record(Merged(run="run", position=0, sites=("a",)))
    state = house.conductor.states["run"]
    assert state.phase == "finished"
    house.close()
    again = House(house.path)
    assert again.conductor.states == {"run": state}
    assert [entry.seq for entry in again.seen] == [1, 2, 3, 4, 5]
    assert again.performed == []  # a run left behind moves on only when it is resumed
    again.close()


def test_an_alarm_comes_true_as_an_event_unless_its_stage_is_over(house):
    house.submit()
    wait = Sync.model_validate({"wait": {"patience": 0.05}})
    made = Plan(sites=("a",), layouts={"a": Layout()}, sync=wait, rounds=0)
    house.conductor.post(Planned(run="run", plan=made))
    until(lambda: house.conductor.states["run"].over)
    assert house.conductor.states["run"].words == "no answer to 'query' from a in 0.05 s (sync.wait.patience)"
    [expired] = [entry for entry in house.seen if isinstance(entry.event, Expired)]
    assert expired.actor == "clock"


def test_of_a_run_that_is_over_only_what_people_are_shown_is_kept(house):
    house.submit()
    house.conductor.post(Joined(run="run", site="a"), plan("a"))
    house.conductor.record(answer("a"))
    result = Result(columns=("n",), rows=((3,),))
    house.conductor.record(Merged(run="run", position=0, sites=("a",), result=result))
    state = house.conductor.states["run"]
    assert (state.phase, state.job, state.result, state.plan.sites) == ("finished", JOB, result, ("a",))
    assert (state.stages, state.live, state.taken, state.arrived, state.merging) == ((), frozenset(), {}, (), ())


def test_what_somebody_was_told_did_not_happen_does_not_happen_later(house):
    house.hold()
    house.submit()
    assert house.held.wait(WAIT)
    with pytest.raises(Unavailable, match=r"did not take an entry in 0\.05 s"):
        house.conductor.record(Cancelled(run="run", user="ada"), timeout=0.05)
    house.free.set()
    house.settled()
    assert house.conductor.states["run"].phase == "planning"
    assert [entry.event.kind for entry in house.seen] == ["run.submitted", "run.lost"]


# --- a journal that fails


def test_while_the_journal_fails_who_waits_is_told_and_what_was_posted_happens_later_in_order(house):
    house.submit()
    house.conductor.record(plan("a", "b"))
    with sqlite3.connect(house.path, isolation_level=None) as other:
        other.execute("begin immediate")  # somebody else keeps the file
        house.conductor.post(Joined(run="run", site="a"), actor="a")
        until(lambda: house.conductor.trouble)
        house.conductor.post(Lost(run="run", site="a"), actor="a")
        house.conductor.post(Joined(run="run", site="b"), actor="b")
        house.conductor.post(Joined(run="run", site="a"), actor="a")
        with pytest.raises(Unavailable, match="another process kept it busy"):
            house.conductor.record(Cancelled(run="run", user="ada"))
        assert house.conductor.states["run"].live == frozenset()  # nothing is folded that is not journalled
        other.execute("rollback")
    other.close()
    until(lambda: house.conductor.states["run"].live)
    house.settled()
    state = house.conductor.states["run"]
    assert (state.phase, state.live) == ("running", {"a", "b"})
    told = [(entry.actor, entry.event.kind, entry.event.site) for entry in house.seen[2:-1]]
    assert told == [
        ("a", "run.joined", "a"),
        ("a", "run.lost", "a"),
        ("b", "run.joined", "b"),
        ("a", "run.joined", "a"),
    ]
    assert house.conductor.trouble is None
    assert house.journal.verify().intact


def test_what_was_posted_before_closing_is_journalled_and_nothing_of_it_performed(house):
    house.hold()
    house.submit()
    assert house.held.wait(WAIT)
    house.conductor.closing = True
    house.conductor.post(Joined(run="run", site="a"), plan("a"))
    house.close()
    with Journal(house.path, "hub", read_only=True) as journal:
        assert [entry.event.kind for entry in journal.entries()] == ["run.submitted", "run.joined", "run.planned"]
    assert house.commands(AssignTo) == []


def test_after_closing_nothing_is_recorded(house):
    house.submit()
    house.conductor.close()
    with pytest.raises(Unavailable, match="the hub is closing"):
        house.conductor.record(Cancelled(run="run", user="ada"))
