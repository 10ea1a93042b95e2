"""Reasons in words: each says who refuses, which condition with which values, and the rule."""

import pytest

from atoll.policy.defaults import SITE_POLICY
from atoll.policy.rules import Rules
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Crossing, Decision, Policy, Request

PATIENTS = Dataset(name="patients", rows=303, fingerprint="sha256:" + "0" * 64, purposes=("cardiology-research",))


def ask(text: str, request: Request) -> Decision:
    return Rules(Policy(party="berlin", text=text)).decide(request)


def update(**fields: object) -> Request:
    thing = {"kind": "update", "direction": "out", "site": "berlin", "bytes": 5, "rows": 3, "wire": ("int8",), **fields}
    return Request(
        action="cross",
        user="ana",
        region="eu-de",
        dataset=PATIENTS,
        purpose="cardiology-research",
        crossing=Crossing.model_validate(thing),
    )


def why(condition: str, effect: str = "permit", request: Request | None = None) -> str:
    scope = 'principal, action == Action::"cross", resource is Dataset'
    text = f'@id("a.b")\n{effect} ({scope})\nwhen {{ {condition} }};'
    if effect == "forbid":
        text += '@id("all.permit")\npermit (principal, action, resource);'
    decision = ask(text, request or update())
    assert not decision.allowed
    assert decision.rules == ("a.b",)
    words = str(decision)
    assert words.startswith("berlin refuses: ")
    assert words.endswith(" (rule a.b)")
    return words.removeprefix("berlin refuses: ").removesuffix(" (rule a.b)")


def test_a_purpose_that_is_not_granted():
    text = (
        '@id("hospital.purpose")\npermit (principal, action in [Action::"plan", Action::"open"], resource is Dataset)\n'
        "when { resource.purposes.contains(context.purpose) };"
    )
    request = Request(action="plan", dataset=PATIENTS, purpose="marketing", job="ads", job_kind="train")
    assert str(ask(text, request)) == (
        "berlin refuses: purpose 'marketing' is not among the granted 'cardiology-research' (rule hospital.purpose)"
    )
    granted_nothing = request.model_copy(update={"dataset": PATIENTS.model_copy(update={"purposes": ()})})
    assert "'patients' is granted for nothing" in str(ask(text, granted_nothing))


def test_an_allow_names_its_rules():
    text = '@id("b.two")\npermit (principal, action, resource);\n@id("a.one")\npermit (principal, action, resource);'
    decision = ask(text, update())
    assert decision.rules == ("a.one", "b.two")
    assert decision.reasons == ("berlin allows it (rules a.one, b.two)",)
    assert str(ask(text.splitlines()[0] + text.splitlines()[1], update())) == "berlin allows it (rule b.two)"


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (
            'context.wire.contains("clip")',
            "an update must pass through clip before it leaves; the job's wire is ['int8']",
        ),
        ("context.rows >= resource.min_group", "a group of 3 rows is smaller than the site's minimum of 10"),
        ("context.bytes < 5", "size in bytes 5 is not smaller than 5"),
        ("context.bytes > 9", "size in bytes 5 is not larger than 9"),
        ("context.bytes <= 4", "size in bytes 5 is larger than 4"),
        ('resource.region == "us-east"', "the dataset's region is 'eu-de', not 'us-east'"),
        ('"us-east" == resource.region', "the dataset's region is 'eu-de', not 'us-east'"),
        ('resource.region != "eu-de"', "the dataset's region is 'eu-de'"),
        ("context.to == resource.region", "receiver is 'hub', not the dataset's region 'eu-de'"),
        ('principal.roles.contains("auditor")', "user 'ana' has no role 'auditor' (has 'scientist')"),
        (
            'principal.roles.containsAny(["auditor", "operator"])',
            "user 'ana' has none of the roles 'auditor', 'operator' (has 'scientist')",
        ),
        (
            'principal.roles.containsAll(["scientist", "operator"])',
            "user 'ana' has not all of the roles 'scientist', 'operator' (has 'scientist')",
        ),
        ('["paris", "rome"].contains(context.to)', "receiver 'hub' is not among 'paris', 'rome'"),
        ('context.wire.containsAll(["clip", "int8"])', "wire 'int8' lacks some of 'clip', 'int8'"),
        ('context.wire.containsAny(["clip", "noise"])', "wire 'int8' has none of 'clip', 'noise'"),
        (
            'resource.purposes.contains("billing")',
            "'billing' is not among the dataset's purposes 'cardiology-research'",
        ),
        ('context.purpose like "onco*"', "purpose 'cardiology-research' does not match 'onco*'"),
        (
            "context.bytes * 2 + context.rows > 100",
            "the condition `((context.bytes * 2) + context.rows) > 100` does not hold, "
            "where size in bytes is 5 and rows is 3",
        ),
        ('principal == User::"bob"', 'the condition `principal == User::"bob"` does not hold'),
        ('!(context.to == "hub")', "receiver is 'hub'"),
        ('!(context.to == "hub" || context.rows < 2)', "receiver is 'hub'"),
        (
            'context.to == "paris" || context.to == "rome"',
            "receiver is 'hub', not 'paris' and receiver is 'hub', not 'rome'",
        ),
        ('!(context.to == "hub" && context.rows == 3)', "receiver is 'hub' and rows is 3"),
        (
            'context.kind != "update" || context.wire.contains("clip")',
            "kind is 'update' and an update must pass through clip before it leaves; the job's wire is ['int8']",
        ),
        ('context.to == "hub" && context.bytes == 6 && context.rows == 3', "size in bytes is 5, not 6"),
    ],
)
def test_a_permit_that_nearly_matched_says_which_condition_was_false(condition: str, words: str):
    assert why(condition) == words


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ('context.kind == "update" && context.rows < resource.min_group', None),
        ('context.wire.contains("int8")', "an update passes through int8"),
        ('context.kind == "update"', "kind is 'update'"),
        ('context.to == "paris" || context.to == "hub"', "receiver is 'hub'"),
    ],
)
def test_a_forbid_without_a_reason_says_what_it_was_about(condition: str, words: str | None):
    assert why(condition, "forbid") == (words or "a group of 3 rows is smaller than the site's minimum of 10")


