"""A hub's users, approvals and projects over a journal of their own, with nothing under them that runs."""

from contextlib import contextmanager

from atoll.boundary.gate import Gate
from atoll.journal import Journal
from atoll.policy.defaults import HUB_POLICY
from atoll.runtime.approvals import PATIENCE, Approvals
from atoll.runtime.quotas import Quotas
from atoll.runtime.users import Users
from atoll.spec.model import Aliased
from atoll.spec.user import User
from tests.unit.houses import rules

TWO = """
@id("two.models") @approval("operator")
permit (principal, action in [Action::"promote", Action::"deploy"], resource)
when { principal.roles.contains("scientist") };
@id("two.submit") @approval("operator") permit (principal, action == Action::"submit", resource)
when { principal.roles.contains("viewer") };
"""
ADA, BOB, EVE = (
    User(name="ada", roles=("scientist",)),
    User(name="bob", roles=("operator",)),
    User(name="eve", roles=("auditor",)),
)


class People:
    """The folds of one hub that are about people; made again over the same home they know what the last ones did."""

    def __init__(self, home, policy=HUB_POLICY + TWO, states=None, patience=PATIENCE):
        self.policy = policy
        self.journal = Journal(home / "journal.db", "hub")
        gate = Gate("hub", lambda: rules(self.policy), self.record)
        self.users = Users(self.record, gate)
        self.approvals = Approvals(gate, self.record, self.users, patience)
        self.quotas = Quotas(self.record, states if states is not None else {})
        self.carried = []
        for entry in self.journal.entries():
            self.seen(entry)

    def record(self, *events, actor="hub"):
        for entry in self.journal.append(*events, actor=actor):
            self.seen(entry)

    def seen(self, entry):
        for fold in (self.users, self.approvals, self.quotas):
            fold.seen(entry)

    @contextmanager
    def carry(self, wanted, user):
        self.carried.append((wanted, user))
        name, _, version = wanted.model.partition("@")
        yield Aliased(model=name, alias=wanted.alias, version=int(version), user=user.name)

    def kinds(self):
        return [entry.event.kind for entry in self.journal.entries()]
