"""Roles as the hub's rules have them: a table of who may do what, and what is given to two people only."""

import pytest

from atoll.errors import Invalid
from atoll.policy.defaults import HUB_POLICY
from atoll.policy.rules import Rules
from atoll.spec.policy import Policy, Request
from atoll.spec.user import ROLES

HUB = Rules(Policy(party="hub", text=HUB_POLICY))
ACTS = {
    "view": {},
    "audit": {},
    "submit": {"job": "heart"},
    "cancel": {"job": "heart", "by": "ada"},
    "release": {"model": "heart@1"},
    "promote": {"model": "heart@1"},
    "deploy": {"model": "heart@1"},
    "export": {"model": "heart@1"},
    "erase": {"model": "heart@1"},
    "approve": {"model": "heart@1", "by": "ada"},
    "sites": {"action": "administer", "part": "sites"},
    "users": {"action": "administer", "part": "users"},
}
MAY = {
    "viewer": {"view"},
    "auditor": {"view", "audit"},
    "scientist": {"view", "submit", "release"},
    "operator": {"view", "audit", "submit", "cancel", "release", "promote", "deploy", "export", "approve", "sites"},
    "owner": set(ACTS),
}
TWO = """
@id("hub.alone") permit (principal, action == Action::"promote", resource is Model)
when { principal.roles.contains("owner") };
@id("hub.both") @approval("operator, owner")
permit (principal, action in [Action::"promote", Action::"submit"], resource)
when { principal.roles.contains("scientist") };
"""


def asked(act: str, **more: object) -> Request:
    about = {"action": act, "user": "bob", **ACTS[act], **more}
    return Request.model_validate(about)


@pytest.mark.parametrize("role", [*ROLES, "nobody"])
def test_each_role_may_do_what_the_table_says_and_nothing_else(role: str):
    allowed = {act for act in ACTS if HUB.decide(asked(act, roles=(role,))).allowed}
    assert allowed == MAY.get(role, set())


def test_ones_own_run_is_ones_own_to_cancel_and_ones_own_request_is_nobodys_to_approve_oneself():
    assert HUB.decide(asked("cancel", roles=("scientist",), by="bob")).allowed
    refused = HUB.decide(asked("approve", roles=("owner",), by="bob"))
    assert (refused.allowed, refused.rules) == (False, ("hub.two-people",))


def test_a_project_is_worked_in_by_its_people_and_by_owners():
    other = {"project": "lung"}
    assert not HUB.decide(asked("submit", roles=("operator",), **other)).allowed
    assert HUB.decide(asked("submit", roles=("operator",), projects=("lung",), **other)).allowed
    assert HUB.decide(asked("submit", roles=("owner",), **other)).allowed


@pytest.mark.parametrize(
    ("role", "projects", "allowed"),
    [
        ("scientist", ("lung",), True),
        ("scientist", ("heart", "default"), False),
        ("operator", (), True),
        ("owner", (), True),
        ("viewer", ("lung",), False),
        ("auditor", ("lung",), False),
    ],
)
def test_results_are_released_to_people_of_the_jobs_project_and_to_operators_and_owners(role, projects, allowed):
    request = Request(action="release", user="bob", job="ask", project="lung", roles=(role,), projects=projects)
    assert HUB.decide(request).allowed == HUB.permits(request) == allowed


def test_what_needs_another_person_is_not_permitted_to_one_alone():
    rules = Rules(Policy(party="hub", text=TWO))
    asks = asked("promote", roles=("scientist",)), asked("promote", roles=("scientist", "owner"))
    assert [rules.permits(one) for one in asks] == [False, True]


def test_what_only_marked_permits_allow_needs_another_person():
    rules = Rules(Policy(party="hub", text=TWO))
    decision = rules.decide(asked("promote", roles=("scientist",)))
    assert (decision.allowed, decision.approvers, decision.rules) == (False, ("operator", "owner"), ("hub.both",))
    assert "hub needs the approval of another operator or owner for it (rule hub.both)" in str(decision)
    alone = rules.decide(asked("promote", roles=("scientist", "owner")))
    assert (alone.allowed, alone.approvers, alone.rules) == (True, (), ("hub.alone",))
    refused = rules.decide(asked("promote", roles=("viewer",)))
    assert (refused.allowed, refused.approvers) == (False, ())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ('@approval("operater") permit (principal, action == Action::"promote", resource);', "did you mean 'operator'"),
        ('@approval permit (principal, action == Action::"promote", resource);', "no role ''"),
        ('@approval("owner") forbid (principal, action == Action::"promote", resource);', "is of a permit"),
        ('@approval("owner") permit (principal, action, resource);', "name one or more of them"),
        ('@approval("owner") permit (principal, action == Action::"approve", resource);', "is for submit, promote"),
    ],
)
def test_an_approval_that_nobody_could_give_is_a_mistake(rule: str, words: str):
    with pytest.raises(Invalid, match=words):
        Rules(Policy(party="hub", text=f'@id("a") {rule}'))


def test_a_site_decides_by_itself():
    rule = '@id("a") @approval("owner") permit (principal, action == Action::"submit", resource);'
    with pytest.raises(Invalid, match="@approval is for a hub's rules"):
        Rules(Policy(party="zurich", text=rule))