def test_a_forbid_with_unless_says_what_was_missing():
    text = (
        '@id("must.clip")\nforbid (principal, action == Action::"cross", resource)\n'
        'when { context.kind == "update" } unless { context.wire.contains("clip") };\n'
        '@id("all.permit")\npermit (principal, action, resource);'
    )
    assert str(ask(text, update())) == (
        "berlin refuses: an update must pass through clip before it leaves; the job's wire is ['int8'] (rule must.clip)"
    )
    assert ask(text, update(wire=("clip",))).allowed


def test_a_forbid_speaks_with_its_owners_words():
    decision = ask(SITE_POLICY, update(kind="data"))
    assert str(decision) == "berlin refuses: rows never leave the site where they lie (rule rows.stay)"


def test_a_forbid_of_everything():
    text = '@id("site.closed")\nforbid (principal, action, resource);'
    assert str(ask(text, update())) == "berlin refuses: crossing 'update' going out is forbidden (rule site.closed)"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (update(kind="data", direction="in"), "crossing 'data' coming in"),
        (Request(action="submit", job="heart"), "submitting job 'heart'"),
        (Request(action="deploy", model="heart@1"), "deploying model 'heart@1'"),
        (Request(action="open", dataset=PATIENTS), "opening dataset 'patients'"),
    ],
)
def test_where_no_rule_is_near_the_deed_is_named(request_: Request, words: str):
    text = '@id("a.b")\npermit (principal, action == Action::"promote", resource);'
    decision = ask(text, request_)
    assert decision.rules == ()
    assert decision.reasons == (f"berlin refuses: no rule permits {words}",)


def test_the_nearest_permit_explains_and_others_are_left_out():
    small = update(kind="query")
    assert str(ask(SITE_POLICY, small)) == (
        "berlin refuses: a group of 3 rows is smaller than the site's minimum of 10 (rule site.answers)"
    )
    log = update(kind="log")
    assert str(ask(SITE_POLICY, log)) == (
        "berlin refuses: no rule permits crossing 'log' going out: "
        "kind 'log' is not among 'update', 'metric', 'model' (rule site.results)"
    )


def test_two_false_conditions_are_both_told():
    request = update(kind="query").model_copy(update={"purpose": "marketing"})
    words = str(ask(SITE_POLICY, request))
    assert "'marketing'" in words
    assert "smaller than the site's minimum" in words


def test_a_condition_that_only_makes_sense_after_another_is_not_blamed():
    text = (
        '@id("a.b")\npermit (principal, action == Action::"cross", resource)\n'
        'when { resource is Dataset && resource.region == "eu-de" };'
    )
    request = Request(action="cross", job="heart", crossing=Crossing(kind="log", direction="out", site="berlin"))
    words = str(ask(text, request))
    assert "resource is Dataset" in words
    assert "region" not in words


def test_values_of_others_are_escaped_and_cut():
    request = update().model_copy(update={"purpose": "x\x1b[2J\n" + "y" * 500})
    words = str(ask(SITE_POLICY, request))
    assert "\x1b" not in words
    assert "\n" not in words
    assert len(words) < 250
    many = Dataset(
        name="many", rows=1, fingerprint=PATIENTS.fingerprint, purposes=tuple(f"purpose-{i}" for i in range(100))
    )
    assert "and 92 more" in str(ask(SITE_POLICY, request.model_copy(update={"dataset": many})))
