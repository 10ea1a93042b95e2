"""Presence: however sessions and plans fall together, a run's live sites are those that are here, with their work."""

import itertools

import pytest

from atoll.runtime.machine import AssignTo, MakePlan
from atoll.spec.event import Cancelled, Disconnected, Lost, Planned, Restarted, Submitted
from atoll.spec.message import Assign, Progress, Release
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync
from tests.unit.houses import JOB, House, hello

MOVES = ("open", "hello", "end", "end the one before")
# Where in the life of a plan a site may move: what comes after "gathered" is an ordinary running run.
POINTS = ("planning", "posted", "folded", "gathered")


class Sessions:
    """One site's sessions with a desk, as its channel would open, use and end them."""

    def __init__(self, desk, site, here):
        self.desk, self.site, self.open = desk, site, []
        if here:
            self.move("open")
            self.move("hello")

    def move(self, move):
        match move:
            case "open":
                self.open.append([])
                self.desk.opened(self.site, self.open[-1].append)
            case "hello":  # also one of a session that has ended: whoever listens to it is a thread of its own
                self.desk.heard(self.site, hello(self.site))
            case "end" if self.open:
                self.desk.closed(self.site, self.open.pop().append, "killed")
            case "end the one before" if len(self.open) > 1:
                self.desk.closed(self.site, self.open.pop(0).append, "not heard for 10 s")

    @property
    def assigned(self):
        return bool(self.open) and any(isinstance(message, Assign) for message in self.open[-1])


class Walk(House):
    """Plans each run at once for the site of its name, which moves on the way as its script says."""

    def __init__(self, home):
        super().__init__(home)
        self.sites, self.scripts = {}, {}

    def perform(self, state, command):
        if isinstance(command, MakePlan):
            self.at("planning", state.run)
            plan = Plan(sites=(state.run,), layouts={state.run: Layout()}, sync=Sync(), rounds=1)
            self.conductor.post(Planned(run=state.run, plan=plan))
            self.at("posted", state.run)
        if isinstance(command, AssignTo):
            work = Assign(run=state.run, epoch=0, position=0, work="train", job=JOB, sync=Sync())
            self.desk.presence.send(command.site, work)

    def seen(self, entry):
        if isinstance(entry.event, Planned):
            self.at("folded", entry.event.run)
        super().seen(entry)
        if isinstance(entry.event, Planned):
            self.at("gathered", entry.event.run)

    def at(self, point, run):
        for move in self.scripts[run].get(point, ()):
            self.sites[run].move(move)

    def walk(self, cases):
        for number, (here, script) in enumerate(cases):
            run = f"run-{number}"
            self.scripts[run] = script
            self.sites[run] = Sessions(self.desk, run, here)
        self.conductor.record(*(Submitted(run=run, user="ada", job=JOB) for run in self.scripts))
        for _ in range(6):  # what one breath posts is folded in the next: planned, gathered, joined, assigned
            self.settled()


def scripts(length):
    """Every way to make so many moves in this order, spread over the points."""
    for moves in itertools.product(MOVES, repeat=length):
        for points in itertools.combinations_with_replacement(POINTS, length):
            script = {point: [move for move, at in zip(moves, points, strict=True) if at == point] for point in POINTS}
            yield from ((here, script) for here in (True, False))


@pytest.mark.parametrize("length", [0, 1, 2])
def test_no_interleaving_leaves_a_live_site_without_work_or_believes_in_a_lost_one(tmp_path, length):
    house = Walk(tmp_path)
    cases = list(scripts(length))
    house.walk(cases)
    for number, case in enumerate(cases):
        run = f"run-{number}"
        here = house.desk.presence.here(run)
        assert house.conductor.states[run].live == ({run} if here else set()), case
        assert house.sites[run].assigned or not here, case
        assert house.desk.presence.progress(run)[run].connected == here, case
    house.close()


@pytest.mark.parametrize("away", [("end", "open", "hello"), ("open", "end the one before", "hello")])
def test_a_site_that_leaves_and_returns_around_a_plan_is_given_its_work_wherever_it_does(tmp_path, away):
    house = Walk(tmp_path)
    spread = itertools.combinations_with_replacement(POINTS, 3)
    cases = [
        (True, {point: [move for move, at in zip(away, points, strict=True) if at == point] for point in POINTS})
        for points in spread
    ]
    house.walk(cases)
    assert len(cases) == 20
    assert all(site.assigned for site in house.sites.values())
    assert all(state.live == {run} for run, state in house.conductor.states.items())
    house.close()


