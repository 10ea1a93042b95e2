"""Warnings about rules that fit the schema and may still do nothing; and an account of each rule for people."""

import pytest

from atoll.policy.defaults import HUB_POLICY, SITE_POLICY
from atoll.policy.rules import Rules
from atoll.policy.traps import traps
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Crossing, Policy, Request

PERMIT = '@id("all.permit")\npermit (principal, action, resource);\n'
FORBID = PERMIT + '@id("a.b")\nforbid (principal, action == Action::"cross", resource)\nwhen { %s };'
PATIENTS = Dataset(name="patients", rows=303, fingerprint="sha256:" + "0" * 64, purposes=("care",))


@pytest.mark.parametrize("text", [HUB_POLICY, SITE_POLICY, PERMIT])
def test_the_rules_to_begin_with_have_no_traps(text: str):
    assert traps(text) == []


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (
            "resource has min_group && context.rows < resource.min_group",
            "line 5, rule a.b: where there is no 'min_group'",
        ),
        ("resource has min_group && context.rows < resource.min_group", "write `resource is Dataset`"),
        ('context.kind == "updates"', "context.kind is never 'updates', so that this forbid may never apply"),
        ('context.kind == "updates"', "did you mean 'update'?"),
        ('"updates" == context.kind', "context.kind is never 'updates'"),
        ('["metric", "metrics"].contains(context.kind)', "context.kind is never 'metrics'"),
        ('context.wire.containsAny(["clipp"])', "context.wire is never 'clipp'"),
        ('context.direction != "outwards"', "context.direction is never 'outwards'"),
        ("context.bytes * 8 > 1000", "where it goes beyond 64 bits the rule fails"),
    ],
)
def test_a_forbid_that_may_do_nothing_is_told_with_its_place(condition: str, words: str):
    text = FORBID % condition
    Rules(Policy(party="berlin", text=text))  # it fits the schema
    assert any(words in one for one in traps(text)), traps(text)


@pytest.mark.parametrize("condition", ['context.purpose == "anything"', 'context.to == "hub"', "context.rows < 5"])
def test_words_that_anybody_may_choose_are_no_traps(condition: str):
    assert traps(FORBID % condition) == []


def test_rules_that_permit_nothing_are_told():
    assert traps('@id("a.b")\nforbid (principal, action, resource);') == [
        "line 1: there is no permit in it, and so all is refused; write what may be done"
    ]


def accounted(purpose: str = "care", kind: str = "update", text: str = SITE_POLICY):
    thing = Crossing.model_validate({"kind": kind, "direction": "out", "site": "berlin"})
    request = Request(action="cross", site="berlin", dataset=PATIENTS, purpose=purpose, crossing=thing)
    rules = Rules(Policy(party="berlin", text=text))
    account = rules.account(request, 0.0)
    assert account.decision == rules.decide(request, 0.0)
    return {one.rule: one for one in account.rules}


def test_an_account_tells_of_each_rule_about_such_questions_why_it_applies_or_not():
    told = accounted()
    terms = ["terms.ended", "terms.wire", "terms.region", "terms.budget"]
    assert list(told) == ["site.results", "site.answers", "site.work", "rows.stay", *terms]
    assert {name for name, one in told.items() if one.applies} == {"site.results"}
    assert told["site.results"].words == (
        "direction is 'out' and kind 'update' is among 'update', 'metric', 'model' "
        "and purpose 'care' is among the granted 'care'"
    )
    assert (told["site.work"].effect, told["rows.stay"].effect) == ("permit", "forbid")
    assert told["rows.stay"].words == "kind is 'update', not 'data'"
    assert told["terms.wire"].words == "what crosses passes through all that 'patients' asks for"


def test_an_account_of_a_refusal_tells_what_was_false_of_each_permit():
    told = accounted("marketing", "data")
    assert [name for name, one in told.items() if one.applies] == ["rows.stay"]
    assert "purpose 'marketing' is not among the granted 'care'" in told["site.results"].words


def test_a_question_that_contradicts_itself_has_a_refusal_and_no_rules():
    rules = Rules(Policy(party="berlin", text=PERMIT))
    account = rules.account(Request(action="plan"), 0.0)
    assert (account.decision.allowed, account.rules) == (False, ())
