"""Who may come in: tokens, secrets and sessions, and what the journal alone tells of them afterwards."""

import time

import pytest

from atoll.errors import Denied, Invalid
from atoll.runtime.machine import AssignTo
from atoll.runtime.roster import Roster
from atoll.spec.document import sha256
from atoll.spec.event import Invited
from atoll.spec.fleet import Site
from atoll.spec.message import Hello, Release, Welcome
from tests.unit.houses import SECRET, House


@pytest.fixture
def house(tmp_path):
    made = House(tmp_path)
    made.connect("ada", "bob", "mallory")
    yield made
    made.close()


# --- who is there


def test_a_site_that_opens_a_session_is_welcomed_and_known_from_its_hello(house):
    assert [message.kind for message in house.sent["ada"]] == [Welcome.model_fields["kind"].default]
    assert house.desk.names() == ("ada", "bob", "mallory")
    assert house.desk.fleet().holding("rows")[0].name == "ada"


def test_a_site_that_calls_itself_by_another_name_is_denied(house):
    with pytest.raises(Denied, match="mallory: says it is 'ada'; a site speaks for itself only"):
        house.desk.heard("mallory", Hello(site=Site(name="ada", owner="mallory")))
    assert house.desk.fleet().site("ada").owner == "me"


def test_a_hub_word_from_a_site_is_invalid(house):
    for message in (Release(run="run"), Welcome(heartbeat=1.0)):
        with pytest.raises(Invalid, match="is the hub's to send, not a site's"):
            house.desk.heard("mallory", message)


def test_a_session_that_ends_after_a_newer_one_began_takes_nobody_away(house):
    old, new = house.sent["ada"].append, [].append
    house.desk.opened("ada", new)
    assert not house.desk.here("ada")  # until it says hello, and is given its work anew
    house.desk.heard("ada", Hello(site=Site(name="ada")))
    house.desk.closed("ada", old, "late")
    assert house.desk.here("ada")
    house.desk.closed("ada", new, "gone")
    assert not house.desk.here("ada")


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


# --- enrolment


def invite(house, site="oslo", token="once", hours=1.0):
    house.conductor.record(Invited(site=site, token=sha256(token.encode()), expires=time.time() + 3600 * hours))


def test_a_token_lets_its_site_in_once_and_only_a_digest_of_the_secret_is_kept(house):
    invite(house)
    house.desk.enrol("oslo", "once", SECRET)
    assert house.desk.admits("oslo", SECRET)
    assert not house.desk.admits("oslo", SECRET + "x")
    with pytest.raises(Denied, match="unknown or was used"):
        house.desk.enrol("oslo", "once", "t" * 32)
    assert not house.desk.admits("oslo", "t" * 32)
    assert all(SECRET.encode() not in body and b"once" not in body for body in house.journal.bodies())


@pytest.mark.parametrize(
    ("site", "token", "hours", "words"),
    [
        ("oslo", "guess", 1.0, "unknown or was used"),
        ("oslo", "", 1.0, "unknown or was used"),
        ("rome", "once", 1.0, "unknown or was used"),
        ("oslo", "once", -1.0, "out of date"),
    ],
)
def test_a_wrong_another_sites_or_expired_token_lets_nobody_in(house, site, token, hours, words):
    invite(house, hours=hours)
    with pytest.raises(Denied, match=words):
        house.desk.enrol(site, token, SECRET)
    assert not house.desk.admits(site, SECRET)
    assert house.roster.secrets == {}


def test_a_short_secret_does_not_spend_the_token(house):
    invite(house)
    with pytest.raises(Denied, match="make one of at least 32"):
        house.desk.enrol("oslo", "once", "short")
    house.desk.enrol("oslo", "once", SECRET)
    assert house.desk.admits("oslo", SECRET)


def test_a_newer_invitation_takes_the_place_of_an_older_one(house):
    invite(house, token="first")
    invite(house, token="second")
    with pytest.raises(Denied):
        house.desk.enrol("oslo", "first", SECRET)
    house.desk.enrol("oslo", "second", SECRET)


def test_an_enrolled_site_is_known_after_the_journal_is_folded_again(house):
    invite(house)
    house.desk.enrol("oslo", "once", SECRET)
    again = Roster()
    for entry in house.journal.entries():
        again.seen(entry)
    assert again.secrets == {"oslo": sha256(SECRET.encode())}
    assert {name: view.connected for name, view in again.sites.items()} == dict.fromkeys(
        ("ada", "bob", "mallory"), False
    )