def test_a_session_that_takes_the_place_of_an_open_one_ends_it_for_the_runs_too(house):
    house.run()
    waiting = house.desk.questions.expect_probe("plan-1", "bob", None)
    house.desk.opened("bob", [].append)
    house.settled()
    assert house.conductor.states["run"].live == {"ada"}
    assert "began another session" in str(waiting.exception(0))
    kinds = [entry.event for entry in house.journal.entries() if isinstance(entry.event, Lost | Disconnected)]
    assert [(event.kind, event.site) for event in kinds] == [("site.disconnected", "bob"), ("run.lost", "bob")]


def test_the_last_hello_of_a_session_that_has_ended_brings_nobody_back(house):
    house.run()
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    house.desk.heard("bob", hello("bob"))
    house.settled()
    assert not house.desk.presence.here("bob")
    assert house.conductor.states["run"].live == {"ada"}


def test_who_is_asked_after_it_left_is_not_waited_for(house):
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    assert "bob: left" in str(house.desk.questions.expect_probe("plan-1", "bob", None).exception(0))


def test_a_resumed_run_is_told_who_is_here(house):
    house.run()
    house.conductor.record(Restarted(run="run"))
    house.settled()
    assert house.conductor.states["run"].live == {"ada", "bob"}


def test_a_run_of_another_hub_is_told_nothing_until_it_is_resumed(house):
    house.run()
    house.conductor.here.clear()
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    house.connect("bob")
    house.settled()
    assert house.conductor.states["run"].live == {"ada", "bob"}
    assert not [entry for entry in house.journal.entries() if isinstance(entry.event, Lost)]


# --- what sites keep


def releases(house, site):
    return [message.run for message in house.sent[site] if isinstance(message, Release)]


def test_a_site_that_comes_back_is_told_which_of_its_runs_it_can_drop(house):
    for run in ("going", "ended", "others", "left"):
        house.run(run, sites=("ada",) if run == "others" else ("ada", "bob"))
    house.conductor.record(Cancelled(run="ended", user="ada"))
    house.conductor.here.discard("left")  # waits to be resumed
    house.conductor.record(Submitted(run="planning", user="ada", job=JOB))
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    house.connect("bob", runs=("going", "ended", "others", "left", "planning", "unknown"))
    assert releases(house, "bob") == ["ended", "others", "unknown"]


def test_a_site_keeps_what_a_probe_is_waiting_for(house):
    house.desk.questions.expect_probe("plan-1", "bob", None)
    house.desk.heard("bob", hello("bob", runs=("plan-1", "plan-2")))
    assert releases(house, "bob") == ["plan-2"]


# --- what a view shows


def test_a_run_shows_the_sites_of_its_plan_and_not_who_was_only_probed(house):
    house.conductor.record(Submitted(run="run", user="ada", job=JOB))
    for site in ("ada", "mallory"):
        house.desk.heard(site, Progress(run="run", position=0, state="starting"))
    assert sorted(house.desk.presence.progress("run")) == ["ada", "mallory"]
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    plan = Plan(sites=("ada", "bob"), layouts={"ada": Layout(), "bob": Layout()}, sync=Sync(), rounds=1)
    house.conductor.record(Planned(run="run", plan=plan))
    shown = {site: (one.connected, one.state) for site, one in house.desk.presence.progress("run").items()}
    assert shown == {"ada": (True, "waiting"), "bob": (False, "lost")}


def test_progress_is_kept_of_runs_under_way_and_of_the_newest_that_are_over(house):
    runs = [f"run-{number}" for number in range(110)]
    house.conductor.record(*(Submitted(run=run, user="ada", job=JOB) for run in ("first", *runs)))
    house.desk.heard("ada", Progress(run="first", position=0, state="starting"))
    for run in runs:
        house.desk.heard("ada", Progress(run=run, position=0, state="starting"))
        house.conductor.record(Cancelled(run=run, user="ada"))
        house.desk.heard("ada", Progress(run=run, position=0, state="late"))
    assert house.desk.presence.progress("first")["ada"].state == "starting"
    assert house.desk.presence.progress(runs[-1])["ada"].state == "starting"
    assert sum(bool(house.desk.presence.progress(run)) for run in runs) == 101
