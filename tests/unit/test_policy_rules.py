"""Decisions of rules: default deny, the owner's forbid, and nothing allowed where a rule could not be evaluated."""

import json
import threading
from pathlib import Path

import cedarpy
import pytest

from atoll.errors import Invalid, NotFound
from atoll.policy.defaults import HUB_POLICY, SITE_POLICY
from atoll.policy.load import LivePolicy, load
from atoll.policy.question import translate
from atoll.policy.reasons import seen_by
from atoll.policy.rules import Rules
from atoll.policy.schema import ACTIONS, CONTEXT, SCHEMA
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Action, Crossing, CrossingKind, Policy, Request

PATIENTS = Dataset(name="patients", rows=303, fingerprint="sha256:" + "0" * 64, purposes=("cardiology-research",))
PERMIT_ALL = '@id("all.permit")\npermit (principal, action, resource);\n'


def rules(text: str, party: str = "berlin") -> Rules:
    return Rules(Policy(party=party, text=text))


def crossing(
    kind: CrossingKind, direction: str = "out", purpose: str = "cardiology-research", rows: int = 0
) -> Request:
    thing = Crossing.model_validate({"kind": kind, "direction": direction, "site": "berlin", "rows": rows, "run": "r1"})
    return Request(action="cross", site="berlin", dataset=PATIENTS, purpose=purpose, crossing=thing)


def mistakes(text: str) -> str:
    with pytest.raises(Invalid) as caught:
        rules(text)
    return str(caught.value)


def test_the_schema_names_exactly_the_actions_of_the_spec():
    cedarpy.Schema.from_str(SCHEMA)
    assert set(ACTIONS) == set(Action.__args__)


def test_without_a_matching_permit_everything_is_refused():
    text = '@id("only.deploy")\npermit (principal, action == Action::"deploy", resource);'
    assert not rules(text).decide(Request(action="submit", job="heart")).allowed
    assert rules(text).decide(Request(action="deploy", model="heart@1")).allowed


def test_a_number_that_cedar_cannot_hold_is_refused():
    request = Request(
        action="cross",
        dataset=PATIENTS,
        crossing=Crossing(kind="update", direction="out", site="berlin", bytes=1 << 70),
    )
    looks = '@id("all.sizes")\npermit (principal, action, resource) when { context.bytes >= 0 };\n'
    decision = rules(looks).decide(request)
    assert not decision.allowed
    assert "could not be put" in str(decision)
    assert rules(PERMIT_ALL).decide(request).allowed, "nobody looks at it"


@pytest.mark.parametrize(
    ("condition", "seen"),
    [
        ('context.kind == "update" && ["a"].contains(context.purpose)', {"kind", "purpose"}),
        ("resource is Dataset && resource.rows > 5", set()),
        ("if context has epsilon then context.bytes < 5 else !context.wire.isEmpty()", {"epsilon", "bytes", "wire"}),
        ('{"a": context.rows} == {"a": 5}', {"rows"}),
        ('{"a": context} == {"a": context}', None),
    ],
)
def test_what_rules_look_at_is_found(condition: str, seen: set[str] | None):
    text = f'@id("a.b")\nforbid (principal, action, resource) when {{ {condition} }};'
    entries = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
    assert seen_by(entries.values()) == seen


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(action="submit", job="heart", purpose="\ud800"), "text that is none"),
        (Request(action="plan"), "names none"),
        (Request(action="deploy"), "names none"),
        (Request(action="cross", dataset=PATIENTS), "'cross'"),
        (
            Request(
                action="cross", crossing=Crossing(kind="metric", direction="out", site="berlin", dataset="patients")
            ),
            "'patients'",
        ),
        (
            Request(
                action="cross",
                purpose="cardiology-research",
                crossing=Crossing(kind="metric", direction="out", site="berlin", purpose="marketing"),
            ),
            "purpose",
        ),
        (
            Request(action="cross", site="zurich", crossing=Crossing(kind="metric", direction="out", site="berlin")),
            "site",
        ),
    ],
)
def test_a_question_that_contradicts_itself_is_refused_even_where_all_is_permitted(request_: Request, words: str):
    decision = rules(PERMIT_ALL).decide(request_)
    assert not decision.allowed
    assert words in str(decision)


def test_every_attribute_is_there_for_every_action():
    seen = " && ".join(f"context has {name}" for name in CONTEXT)
    text = f'@id("all.seen")\npermit (principal, action, resource)\nwhen {{ {seen} }};'
    asked = rules(text)
    thing = Crossing(kind="log", direction="out", site="berlin")
    for action, resources in ACTIONS.items():
        request = Request.model_validate(
            {
                "action": action,
                "dataset": PATIENTS if "Dataset" in resources else None,
                "model": "heart@1",
                "job": "heart",
                "crossing": thing if action == "cross" else None,
            }
        )
        assert asked.decide(request).allowed, action


