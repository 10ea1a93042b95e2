"""One site's side of a run that promises something of its rows: reserved before it opens, charged for each copy."""

import sys

import pytest

from atoll.data.catalogue import Catalogue
from atoll.errors import Invalid
from atoll.runtime.errand import Errand
from atoll.spec.budget import Budget
from tests.unit.places import BATCH, ROWS, STEPS, WAIT, assign, eventually, honest, job

PRIVACY = {"noise": 2.0, "delta": 1e-3, "clip": 1.0}


def private(position=2, rounds=3, **fields):
    return assign(position=position, job=job(privacy=PRIVACY, steps=rounds * STEPS, **fields))


def told(lyon, *kinds):
    return [entry.event for entry in lyon.journal.entries(kinds=kinds)]


def charged(lyon):
    return [event.steps for event in told(lyon, "privacy.charged")]


def test_a_run_reserves_before_its_dataset_opens_and_is_charged_for_each_round_before_it_leaves(lyon, errand):
    seen = []
    lyon.workers.answers["open"] = lambda order, group: (
        seen.append(len(told(lyon, "privacy.reserved"))),
        honest(order),
    )[1]
    lyon.workers.answers["train"] = lambda order, group: (seen.append(charged(lyon)), honest(order))[1]
    for count, position in enumerate((2, 3), 1):
        errand.assign(private(position))
        lyon.hub.wait_taken(count)
    assert seen == [1, [], 1, [STEPS]]
    [reserved] = [event.guarantee for event in told(lyon, "privacy.reserved")]
    assert reserved.unit == "record"
    assert (reserved.mechanism.steps, reserved.mechanism.sampling) == (3 * STEPS, BATCH / (ROWS - ROWS // 5))
    assert charged(lyon) == [STEPS, 2 * STEPS]
    events = told(lyon, "privacy.charged", "crossing")
    kinds = [e.kind for e in events if e.kind == "privacy.charged" or e.crossing.kind == "update"]
    assert kinds == 2 * ["privacy.charged", "crossing"]
    assert told(lyon, "decision")[0].request.guarantee == reserved


def test_what_is_sent_again_is_charged_once_and_what_is_made_again_twice_until_nothing_is_left(lyon, errand):
    lyon.hub.broken = 3
    errand.assign(private(rounds=2))
    lyon.hub.wait_taken()
    assert charged(lyon) == [STEPS]
    errand.end(keep=True)
    assert errand.wait(WAIT)
    again = Errand(lyon.place, "run")
    again.assign(private(rounds=2))
    lyon.hub.wait_taken(2)
    assert charged(lyon) == [STEPS], "another agent sends what was kept"
    lyon.hub.picky = 1
    again.assign(private(3, rounds=2))
    assert eventually(lambda: lyon.hub.refused)
    assert charged(lyon) == [STEPS, 2 * STEPS]
    again.assign(private(3, rounds=2))
    words = lyon.hub.wait("refusal").words
    assert words.startswith("lyon refuses: privacy of rows: run reserved 6 steps, and with those that were taken again")
    assert len(lyon.hub.taken) == 2
    again.end(keep=False)
    assert again.wait(WAIT)


def test_a_run_that_its_owner_released_in_the_middle_of_a_round_sends_nothing_more(lyon, errand):
    lyon.workers.answers["train"] = lambda order, group: (lyon.place.ledger.release("run"), honest(order))[1]
    errand.assign(private())
    assert "run is over, so nothing of it may leave" in lyon.hub.wait("refusal").words
    assert (lyon.hub.taken, charged(lyon)) == ([], [])


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(epsilon=0.3, delta=1e-2), "privacy of rows: run needs epsilon 0."),
        (Budget(epsilon=9, delta=1e-4), "privacy of rows: run needs delta 0.001, and of 0.0001 there is 0.0001 left"),
        (Budget(epsilon=9, delta=1e-2, unit="site"), "its budget is of the site, and run hides single records only"),
    ],
    ids=["epsilon", "delta", "unit"],
)
def test_what_does_not_fit_is_refused_before_anything_opens(lyon, errand, budget, words):
    Catalogue(lyon.home).set_budget("rows", budget)
    errand.assign(private())
    assert words in (said := lyon.hub.wait("refusal").words)
    assert "(rule terms.budget)" in said
    assert (lyon.workers.orders, told(lyon, "privacy.reserved")) == ([], [])


def test_a_site_without_the_extra_refuses_what_it_cannot_count(lyon, errand, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # as if it were not installed
    errand.assign(assign(job=job(privacy={**PRIVACY, "noise": 2.125})))
    words = lyon.hub.wait("refusal").words
    assert "privacy of rows: dp_accounting: is not installed" in words
    assert "pip install 'atoll[privacy]'" in words


def test_a_budget_that_is_set_in_mid_run_holds_for_one_that_promises_nothing_from_its_next_question_on(lyon, errand):
    errand.assign(assign())
    lyon.hub.wait_taken()
    Catalogue(lyon.home).set_budget("rows", Budget(epsilon=9, delta=1e-2))
    errand.assign(assign(position=3))
    assert "it has a budget of epsilon 9, and run promises nothing" in lyon.hub.wait("refusal").words


def test_what_was_made_of_a_dataset_uses_its_budget(lyon):
    catalogue = Catalogue(lyon.home)
    made = catalogue.add("risks", lyon.file, like=catalogue.entry("rows").dataset)
    catalogue.add("more", lyon.file, like=made)
    budget = Budget(epsilon=2, delta=1e-5)
    catalogue.set_budget("rows", budget)
    assert catalogue.counted("more") == catalogue.counted("risks") == ("rows", budget)
    with pytest.raises(Invalid, match="'more' was made from 'rows', and uses its budget"):
        catalogue.set_budget("more", None)
    assert catalogue.set_budget("rows", None).budget is None
