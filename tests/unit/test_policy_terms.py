"""Terms of a dataset: grants that end, transforms that no job can leave out, and that no rule takes either away."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import cedarpy
import pytest

from atoll.errors import Invalid
from atoll.policy.defaults import HUB_POLICY, SITE_POLICY
from atoll.policy.question import translate
from atoll.policy.rules import Rules
from atoll.policy.schema import CONTEXT, ENTITIES
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Policy, Request
from atoll.spec.wire import Transform, clipped

END = datetime(2027, 2, 1, tzinfo=UTC)
BEFORE, AFTER = END.timestamp() - 1, END.timestamp()
PATIENTS = Dataset(
    name="patients", rows=303, fingerprint="sha256:" + "0" * 64, purposes=("care", "research"), until={"care": END}
)
CLIPPED = PATIENTS.model_copy(update={"wire": (Transform(kind="clip", value=1.0), Transform(kind="int8"))})
PERMIT_ALL = '@id("all.permit")\npermit (principal, action, resource);\n'
ACTIONS = ["plan", "open", "cross"]


def rules(text: str = SITE_POLICY, party: str = "berlin") -> Rules:
    return Rules(Policy(party=party, text=text))


def asked(action: str = "open", purpose: str = "care", dataset: Dataset = PATIENTS, **crossing: object) -> Request:
    thing = {"kind": "update", "direction": "out", "site": "berlin", **crossing} if action == "cross" else None
    known = {"action": action, "site": "berlin", "dataset": dataset, "purpose": purpose, "crossing": thing}
    return Request.model_validate(known)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("text", [SITE_POLICY, PERMIT_ALL])
def test_a_grant_holds_until_its_end_and_is_refused_from_then_on_whatever_rules_permit(action: str, text: str):
    berlin = rules(text)
    for _ in range(2):  # also from what is remembered
        assert berlin.decide(asked(action), BEFORE).allowed
        refused = berlin.decide(asked(action), AFTER)
        assert not refused.allowed
        assert refused.rules == ("terms.ended",)
        assert str(refused) == (
            "berlin refuses: the grant of 'patients' for purpose 'care' ended on 2027-02-01 00:00 UTC "
            "(rule terms.ended)"
        )


@pytest.mark.parametrize("action", ACTIONS)
def test_the_end_of_one_grant_is_none_of_anothers(action: str):
    assert rules().decide(asked(action, "research"), AFTER).allowed


def test_time_passes_by_itself():
    past = PATIENTS.model_copy(update={"until": {"care": datetime(2020, 1, 1, tzinfo=UTC)}})
    assert not rules().decide(asked(dataset=past)).allowed
    assert rules().decide(asked(purpose="research", dataset=past)).allowed


def test_the_hubs_rules_leave_terms_to_the_site():
    assert rules(HUB_POLICY, "hub").decide(asked("plan"), AFTER).allowed


@pytest.mark.parametrize("text", [SITE_POLICY, PERMIT_ALL])
@pytest.mark.parametrize(
    ("wire", "clip", "lacks"),
    [
        ((), 0.0, "clip at 1 or less and int8"),
        (("int8",), 0.0, "clip at 1 or less"),
        (("clip",), 0.5, "int8"),
        (("clip", "int8"), 5.0, "clip at 1 or less"),
        (("clip", "int8"), 0.0, "clip at 1 or less"),
    ],
)
def test_an_update_without_what_its_dataset_asks_for_stays(text: str, wire: tuple[str, ...], clip: float, lacks: str):
    refused = rules(text).decide(asked("cross", "research", CLIPPED, wire=wire, clip=clip), BEFORE)
    assert refused.rules == ("terms.wire",)
    assert str(refused) == (
        f"berlin refuses: an update must pass through {lacks} before it leaves, by the terms of 'patients'; "
        f"the job's wire is {list(wire)} (rule terms.wire)"
    )


@pytest.mark.parametrize("clip", [1.0, 0.1])
def test_an_update_that_has_it_or_more_may_leave(clip: float):
    wire = ("clip", "topk", "int8", "zstd")
    assert rules().decide(asked("cross", "research", CLIPPED, wire=wire, clip=clip), BEFORE).allowed


@pytest.mark.parametrize(("kind", "direction"), [("metric", "out"), ("model", "out"), ("model", "in")])
def test_what_is_asked_of_updates_is_asked_of_nothing_else(kind: str, direction: str):
    request = asked("cross", "research", CLIPPED, kind=kind, direction=direction)
    assert rules().decide(request, BEFORE).allowed


KEPT = PATIENTS.model_copy(update={"regions": ("ch", "eu")})


@pytest.mark.parametrize("text", [SITE_POLICY, PERMIT_ALL])
@pytest.mark.parametrize("kind", ["update", "metric", "model"])
def test_what_is_learned_goes_only_where_its_dataset_may_be_kept(text: str, kind: str):
    for region in ("ch", "eu"):
        assert rules(text).decide(asked("cross", "research", KEPT, kind=kind, region=region), BEFORE).allowed
    for region in ("us", ""):
        refused = rules(text).decide(asked("cross", "research", KEPT, kind=kind, region=region), BEFORE)
        assert refused.rules == ("terms.region",)
        assert f"the receiver's region '{region}' is not among the dataset's regions 'ch', 'eu'" in str(refused)
    assert rules(text).decide(asked("cross", "research", PATIENTS, kind=kind, region="us"), BEFORE).allowed


def test_work_comes_in_from_anywhere():
    request = asked("cross", "research", KEPT, kind="model", direction="in", region="us")
    assert rules().decide(request, BEFORE).allowed


def test_several_clips_hold_to_the_smallest_norm():
    assert clipped((Transform(kind="clip", value=3.0), Transform(kind="clip", value=2.0))) == 2.0
    assert clipped((Transform(kind="int8"),)) == 0.0


def test_no_rule_of_an_owners_takes_the_name_of_a_term():
    with pytest.raises(Invalid, match=r"names that begin with terms\. are of datasets' terms"):
        rules('@id("terms.wire")\npermit (principal, action, resource);')
    assert rules().ids[-1] == "rows.stay"


def test_an_end_of_what_is_not_granted_is_a_mistake_and_no_grant_without_an_end():
    with pytest.raises(ValueError, match="until: 'caer' is none of its purposes"):
        Dataset(name="x", rows=1, fingerprint="sha256:" + "0" * 64, purposes=("care",), until={"caer": END})


FORBID = PERMIT_ALL + '@id("b.c")\nforbid (principal, action, resource) when { %s };'


@pytest.mark.parametrize("attribute", list(CONTEXT))
def test_a_question_that_lost_what_a_forbid_looks_at_is_refused(attribute: str):
    condition = {"Set<String>": "!context.{0}.isEmpty()", "Long": "context.{0} > 5", "String": 'context.{0} == "x"'}
    condition |= {"decimal": 'context.{0}.lessThan(decimal("1.0"))', "Bool": "context.{0}"}
    text = FORBID % condition[CONTEXT[attribute]].format(attribute)
    assert rules(text).decide(asked("cross", wire=())).allowed
    question = translate(asked("cross"), BEFORE)
    around = {name: value for name, value in question.context.items() if name != attribute}
    outcome = replace(question, around=json.dumps(around)).put(cedarpy.PolicySet.from_str(text))
    assert not outcome.allowed
    assert outcome.errors


@pytest.mark.parametrize("attribute", list(ENTITIES["Dataset"]))
def test_a_dataset_that_lost_what_a_forbid_looks_at_is_no_question_at_all(attribute: str):
    question = translate(asked("open"), BEFORE)
    user, dataset = json.loads(question.parties)
    del dataset["attrs"][attribute]
    lost = replace(question, parties=json.dumps([user, dataset]))
    with pytest.raises(Invalid, match="does not fit the policy schema"):
        lost.put(cedarpy.PolicySet.from_str(PERMIT_ALL))
