"""The ledger of a dataset's privacy: what fits, what is charged, what a crash leaves, and that nothing is ever lost."""

from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import Denied, Invalid, Unavailable
from atoll.policy import accounting
from atoll.policy.ledger import Ledger, folded
from atoll.spec.budget import Budget, Guarantee, Mechanism, PrivacyCharged, PrivacyReleased, PrivacyReserved
from atoll.spec.event import EVENT

BUDGET = Budget(epsilon=4.0, delta=1e-5)


def promise(epsilon, delta=1e-6, unit="record"):
    mechanism = Mechanism(multiplier=1.0, steps=10, sampling=0.1)
    return Guarantee(unit=unit, epsilon=epsilon, delta=delta, mechanism=mechanism, accountant="pld")


def reserved(*runs, **of):
    ledger = Ledger()
    for run, epsilon in [*((run, 1.0) for run in runs), *of.items()]:
        ledger = ledger.after(ledger.reserve("heart", run, promise(epsilon), BUDGET))
    return ledger


def test_runs_add_up_until_one_does_not_fit():
    ledger = reserved("a", "b", "c")
    assert ledger.used("heart") == pytest.approx((3.0, 3e-6))
    with pytest.raises(
        Denied, match=r"^privacy of heart: d needs epsilon 1.5, and of 4 there is 1 left; use more noise"
    ):
        ledger.reserve("heart", "d", promise(1.5), BUDGET)
    with pytest.raises(Denied, match=r"d needs delta 8e-06, and of 1e-05 there is 7e-06 left"):
        ledger.reserve("heart", "d", promise(0.5, 8e-6), BUDGET)
    assert ledger.after(ledger.reserve("heart", "d", promise(1.0), BUDGET)).used("heart")[0] == 4.0
    assert ledger.reserve("lungs", "d", promise(4.0), BUDGET) is not None  # each dataset has a budget of its own


def test_ten_tenths_are_a_budget_of_one():
    ledger, budget = Ledger(), Budget(epsilon=1.0, delta=1.0 - 1e-9)
    for run in "abcdefghij":
        ledger = ledger.after(ledger.reserve("heart", run, promise(0.1), budget))
    with pytest.raises(Denied, match="there is 0 left"):
        ledger.reserve("heart", "k", promise(1e-6), budget)


def test_a_run_asks_again_for_what_it_has_and_for_nothing_else():
    ledger = reserved("a")
    assert ledger.reserve("heart", "a", promise(1.0), BUDGET) is None
    with pytest.raises(Invalid, match="a reserved epsilon 1; submit the job again"):
        ledger.reserve("heart", "a", promise(0.5), BUDGET)
    over = ledger.after(ledger.release("heart", "a"))
    with pytest.raises(Invalid, match="a is over"):
        over.reserve("heart", "a", promise(1.0), BUDGET)


def test_a_budget_that_is_set_later_knows_of_what_was_used_before_it():
    ledger = Ledger().after(Ledger().reserve("heart", "a", promise(3.5), None))
    with pytest.raises(Denied, match=r"b needs epsilon 1, and of 4 there is 0.5 left"):
        ledger.reserve("heart", "b", promise(1.0), BUDGET)
    less = Budget(epsilon=1.0, delta=1e-5)
    with pytest.raises(Denied, match=r"b needs epsilon 0.1, and of 1 there is 0 left"):
        ledger.reserve("heart", "b", promise(0.1), less)
    assert ledger.reserve("heart", "a", promise(3.5), less) is None, "what is reserved stays"


def test_under_a_budget_a_run_has_to_promise_something_and_of_its_unit():
    assert Ledger().overdrawn("heart", "a", None, None) == {}
    assert list(Ledger().overdrawn("heart", "a", None, BUDGET)) == ["promise"]
    site = Budget(unit="site", epsilon=4.0, delta=1e-5)
    with pytest.raises(Denied, match="its budget is of the site, and a hides single records only"):
        Ledger().reserve("heart", "a", promise(0.1), site)
    assert Ledger().reserve("heart", "a", promise(0.1, unit="site"), site) is not None
    assert (
        Ledger().reserve("heart", "a", promise(0.1, unit="site"), BUDGET) is not None
    )  # who hides the site hides records


