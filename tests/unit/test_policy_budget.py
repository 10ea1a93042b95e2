"""What rules can say of a run's promise, in which words they refuse, and that a budget binds without them."""

import re

import pytest

from atoll.policy.defaults import SITE_POLICY
from atoll.policy.question import translate
from atoll.policy.replay import replay
from atoll.policy.rules import Rules
from atoll.policy.traps import traps
from atoll.spec.budget import Budget, Guarantee, Mechanism
from atoll.spec.event import Decided
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Decision, Policy, Request
from tests.unit.runs import ZERO

HEART = Dataset(name="heart", rows=100, fingerprint=ZERO, purposes=("care",), budget=Budget(epsilon=8, delta=1e-5))
MECHANISM = Mechanism(multiplier=1.0, steps=10, sampling=0.1)
# The example in the head of a new site's rules, as an owner puts it in force.
CAP = "\n".join(re.findall(r"^//   ((?:@id|forbid|when).*)$", SITE_POLICY, re.MULTILINE))
CAPPED = f"{SITE_POLICY}\n{CAP}"


def promised(epsilon, delta=1e-5, unit="record"):
    return Guarantee(unit=unit, epsilon=epsilon, delta=delta, mechanism=MECHANISM, accountant="pld")


def asked(guarantee=None, **fields):
    known = {"action": "plan", "site": "lyon", "dataset": HEART, "purpose": "care", "job": "job", "job_kind": "train"}
    return Request.model_validate({**known, "guarantee": guarantee, **fields})


def rules(text=CAPPED):
    return Rules(Policy(party="lyon", text=text))


def test_the_cap_of_the_example_holds_and_says_what_a_run_promises():
    decide = rules().decide
    assert decide(asked(promised(4.0))).allowed
    assert not decide(asked(promised(4.00001))).allowed, "an epsilon is rounded up"
    refused = decide(asked(promised(6.25)))
    assert (refused.allowed, refused.rules) == (False, ("site.epsilon",))
    assert "epsilon 6.25 is larger than 4.0" in str(refused)
    assert "the run promises no privacy" in str(decide(asked()))
    assert decide(asked(job_kind="query")).allowed
    told = rules().account(asked(promised(2.0))).rules
    assert [one.words for one in told if one.rule == "site.epsilon"] == ["epsilon 2.0 is not larger than 4.0"]
    assert traps(CAPPED) == []


@pytest.mark.parametrize(
    ("condition", "allowed", "refused"),
    [
        ("context.delta_one_in >= 100000", promised(1.0), promised(1.0, 2e-5)),
        ('context.privacy == "site"', promised(1.0, unit="site"), promised(1.0)),
        ("context.delta_one_in >= 2", promised(1.0), None),
        ('context.epsilon.lessThanOrEqual(decimal("900000000000000.0"))', promised(1e9), None),
    ],
)
def test_delta_and_unit_can_be_asked_for_and_who_promises_nothing_has_the_worst_of_each(condition, allowed, refused):
    text = SITE_POLICY.replace("when { resource.purposes", f"when {{ {condition} && resource.purposes", 1)
    assert rules(text).decide(asked(allowed)).allowed
    assert not rules(text).decide(asked(refused)).allowed


def test_what_does_not_fit_into_a_budget_is_refused_whatever_the_rules_say():
    text = '@id("a.b")\npermit (principal, action, resource);'
    refused = rules(text).decide(asked(promised(9.0), overdrawn={"epsilon": "privacy of heart: job needs epsilon 9"}))
    assert (refused.allowed, refused.rules) == (False, ("terms.budget",))
    assert str(refused) == "lyon refuses: privacy of heart: job needs epsilon 9 (rule terms.budget)"
    assert rules(text).decide(asked(promised(8.0))).allowed
    assert translate(asked(), 0.0).attributes["resource"]["budget"] == "record"


def test_the_past_can_be_tried_on_a_cap_and_has_no_jobs_in_it():
    request = asked(promised(6.25), overdrawn={"delta": "x"}).kept
    assert (request.guarantee, request.promise) == (promised(6.25), None)
    allowed = Decision(allowed=True, party="lyon")
    small, large = asked(promised(2.0)).kept, asked(promised(6.25)).kept
    events = [
        Decided(action="plan", subject="lyon/heart", run=run, decision=allowed, request=one)
        for run, one in (("small", small), ("large", large), ("old", asked().kept))
    ]
    found = replay([(0.0, event) for event in events], rules())
    assert found.refused == ("large", "old")