def test_what_was_decided_before_is_not_taken_for_another_question():
    asked = rules(SITE_POLICY)
    allowed = crossing("update")
    for _ in range(2):
        assert asked.decide(allowed).allowed
        assert not asked.decide(crossing("data")).allowed
        assert not asked.decide(crossing("update", purpose="marketing")).allowed
        bare = PATIENTS.model_copy(update={"purposes": ()})
        assert not asked.decide(allowed.model_copy(update={"dataset": bare})).allowed
    assert "'marketing'" in str(asked.decide(crossing("update", purpose="marketing")))


def test_the_receiver_is_the_hub_outwards_and_the_site_inwards():
    out = translate(crossing("update"), 0.0).context
    inwards = translate(crossing("code", "in"), 0.0).context
    assert (out["to"], inwards["to"]) == ("hub", "berlin")


def test_a_models_rule_may_name_it_without_its_version():
    text = (
        '@id("heart.only")\npermit (principal, action == Action::"deploy", resource) when { resource.name == "heart" };'
    )
    assert rules(text).decide(Request(action="deploy", model="heart@3")).allowed
    assert not rules(text).decide(Request(action="deploy", model="lung@3")).allowed


def test_a_users_name_from_outside_is_data_and_never_syntax():
    user = 'ana" || true || "\n'
    text = '@id("bob.only")\npermit (principal == User::"bob", action, resource);'
    assert not rules(text).decide(Request(action="submit", job="heart", user=user)).allowed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '@id("a.b")\npermit (principal, action, resource is Dataset)\n// why\n'
            "when { resource.purposes.contains(context.purpse) };",
            "policy of berlin: line 4, rule a.b: context has no attribute 'purpse'; did you mean 'purpose'?",
        ),
        ('@id("a.b")\npermit (principal, action == Action::"plam", resource);', "did you mean 'plan'?"),
        ('@id("a.b")\npermit (principal, action, resource is Datset);', "did you mean 'Dataset'?"),
        (
            '@id("a.b")\npermit (principal, action == Action::"plan", resource) when { resource.purpose == "x" };',
            "did you mean 'purposes'?",
        ),
        (
            '@id("a.b")\npermit (principal, action, resource) when { resource.purposes.contains("x") };',
            "narrow the rule with `resource is Dataset`",
        ),
        (
            '@id("a.b")\npermit (principal, action, resource) when { context.rows > "3" };',
            "expected Long but saw String",
        ),
        ('@id("a.b")\npermit (principal, action, resource)\nwen { true };', "line 3, rule a.b"),
        ('@id("a.b")\npermit (principal, action, resource)\nwen { true };', "did you mean 'when'?"),
        (
            '@id("ok.x")\npermit (principal, action, resource);\n\n@id("a.b")\npermit (principal, action, resource)\n'
            "when {\n  context.rows >> 3\n};",
            "line 7, rule a.b: unexpected token `>`",
        ),
        ('@id("a.b")\npermit (principal, action, resource)\nwhen { true }', "end the rule with ;"),
        ('@id("a.b")\npermit (principal, action, resource) when { context.kind = "x" };', "compare with =="),
        ('@id("a.b")\npermit (principal, action, resource) when { context.kind == "x };', 'close the open "'),
        ("permit (principal, action, resource);", 'line 1: a rule without a name; write @id("owner.what")'),
        (PERMIT_ALL + PERMIT_ALL, "line 3, rule all.permit: the rule in line 1 has this name too"),
        ('@id("Has Space")\npermit (principal, action, resource);', "is no name"),
        ('@id("a.b")\npermit (principal == ?principal, action, resource);', "template"),
        ("// nothing here\n", "there is no rule in it"),
        ("", "there is no rule in it"),
        (f'@id("a.b")\npermit (principal, action, resource) when {{ {"(" * 2000}true{")" * 2000} }};', "nested"),
        (f'@id("a.b")\npermit (principal, action, resource) when {{ {"true && " * 2000}true }};', "chained"),
        ("//" + "x" * (1 << 19), "characters"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_its_mend(text: str, words: str):
    assert words in mistakes(text)


def test_every_mistake_is_told_at_once():
    told = mistakes(
        '@id("a.b")\npermit (principal, action == Action::"plam", resource);\n'
        '@id("c.d")\npermit (principal, action, resource) when { context.purpse == "x" };'
    )
    assert [line.partition(", rule ")[2][:3] for line in told.splitlines()] == ["a.b", "c.d"]


def test_a_semicolon_in_a_string_or_a_comment_does_not_end_a_rule():
    asked = rules(
        '// first; of two\n@id("a.b") @reason("no; never")\nforbid (principal, action, resource) // ;\n'
        'when { context.purpose == ";\\";" };\n' + PERMIT_ALL
    )
    assert asked.ids == ("a.b", "all.permit")


@pytest.mark.parametrize("kind", ["update", "metric", "model"])
def test_the_default_site_lets_results_out_for_a_granted_purpose_only(kind: CrossingKind):
    site = rules(SITE_POLICY)
    assert site.decide(crossing(kind)).allowed
    assert not site.decide(crossing(kind, purpose="marketing")).allowed


@pytest.mark.parametrize("kind", ["data", "prediction", "log", "code"])
def test_the_default_site_keeps_the_rest_in(kind: CrossingKind):
    assert not rules(SITE_POLICY).decide(crossing(kind)).allowed


@pytest.mark.parametrize("kind", ["model", "code", "query"])
def test_the_default_site_takes_work_in_for_a_granted_purpose_only(kind: CrossingKind):
    site = rules(SITE_POLICY)
    assert site.decide(crossing(kind, "in")).allowed
    assert not site.decide(crossing(kind, "in", purpose="marketing")).allowed
    assert not site.decide(crossing("update", "in")).allowed


def test_the_default_site_answers_queries_about_groups_that_are_large_enough():
    site = rules(SITE_POLICY)
    assert site.decide(crossing("query", rows=10)).allowed
    assert not site.decide(crossing("query", rows=9)).allowed


def test_a_permit_added_by_the_owner_does_not_let_rows_out():
    decision = rules(SITE_POLICY + PERMIT_ALL).decide(crossing("data"))
    assert not decision.allowed
    assert decision.rules == ("rows.stay",)


def test_the_default_hub_leaves_data_to_the_sites_but_takes_no_rows():
    hub = rules(HUB_POLICY, "hub")
    assert hub.decide(crossing("update")).allowed
    assert not hub.decide(crossing("data")).allowed
    assert hub.decide(Request(action="submit", job="heart", roles=("operator",))).allowed
    assert not hub.decide(Request(action="submit", job="heart", roles=("auditor",))).allowed
    assert hub.decide(Request(action="promote", model="heart@1", roles=("operator",))).allowed
    assert not hub.decide(Request(action="export", model="heart@1")).allowed


def test_threads_share_rules():
    site = rules(SITE_POLICY)
    seen: list[tuple[bool, bool]] = []

    def ask() -> None:
        seen.extend(
            (site.decide(crossing("update")).allowed, site.decide(crossing("update", purpose="x")).allowed)
            for _ in range(20)
        )

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(True, False)] * 80


