"""Rules tried on the past: each entry is put to them as it was asked then, and what is not known is left out."""

from datetime import UTC, datetime

from atoll.policy.defaults import SITE_POLICY
from atoll.policy.replay import replay
from atoll.policy.rules import Rules
from atoll.spec.event import Crossed, Decided, Event, Lost
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Crossing, Decision, Policy, Request

PATIENTS = Dataset(
    name="patients", rows=303, fingerprint="sha256:" + "0" * 64, purposes=("care",), columns={"a": "int"}
)
YES, NO = Decision(allowed=True, party="berlin"), Decision(allowed=False, party="berlin")
SMALL = SITE_POLICY + (
    '@id("b.small")\nforbid (principal, action == Action::"cross", resource) when { context.bytes > 100 };'
)


def rules(text: str = SITE_POLICY) -> Rules:
    return Rules(Policy(party="berlin", text=text))


def planned(run: str | None, decision: Decision = YES, **fields: object) -> Decided:
    known = {"action": "plan", "site": "berlin", "dataset": PATIENTS, "purpose": "care", "job": "heart"}
    request = Request.model_validate({**known, **fields})
    return Decided(action="plan", subject="berlin/patients", run=run, decision=decision, request=request.kept)


def crossed(run: str, size: int, decision: Decision = YES) -> Crossed:
    known = {"kind": "update", "direction": "out", "site": "berlin", "dataset": "patients", "purpose": "care"}
    return Crossed(crossing=Crossing.model_validate({**known, "run": run, "bytes": size}), decision=decision)


def tried(events: list[Event], text: str = SITE_POLICY):
    return replay(((float(time), event) for time, event in enumerate(events)), rules(text))


def test_rules_as_they_were_turn_nothing():
    found = tried([planned("a"), crossed("a", 500), planned("b"), crossed("b", 50)])
    assert (found.questions, found.runs, found.turned) == (4, ("a", "b"), ())


def test_the_runs_that_would_have_been_refused_are_named_with_rule_and_number():
    past: list[Event] = [planned("a"), crossed("a", 500), planned("b"), crossed("b", 50), crossed("a", 501)]
    found = tried(past, SMALL)
    assert (found.refused, found.allowed) == (("a",), ())
    [turned] = found.turned
    assert (turned.run, turned.what, turned.count, turned.first, turned.rules) == (
        "a",
        "update out",
        2,
        1.0,
        ("b.small",),
    )
    assert turned.words == "berlin refuses: size in bytes 500 is larger than 100 (rule b.small)"


def test_what_was_refused_and_would_be_allowed_is_told_by_its_job_where_there_was_no_run():
    found = tried([planned(None, NO), planned("a"), crossed("a", 5, NO)])
    assert (found.refused, found.allowed) == ((), ("heart", "a"))
    assert [one.what for one in found.turned] == ["plan patients", "update out"]


def test_a_crossing_is_asked_on_the_terms_that_held_when_it_crossed():
    bare = PATIENTS.model_copy(update={"purposes": ()})
    found = tried([planned("a"), crossed("a", 5), planned("a", NO, dataset=bare), crossed("a", 6, NO)])
    assert found.turned == ()


def test_grants_end_by_the_time_of_the_entry_and_not_by_todays():
    ending = PATIENTS.model_copy(update={"until": {"care": datetime.fromtimestamp(2, UTC)}})
    found = tried([planned("a", dataset=ending), crossed("a", 5), crossed("a", 6)])
    assert [(one.what, one.first, one.rules) for one in found.turned] == [("update out", 2.0, ("terms.ended",))]


def test_what_the_journal_does_not_tell_is_counted_and_left_out():
    said = Decided(action="plan", subject="berlin/patients", run="a", decision=YES)
    found = tried([said, crossed("a", 5), Lost(run="a", site="berlin")], SMALL)
    assert (found.questions, found.unknown, found.runs, found.turned) == (0, 2, (), ())


def test_what_crossed_for_the_sake_of_a_plan_is_asked_on_the_plans_terms():
    found = tried([crossed("a", 500), planned("a")], SMALL)
    assert (found.questions, found.unknown, found.refused) == (2, 0, ("a",))
    assert found.turned[0].first == 0.0


def test_what_another_party_refused_is_not_allowed_by_these_rules():
    assert tried([planned("a", Decision(allowed=False, party="zurich"))]).turned == ()
    assert tried([planned("a", Decision(allowed=False, party="berlin"))]).allowed == ("a",)


def test_what_is_kept_of_a_question_names_no_column():
    assert planned("a").request == planned("a").request
    kept = planned("a").request
    assert kept is not None
    assert kept.dataset == PATIENTS.model_copy(update={"columns": {}})