def test_what_was_not_used_is_free_again_once_the_run_is_over_and_not_before():
    ledger = reserved(a=3.0)
    ledger = ledger.after(ledger.charge("heart", "a", 0.75, 1e-6))
    assert ledger.used("heart")[0] == 3.0
    with pytest.raises(Denied):
        ledger.reserve("heart", "b", promise(2.0), BUDGET)
    ledger = ledger.after(ledger.release("heart", "a"))
    assert ledger.used("heart") == (0.75, 1e-6)
    assert ledger.reserve("heart", "b", promise(3.25), BUDGET) is not None
    assert ledger.release("heart", "a") is None


def test_a_run_that_used_nothing_costs_nothing():
    ledger = reserved("a")
    assert ledger.after(ledger.release("heart", "a")).used("heart") == (0.0, 0.0)


def test_no_charge_passes_what_was_reserved_and_none_is_taken_back():
    ledger = reserved(a=1.0)
    with pytest.raises(Denied, match=r"a would use epsilon 1\.01 and reserved 1; it stops here"):
        ledger.charge("heart", "a", 1.01, 1e-6)
    with pytest.raises(Denied, match="a would use delta 1e-05"):
        ledger.charge("heart", "a", 0.5, 1e-5)
    with pytest.raises(Denied, match="would use epsilon nan"):
        ledger.charge("heart", "a", float("nan"), 1e-6)
    ledger = ledger.after(ledger.charge("heart", "a", 0.5, 1e-6))
    assert ledger.charge("heart", "a", 0.5, 1e-6) is None  # the same update, sent once more
    assert ledger.charge("heart", "a", 0.25, 0.0) is None
    with pytest.raises(Denied, match="b reserved nothing, so nothing of it may leave"):
        ledger.charge("heart", "b", 0.1, 0.0)
    over = ledger.after(ledger.release("heart", "a"))
    with pytest.raises(Denied, match="a is over, so nothing of it may leave"):
        over.charge("heart", "a", 0.6, 1e-6)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([PrivacyReserved(dataset="d", run="a", guarantee=promise(1.0))] * 2, "a reserves twice; verify the journal"),
        (
            [
                PrivacyReserved(dataset="d", run="a", guarantee=promise(1.0)),
                PrivacyCharged(dataset="d", run="a", epsilon=0.5, delta=0.0),
                PrivacyCharged(dataset="d", run="a", epsilon=0.4, delta=0.0),
            ],
            "a is charged less; verify the journal",
        ),
    ],
)
def test_a_journal_that_takes_something_back_is_refused(events, words):
    with pytest.raises(Invalid, match=words):
        folded(events)


def test_a_journal_that_charges_or_releases_what_was_not_reserved_is_refused():
    for event in (PrivacyCharged(dataset="d", run="a", epsilon=1.0, delta=0.0), PrivacyReleased(dataset="d", run="a")):
        with pytest.raises(Denied, match="a reserved nothing"):
            folded([event])


STEPS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(["reserve", "charge", "release"]), st.floats(0.01, 3.0)),
    max_size=40,
)


@given(STEPS, st.integers(0, 40))
def test_whatever_runs_do_the_budget_holds_and_a_killed_site_folds_its_journal_to_the_same(steps, killed):
    ledger, journal, left, epsilons = Ledger(), [], {}, {}
    for number, (run, verb, epsilon) in enumerate(steps):
        if number == killed:
            ledger = folded([EVENT.validate_json(EVENT.dump_json(event)) for event in journal])
        try:
            if verb == "reserve":
                event = ledger.reserve("heart", run, promise(epsilon), BUDGET)
            elif verb == "charge":
                event = ledger.charge("heart", run, epsilon, 1e-6)
            else:
                event = ledger.release("heart", run)
        except (Denied, Invalid):
            continue
        if event is not None:
            journal.append(event)
            ledger = ledger.after(event)
        if verb == "charge":  # only now does what it pays for leave
            left[run] = max(left.get(run, 0.0), epsilon)
        epsilons[run] = ledger.accounts[("heart", run)].epsilon if ("heart", run) in ledger.accounts else 0.0
    assert sum(left.values()) <= ledger.used("heart")[0] * (1 + 1e-9) <= BUDGET.epsilon * (1 + 1e-8)
    assert left == {run: spent for run, spent in epsilons.items() if spent}


@pytest.mark.skipif(find_spec("dp_accounting") is not None, reason="the extra is installed")
def test_without_the_extra_a_cost_is_not_guessed():
    with pytest.raises(Unavailable, match=r"^dp_accounting: is not installed.* pip install 'atoll\[privacy\]'"):
        accounting.epsilon(Mechanism(multiplier=1.0, steps=1), 1e-5)