def test_load_names_the_file_and_the_party(tmp_path: Path):
    path = tmp_path / "policy.cedar"
    with pytest.raises(NotFound, match="no such policy file"):
        load(path, "berlin")
    path.write_text(PERMIT_ALL)
    assert load(path, "berlin").party == "berlin"
    path.write_text(PERMIT_ALL.replace("permit (", "permitt ("))
    with pytest.raises(Invalid, match=r"policy\.cedar: policy of berlin: line 2.*did you mean 'permit'"):
        load(path, "berlin")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Invalid, match="UTF-8"):
        load(path, "berlin")


def test_a_live_policy_follows_its_file_and_survives_a_typo(tmp_path: Path):
    path = tmp_path / "policy.cedar"
    path.write_text(SITE_POLICY)
    live = LivePolicy(path, "berlin")
    assert live.decide(crossing("update")).allowed

    path.write_text(SITE_POLICY.replace('"update", ', ""))
    assert not live.decide(crossing("update")).allowed
    assert live.problem is None

    path.write_text(SITE_POLICY.replace("context.purpose", "context.purpse"))
    assert not live.decide(crossing("update")).allowed  # by the rules before the typo
    assert live.decide(crossing("metric")).allowed
    assert live.problem is not None
    assert "did you mean 'purpose'" in live.problem
    assert "stay in force" in live.problem

    path.unlink()
    assert live.decide(crossing("metric")).allowed
    assert live.problem is not None
    assert "no such policy file" in live.problem

    path.write_text(SITE_POLICY)
    assert live.decide(crossing("update")).allowed
    assert live.problem is None


def test_a_live_policy_needs_good_rules_to_begin_with(tmp_path: Path):
    path = tmp_path / "policy.cedar"
    path.write_text("permit (principal, action, resource);")
    with pytest.raises(Invalid, match="without a name"):
        LivePolicy(path, "berlin")
