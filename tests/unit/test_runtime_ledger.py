"""A site's ledger over its own journal: whoever else writes there is heard, and whatever dies, nothing is forgotten."""

import pytest

from atoll.errors import Denied
from atoll.journal import Journal
from atoll.policy.ledger import folded
from atoll.policy.promises import guaranteed, so_far
from atoll.runtime.ledger import KINDS, LiveLedger
from atoll.spec.budget import Budget
from atoll.spec.policy import Promise
from tests.unit.runs import train_job

BUDGET = Budget(epsilon=3.0, delta=1e-5)


@pytest.fixture(scope="module")
def whole():
    """What five rounds with noise of four times the clip cost."""
    return guaranteed(Promise(job=train_job(), noise=4.0, rounds=5), 100, BUDGET)


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.db", "lyon") as made:
        yield made


def life(journal):
    return LiveLedger(journal, lambda event: journal.append(event, actor="lyon"))


def test_another_life_goes_on_with_what_the_journal_has(journal, whole):
    first = life(journal)
    first.reserve("heart", "a", whole, BUDGET)
    first.charge("heart", "a", 2, "site")
    second = life(journal)
    assert second.ledger == first.ledger
    assert second.ledger.accounts["heart", "a"].steps == 2
    second.reserve("heart", "a", whole, BUDGET)
    second.charge("heart", "a", 2, "site")
    assert len(list(journal.entries())) == 2, "nothing is reserved or charged twice"
    with pytest.raises(Denied, match=r"b needs epsilon 2.28\d*, and of 3 there is 0.71"):
        second.reserve("heart", "b", whole, BUDGET)
    assert second.open_runs() == ("a",)


def test_what_an_owner_releases_beside_a_running_site_is_heard_there(journal, whole):
    agent, owner = life(journal), life(journal)
    agent.reserve("heart", "a", whole, BUDGET)
    agent.charge("heart", "a", 1, "site")
    assert owner.release("a")
    assert not owner.release("a")
    assert agent.ledger.used("heart") == (so_far(whole, 1), whole.delta)
    with pytest.raises(Denied, match="a is over, so nothing of it may leave"):
        agent.charge("heart", "a", 2, "site")
    with pytest.raises(Denied, match="a is over; submit the job again"):
        agent.reserve("heart", "a", whole, BUDGET)


def test_a_charge_that_crossed_a_release_counts_and_the_journal_can_still_be_read(journal, whole):
    agent, late = life(journal), life(journal)
    agent.reserve("heart", "a", whole, BUDGET)
    charged = late.ledger.charge("heart", "a", 1.0, whole.delta, 1)
    agent.release("a")
    journal.append(charged, actor="lyon")
    assert life(journal).ledger.used("heart") == (1.0, whole.delta)


def test_at_every_instant_the_journal_has_charged_what_may_have_left(journal, whole):
    ledger, left = life(journal), []
    ledger.reserve("heart", "a", whole, BUDGET)
    for steps in range(1, 6):
        ledger.charge("heart", "a", steps, "site")
        left.append((len(list(journal.entries())), so_far(whole, steps)))  # now it may leave, and all may die
    assert [used for _, used in left] == sorted(used for _, used in left)
    assert left[-1][1] == whole.epsilon
    events = [entry.event for entry in journal.entries(kinds=KINDS)]
    for entries, used in left:
        found = folded(events[:entries]).accounts["heart", "a"]
        assert found.epsilon >= used
        assert found.counts == (whole.epsilon, whole.delta), "and all that is reserved is still kept for it"
    with pytest.raises(Denied, match="reserved 5 steps, and with those that were taken again this would be step 6"):
        ledger.charge("heart", "a", 6, "site")


def test_steps_that_were_counted_in_another_unit_than_is_reserved_pay_for_nothing(journal, whole):
    ledger = life(journal)
    ledger.reserve("heart", "a", whole, BUDGET)
    with pytest.raises(Denied, match="reserved steps that hide a site, and what is to leave hides a record; submit"):
        ledger.charge("heart", "a", 1, "record")
    assert ledger.ledger.accounts["heart", "a"].steps == 0


def test_a_run_takes_the_same_share_of_a_budgets_delta_as_of_its_epsilon(whole):
    assert whole.unit == "site"
    assert whole.epsilon / BUDGET.epsilon == pytest.approx(whole.delta / BUDGET.delta, rel=0.1)
    assert guaranteed(Promise(job=train_job(), noise=4.0, rounds=5), 100, None).delta == 1e-5
    assert guaranteed(Promise(job=train_job(), noise=0.1, rounds=5), 100, BUDGET) is None, "that hides nothing"
    assert so_far(whole, 0) == 0.0
