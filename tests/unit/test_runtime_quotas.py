"""Projects' quotas: refused with the numbers, and when there is room again."""

import sys
import threading
from dataclasses import replace

import pytest

from atoll.errors import Denied, NotFound
from atoll.journal import Entry
from atoll.runtime.machine import begin
from atoll.runtime.quotas import DAY
from atoll.spec.event import Answer, Answered, Submitted
from atoll.spec.user import Project
from tests.unit.houses import JOB
from tests.unit.people import People

NOON = 1_800_000_000.0  # 2027-01-15 08:00:00 UTC


@pytest.fixture
def people(tmp_path):
    made = People(tmp_path, states={})
    made.states = made.quotas._states
    yield made
    made.journal.close()


def submitted(people, run, at, project="lung"):
    event = Submitted(run=run, user="ada", job=JOB.model_copy(update={"project": project}))
    people.states[run], _ = begin(event)
    told(people, event, at)


def told(people, event, at):
    people.seen(Entry(seq=1, time=at, actor="hub", event=event))


def over(people, run):
    people.states[run] = replace(people.states[run], phase="finished")


def test_a_project_that_is_none_is_refused_by_name(people):
    people.quotas.put(Project(name="lung"), "local")
    with pytest.raises(NotFound, match="there is no 'lnug'; did you mean 'lung'"):
        people.quotas.check("lnug", NOON)
    people.quotas.check("default", NOON)


def test_so_many_runs_at_once(people):
    people.quotas.put(Project(name="lung", runs_at_once=2), "local")
    for run in ("a", "b"):
        people.quotas.check("lung", NOON)
        submitted(people, run, NOON)
    submitted(people, "c", NOON, "default")
    with pytest.raises(Denied, match="2 of 2 runs at once are under way"):
        people.quotas.check("lung", NOON)
    over(people, "a")
    people.quotas.check("lung", NOON)


def test_so_many_runs_a_day_and_when_there_is_room_again(people):
    people.quotas.put(Project(name="lung", runs_per_day=2), "local")
    for run, at in (("a", NOON), ("b", NOON + 3600)):
        people.quotas.check("lung", at)
        submitted(people, run, at)
        over(people, run)
    with pytest.raises(Denied, match=r"2 of 2 runs within 24 hours .* again at 2027-01-16 08:00:00 UTC"):
        people.quotas.check("lung", NOON + 7200)
    people.quotas.check("lung", NOON + DAY)


def test_so_much_work_of_sites(people):
    people.quotas.put(Project(name="lung", site_seconds=100), "local")
    submitted(people, "a", NOON)
    for at, seconds in ((NOON, 60.0), (NOON + 60, 50.0), (NOON + 61, -1000.0)):
        answer = Answer(site="zurich", position=0, epoch=0, seconds=seconds)
        told(people, Answered(run="a", answer=answer), at)
    with pytest.raises(Denied, match=r"took 110 of 100 seconds .* again at 2027-01-16 08:00:00 UTC"):
        people.quotas.check("lung", NOON + 100)
    people.quotas.check("lung", NOON + DAY)
    [_, view] = people.quotas.views(NOON + 100)
    assert view.project.name == "lung"


def test_what_was_taken_is_added_up_while_answers_come_in(people):
    people.quotas.put(Project(name="lung", site_seconds=1e12), "local")
    submitted(people, "a", NOON)
    answered = Answered(run="a", answer=Answer(site="zurich", position=0, epoch=0, seconds=1.0))
    for at in range(2000):  # half of them are a day old when somebody looks
        told(people, answered, NOON - DAY + at)
    looked, usual = threading.Event(), sys.getswitchinterval()

    def answers():
        at = 2000
        while not looked.is_set():
            told(people, answered, NOON - DAY + at)
            at += 1

    thread = threading.Thread(target=answers)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for at in range(100):
            people.quotas.check("lung", NOON + at)
            people.quotas.views(NOON + at)
    finally:
        looked.set()
        thread.join()
        sys.setswitchinterval(usual)
    assert people.quotas.views(NOON)[1].runs == 1


def test_bounds_are_of_the_last_time_they_were_set(people):
    people.quotas.put(Project(name="default", runs_at_once=1), "local")
    submitted(people, "a", NOON, "default")
    with pytest.raises(Denied):
        people.quotas.check("default", NOON)
    people.quotas.put(Project(name="default"), "local")
    people.quotas.check("default", NOON)
    [view] = people.quotas.views(NOON)
    assert (view.running, view.runs) == (1, 1)
