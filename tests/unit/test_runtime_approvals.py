"""Two people for what a rule marks: kept as asked, another's word, carried out once, also by the next hub."""

import pytest

from atoll.errors import Denied, Invalid, NotFound, Unapproved, Unavailable
from atoll.policy.defaults import HUB_POLICY
from atoll.spec.model import Aliased
from atoll.spec.policy import Decision
from atoll.spec.user import Promotion, Submission, User
from tests.unit.houses import JOB
from tests.unit.people import ADA, BOB, EVE, TWO, People

CHAMPION = Promotion(model="heart@1", alias="champion")


@pytest.fixture
def people(tmp_path):
    made = People(tmp_path)
    for user in (ADA, BOB, EVE):
        made.users.put(user, "local")
    yield made
    made.journal.close()


def wait_for(people, user=ADA, wanted=CHAMPION):
    """Ask for what two people are wanted for; return its name and digest."""
    with pytest.raises(Unapproved, match="needs the approval of another operator"):
        people.approvals.need(user, wanted, "heart@1 as champion")
    asked = people.approvals.views()[-1]
    assert asked.state == "waiting"
    return asked.approval, asked.digest


def test_what_may_be_done_alone_waits_for_nobody(people):
    people.approvals.need(BOB, CHAMPION, "heart@1 as champion")
    assert people.approvals.views() == []


def test_another_approves_and_it_is_carried_out_once_as_it_was_asked(people):
    name, digest = wait_for(people)
    assert wait_for(people) == (name, digest), "the same thing asked for again is the same request"
    view = people.approvals.approve(name, digest, BOB, people.carry)
    assert (view.state, view.by, view.user) == ("approved", "bob", "ada")
    assert people.carried == [(CHAMPION, ADA)]
    assert people.kinds()[-2:] == ["approval.answered", "model.aliased"]
    with pytest.raises(Invalid, match="is approved"):
        people.approvals.approve(name, digest, BOB, people.carry)
    assert len(people.carried) == 1


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (ADA, "nobody approves what they asked for themselves"),
        (User(name="ada", roles=("operator", "owner")), "nobody approves what they asked for themselves"),
        (EVE, "none of the roles 'operator', 'owner'"),
        (User(name="olga", roles=("owner",)), "'olga' is no operator, as the rule wants it"),
    ],
)
def test_who_asked_and_who_has_not_the_role_cannot_approve(people, user, words):
    name, digest = wait_for(people)
    with pytest.raises(Denied, match=words):
        people.approvals.approve(name, digest, user, people.carry)
    assert people.carried == []
    assert people.approvals.views()[0].state == "waiting"


def test_self_approval_is_refused_whatever_the_rules_say(people):
    people.policy = TWO + '@id("any") permit (principal, action == Action::"approve", resource);'
    name, digest = wait_for(people)
    with pytest.raises(Denied, match="another user can"):
        people.approvals.approve(name, digest, User(name="ada", roles=("operator",)), people.carry)


def test_what_was_not_looked_at_is_not_approved(people):
    name, digest = wait_for(people)
    with pytest.raises(Invalid, match="is not what was asked for"):
        people.approvals.approve(name, "sha256:" + 64 * "0", BOB, people.carry)
    with pytest.raises(NotFound, match=f"did you mean '{name}'"):
        people.approvals.approve(name[:-1], digest, BOB, people.carry)
    [asked] = [entry.event for entry in people.journal.entries(kinds=("approval.asked",))]
    other = Promotion(model="heart@2", alias="champion")
    people.record(asked.model_copy(update={"approval": "ask-other", "wanted": other}))
    with pytest.raises(Invalid, match="is not what was asked for"):
        people.approvals.approve("ask-other", digest, BOB, people.carry)
    assert people.carried == []


def test_a_rejected_request_and_one_that_was_withdrawn_are_over(people):
    name, digest = wait_for(people)
    assert people.approvals.reject(name, digest, BOB).state == "rejected"
    again, _ = wait_for(people)
    assert again != name
    assert people.approvals.reject(again, digest, ADA).by == "ada"
    with pytest.raises(Invalid, match="is rejected"):
        people.approvals.approve(again, digest, BOB, people.carry)
    third, _ = wait_for(people)
    with pytest.raises(Denied):
        people.approvals.reject(third, digest, EVE)


def test_the_next_hub_knows_what_waits_and_what_is_done(people, tmp_path):
    done, digest = wait_for(people)
    people.approvals.approve(done, digest, BOB, people.carry)
    other = Promotion(model="heart@2", alias="champion")
    name, digest = wait_for(people, wanted=other)
    people.journal.close()
    again = People(tmp_path)
    assert [view.state for view in again.approvals.views()] == ["approved", "waiting"]
    again.approvals.approve(name, digest, BOB, again.carry)
    assert again.carried == [(other, ADA)]
    assert sum(kind == Aliased.model_fields["kind"].default for kind in again.kinds()) == 2
    again.journal.close()


def test_what_could_not_be_done_still_waits(people):
    def fails(wanted, user):
        raise Unavailable("no room")

    name, digest = wait_for(people)
    with pytest.raises(Unavailable):
        people.approvals.approve(name, digest, BOB, fails)
    assert people.approvals.views()[0].state == "waiting"
    assert people.approvals.approve(name, digest, BOB, people.carry).state == "approved"


def test_rules_and_roles_of_now_count(people):
    name, digest = wait_for(people)
    people.policy = HUB_POLICY
    with pytest.raises(Denied, match="'ada' has none of the roles"):
        people.approvals.approve(name, digest, BOB, people.carry)
    people.policy = HUB_POLICY + TWO
    people.users.remove("ada", "local")
    with pytest.raises(Denied, match="'ada' is no user of this hub any more"):
        people.approvals.approve(name, digest, BOB, people.carry)
    assert people.carried == []


def test_nothing_waits_for_ever(tmp_path):
    people = People(tmp_path, patience=-1.0)
    with pytest.raises(Unapproved):
        people.approvals.need(ADA, CHAMPION, "heart@1 as champion")
    [view] = people.approvals.views()
    assert view.state == "expired"
    with pytest.raises(Invalid, match="is expired"):
        people.approvals.approve(view.approval, view.digest, BOB, people.carry)
    people.journal.close()


def test_a_run_that_waits_says_so_and_how_it_ended(people):
    decision = Decision(allowed=False, party="hub", approvers=("operator",))
    asked = people.approvals.keep(ADA, Submission(run="heart-1", job=JOB), decision)
    view = people.approvals.run_view("heart-1")
    assert (view.state, view.over, view.user) == ("waiting", False, "ada")
    assert view.words == f"waits for approval by another operator (they run: atoll approve {asked.approval})"
    people.approvals.reject(asked.approval, asked.digest, ADA)
    view = people.approvals.run_view("heart-1")
    assert (view.state, view.error, view.words) == ("failed", "Unapproved", f"ada rejected {asked.approval}")
    assert people.approvals.runs() == ["heart-1"]
    assert people.approvals.run_view("heart-2") is None
