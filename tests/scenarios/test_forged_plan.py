"""A hub that sends what no policy allowed: the site puts every assignment to its own rules and its own list of data."""

from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.errand import Errand
from atoll.spec.document import sha256
from atoll.spec.policy import Request
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform
from tests.unit.places import CODE, STEPS, WAIT, assign

NO_CODE = SITE_POLICY + (
    '\n@id("lyon.reviewed")\n@reason("this code was not reviewed")\n'
    'forbid (principal, action == Action::"cross", resource) when { context.kind == "code" };'
)


def test_a_plan_with_a_stricter_clip_is_carried_out(lyon, errand):
    lyon.place.catalogue.require("rows", (Transform(kind="clip", value=1.0),))
    errand.assign(assign(sync=Sync(period=STEPS, wait={"patience": WAIT}, wire=(Transform(kind="clip", value=0.5),))))
    lyon.hub.wait_taken()
    [crossed] = lyon.crossings("update")
    assert (crossed.crossing.wire, crossed.crossing.clip) == (("clip",), 0.5)


def test_code_that_lies_here_is_run_only_while_the_rules_would_let_it_in(lyon, errand):
    errand.assign(assign())
    lyon.hub.wait_taken()
    lyon.policy = NO_CODE
    other = Errand(lyon.place, "other")
    try:
        other.assign(assign(run="other"))
        assert "this code was not reviewed (rule lyon.reviewed)" in lyon.hub.wait("refusal", run="other").words
    finally:
        other.end(keep=False)
        assert other.wait(WAIT)
    assert lyon.hub.given.count("code") == 1
    told = [
        (crossed.crossing.digest, crossed.crossing.bytes, crossed.decision.allowed)
        for crossed in lyon.crossings("code")
    ]
    assert told == [(sha256(CODE), len(CODE), True), (sha256(CODE), 0, False)]


def asked(lyon, **fields):
    known = {"action": "plan", "site": "lyon", "dataset": lyon.dataset, "purpose": "care", "job": "job"}
    return Request.model_validate({**known, **fields})


def test_a_hub_that_describes_the_data_as_it_likes_is_answered_about_what_is_here(lyon):
    assert lyon.place.answer(asked(lyon)).decision.allowed
    forged = lyon.dataset.model_copy(update={"purposes": ("care", "marketing")})
    refused = lyon.place.answer(asked(lyon, dataset=forged, purpose="marketing")).decision
    assert not refused.allowed
    assert "purpose 'marketing' is not among the granted 'care'" in str(refused)
    lyon.policy = SITE_POLICY + (
        '\n@id("lyon.here")\nforbid (principal, action == Action::"plan", resource) when { resource.region == "here" };'
    )
    assert not lyon.place.answer(asked(lyon, region="elsewhere", owner="somebody")).decision.allowed


def test_a_dataset_that_is_not_here_is_refused_in_words(lyon):
    other = lyon.dataset.model_copy(update={"name": "other"})
    refused = lyon.place.answer(asked(lyon, dataset=other)).decision
    assert (refused.allowed, refused.party) == (False, "lyon")
    assert "this site has no 'other'" in str(refused)


def test_who_may_not_plan_here_is_journalled_here_and_who_may_is_only_once_it_comes_to_work(lyon):
    lyon.place.answer(asked(lyon))
    assert lyon.decisions() == []
    lyon.place.answer(asked(lyon, purpose="marketing"))
    [said] = lyon.decisions()
    assert (said.action, said.decision.allowed, said.request.purpose) == ("plan", False, "marketing")
    account = lyon.place.account(asked(lyon, purpose="marketing"))
    came_under = ["site.purpose", "terms.ended", "terms.budget"]
    assert (account.decision.allowed, [one.rule for one in account.rules]) == (False, came_under)
    assert len(lyon.decisions()) == 1
