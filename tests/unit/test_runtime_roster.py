"""Who may come in: invitations, secrets and sessions, and what the journal alone tells of them afterwards."""

import pytest

from atoll.errors import Denied, Invalid, NotFound
from atoll.journal import Journal
from atoll.runtime.machine import AssignTo
from atoll.runtime.membership import Membership
from atoll.runtime.roster import Roster
from atoll.runtime.tree import Tree
from atoll.spec.document import sha256
from atoll.spec.fleet import Site
from atoll.spec.message import Hello, Release, Welcome

# --- who is there


def test_a_site_that_opens_a_session_is_welcomed_and_known_from_its_hello(house):
    assert [message.kind for message in house.sent["ada"]] == [Welcome.model_fields["kind"].default]
    assert house.desk.presence.names() == ("ada", "bob", "mallory")
    assert house.desk.presence.fleet().holding("rows")[0].name == "ada"


def test_a_site_that_calls_itself_by_another_name_is_denied(house):
    with pytest.raises(Denied, match="mallory: says it is 'ada'; a site speaks for itself only"):
        house.desk.heard("mallory", Hello(site=Site(name="ada", owner="mallory")))
    assert house.desk.presence.fleet().site("ada").owner == "me"


def test_a_hub_word_from_a_site_is_invalid(house):
    for message in (Release(run="run"), Welcome(heartbeat=1.0)):
        with pytest.raises(Invalid, match="is the hub's to send, not a site's"):
            house.desk.heard("mallory", message)


def test_a_session_that_ends_after_a_newer_one_began_takes_nobody_away(house):
    old, new = house.sent["ada"].append, [].append
    house.desk.opened("ada", new)
    assert not house.desk.presence.here("ada")  # until it says hello, and is given its work anew
    house.desk.heard("ada", Hello(site=Site(name="ada")))
    house.desk.closed("ada", old, "late")
    assert house.desk.presence.here("ada")
    house.desk.closed("ada", new, "gone")
    assert not house.desk.presence.here("ada")


def test_a_run_is_told_who_left_and_who_came_back(house):
    house.run()
    assert house.conductor.states["run"].live == {"ada", "bob"}
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    house.settled()
    assert house.conductor.states["run"].live == {"ada"}
    house.performed.clear()
    house.connect("bob")
    house.settled()
    assert house.performed == [AssignTo("bob")]


# --- membership, folded from the journal


@pytest.fixture
def office(tmp_path):
    """A membership with its journal, and what the fold of that journal by another process says."""
    made = Office(tmp_path)
    yield made
    made.journal.close()


class Office:
    def __init__(self, home):
        self.home, self.journal = home, Journal(home / "journal.db", "hub")
        self.membership = Membership(home, self.record, Tree())

    def record(self, *events, actor="hub"):
        for entry in self.journal.append(*events, actor=actor):
            self.membership.seen(entry)

    def again(self):
        found = Membership(self.home, self.record, Tree())
        for entry in self.journal.entries():
            found.seen(entry)
        return found


def test_an_invitation_is_journalled_by_its_digest_and_only_the_invited_can_be_revoked(office):
    token = office.membership.invite("oslo", 1.0, 7443)
    [entry] = office.journal.entries()
    assert (entry.event.kind, entry.event.site) == ("site.invited", "oslo")
    assert token not in str(entry)
    with pytest.raises(NotFound, match="'rome' was never invited here"):
        office.membership.revoke("rome", "eve")
    office.membership.revoke("oslo", "eve")
    assert [entry.event.kind for entry in office.journal.entries()] == ["site.invited", "site.revoked"]


def test_the_next_hub_knows_who_was_invited_and_who_is_out(office):
    for site in ("oslo", "rome"):
        office.membership.invite(site, 1.0, 7443)
    office.membership.revoke("rome", "eve")
    again = office.again()
    with pytest.raises(NotFound):
        again.revoke("rome", "eve")
    again.revoke("oslo", "eve")


@pytest.mark.parametrize("hours", [0.0, -1.0, 24.0 * 366])
def test_an_invitation_is_for_a_while_and_for_no_longer_than_a_year(office, hours):
    with pytest.raises(Invalid, match=f"hours: {hours:g}: an invitation is good for"):
        office.membership.invite("oslo", hours, 7443)
    assert list(office.journal.entries()) == []


def test_the_secret_of_a_site_that_the_hub_started_lets_in_that_site_and_only_its_latest_life(house):
    house.desk.presence.trust("oslo", sha256(b"first"))
    house.desk.presence.trust("oslo", sha256(b"second"))
    assert house.desk.admits("oslo", "second")
    for site, secret in (("oslo", "first"), ("oslo", ""), ("rome", "second")):
        assert not house.desk.admits(site, secret)


def test_sites_are_known_but_away_after_the_journal_is_folded_again(house):
    house.settled()
    again = Roster()
    for entry in house.journal.entries():
        again.seen(entry)
    names = ("ada", "bob", "mallory")
    assert {name: view.connected for name, view in again.sites.items()} == dict.fromkeys(names, False)
