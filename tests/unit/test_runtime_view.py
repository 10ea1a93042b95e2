"""What people see of runs and borders: the same after a restart, told to who watches, and read without old entries."""

import threading
from pathlib import Path

import pytest

from atoll.journal import Journal
from atoll.runtime.machine import begin
from atoll.runtime.view import Borders, Views, traffic
from atoll.spec.event import Answer, Answered, Cancelled, Crossed, Decided, Event, Submitted
from atoll.spec.pace import Pace
from atoll.spec.policy import Crossing, Decision
from atoll.spec.run import SiteProgress
from tests.unit.runs import train_job

ALLOWED, REFUSED = Decision(allowed=True, party="ada"), Decision(allowed=False, party="ada")


def crossed(
    run: str | None, size: int, direction: str = "out", decision: Decision = ALLOWED, site: str = "ada"
) -> Event:
    asked = {"kind": "update", "direction": direction, "site": site, "run": run, "bytes": size}
    return Crossed(crossing=Crossing.model_validate(asked), decision=decision)


def submitted(run: str) -> Submitted:
    return Submitted(run=run, user="ada", job=train_job())


@pytest.fixture
def journal(tmp_path: Path):
    with Journal(tmp_path / "journal.db", "hub") as made:
        yield made


def test_a_view_is_the_same_whether_entries_were_seen_as_they_came_or_read_again(journal):
    live = Views()
    events = [submitted("run"), crossed("run", 10), crossed("run", 5, "in"), crossed("run", 7, decision=REFUSED)]
    for event in [*events, crossed("other", 9), crossed(None, 9), Cancelled(run="run", user="ada")]:
        for entry in journal.append(event, actor="hub"):
            live.seen(entry)
    again = Views()
    for entry in journal.entries():
        again.seen(entry)
    state, _ = begin(submitted("run"))
    views = [views.run(state, here=False, progress={}, trouble=None) for views in (live, again)]
    assert views[0] == views[1]
    assert (views[0].bytes_up, views[0].bytes_down) == (10, 5)


def test_what_policies_said_is_kept_until_nothing_can_be_published_any_more(journal):
    views = Views()
    said = Decided(action="plan", subject="ada/job", run="run", decision=ALLOWED)
    stranger = said.model_copy(update={"run": "plan-1"})  # a plan that was only looked at
    for entry in journal.append(submitted("run"), said, stranger, actor="hub"):
        views.seen(entry)
    assert views.decided == {"run": ["ada allows it"]}
    for entry in journal.append(Cancelled(run="run", user="ada"), actor="hub"):
        views.seen(entry)
    assert views.decided == {}


def test_who_watches_a_run_is_told_of_it_alone_and_only_while_watching(journal):
    views, told = Views(), []
    run, other = journal.append(submitted("run"), submitted("other"), actor="hub")
    with views.watch("run", lambda: told.append(1)), views.watch("run", lambda: told.append(2)):
        views.seen(other)
        assert told == []
        views.seen(run)
        views.changed("run")
    assert told == [1, 2, 1, 2]
    views.changed("run")
    assert told == [1, 2, 1, 2]


def test_watching_and_telling_from_many_threads_loses_nobody():
    views, counts = Views(), [0] * 8
    end = threading.Event()

    def tell() -> None:
        while not end.is_set():
            views.changed("run")

    def watch(number: int) -> None:
        for _ in range(50):
            heard = threading.Event()
            with views.watch("run", heard.set):
                counts[number] += heard.wait(20)

    teller = threading.Thread(target=tell)
    watchers = [threading.Thread(target=watch, args=(number,)) for number in range(8)]
    for thread in (teller, *watchers):
        thread.start()
    for thread in watchers:
        thread.join()
    end.set()
    teller.join()
    assert counts == [50] * 8


def test_borders_are_summed_as_journals_grow_and_for_one_run_alone(journal):
    borders = Borders()
    journal.append(crossed("a", 10), crossed("b", 5), crossed("a", 3, "in"), actor="hub")
    assert borders.of(journal) == {("ada", "out", "update"): (2, 15, 0), ("ada", "in", "update"): (1, 3, 0)}
    journal.append(crossed("a", 1), crossed("a", 8, decision=REFUSED), crossed("a", 2, site="bob"), actor="hub")
    statements: list[str] = []
    journal._store.connection.set_trace_callback(statements.append)
    sums = borders.of(journal)
    assert sums[("ada", "out", "update")] == (3, 16, 1)
    assert all("seq > 3" in statement for statement in statements), "what was summed before is not read again"
    assert borders.of(journal, "b") == {("ada", "out", "update"): (1, 5, 0)}
    assert [(row.site, row.direction, row.count, row.bytes, row.refused) for row in traffic(sums)] == [
        ("ada", "in", 1, 3, 0),
        ("ada", "out", 3, 16, 1),
        ("bob", "out", 1, 2, 0),
    ]


def test_the_pace_of_each_sites_newest_round_outlives_the_run_and_gives_way_to_a_live_one(journal):
    def answered(site, position, rate, *others):
        one = Answer(site=site, position=position, epoch=0, pace=rate and Pace(examples_per_second=rate))
        return Answered(run="run", answer=one, others=others)

    behind = Answer(site="cleo", position=3, epoch=0, pace=Pace(examples_per_second=7.0), via=("ada",))
    events = [submitted("run"), answered("ada", 2, 10.0), answered("bob", 2, 20.0)]
    events += [answered("ada", 3, 11.0, behind), answered("bob", 4, None)]  # measures its metrics, and no pace
    for event in events:
        journal.append(event, actor="hub")
    again = Views()
    for entry in journal.entries():
        again.seen(entry)
    state, _ = begin(submitted("run"))
    paces = again.run(state, here=False, progress={}, trouble=None).newest_paces
    assert {site: pace.examples_per_second for site, pace in paces.items()} == {"ada": 11.0, "bob": 20.0, "cleo": 7.0}
    live = {"ada": SiteProgress(pace=Pace(examples_per_second=99.0)), "bob": SiteProgress()}
    view = again.run(state, here=True, progress=live, trouble=None)
    assert set(view.paces) == {"bob", "cleo"}
    assert {site: pace.examples_per_second for site, pace in view.newest_paces.items()} == {
        "ada": 99.0,
        "bob": 20.0,
        "cleo": 7.0,
    }
