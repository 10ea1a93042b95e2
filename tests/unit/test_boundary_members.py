"""Who is certified and who is not any more, and what a site keeps of it, without a socket between."""

import json
from datetime import UTC, datetime

import pytest
from cryptography import x509

from atoll.boundary.certificates import HUB_LIFE, requested
from atoll.boundary.identity import Peer, key_digest, new_key, private_key, request
from atoll.boundary.keyring import Keyring
from atoll.boundary.register import Asked
from atoll.errors import Corrupt, Denied, Invalid, LinkLost, NotFound, Unavailable
from tests.unit.papers import HOUR, Office, Paper


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path)


def certificate(data):
    return x509.load_pem_x509_certificate(data)


# --- the hub's own


def test_the_hub_has_another_certificate_halfway_through_the_life_of_the_last_one(office):
    first = office.registrar.identity
    office.ahead = 0.4 * HUB_LIFE.total_seconds()
    assert office.registrar.identity == first
    office.ahead = 0.6 * HUB_LIFE.total_seconds()
    second = office.registrar.identity
    assert second.ends - first.ends > 0.5 * HUB_LIFE
    assert (second.peer, second.root) == (first.peer, first.root), "sites know the hub by these"
    assert office.registrar.identity == second


# --- who is certified


def enrol(office, ticket, key):
    return certificate(office.exchange(ticket.identity, request(key)))


def test_a_token_is_good_for_one_key_which_may_come_again(office):
    ticket, key = office.invite(), new_key()
    given = enrol(office, ticket, key)
    assert given.public_key() == key.public_key()
    assert enrol(office, ticket, key).public_key() == key.public_key()
    with pytest.raises(Denied, match="was used, by another key"):
        enrol(office, ticket, new_key())
    assert [(event.site, event.key, event.token) for event in office.recorded] == [
        ("lyon", key_digest(key.public_key()), ticket.invitation)
    ]


def test_a_token_runs_out_unless_its_key_has_been_here(office):
    late, used, key = office.invite("oslo"), office.invite("lyon"), new_key()
    enrol(office, used, key)
    office.ahead = 2 * HOUR
    with pytest.raises(Denied, match="out of date"):
        enrol(office, late, new_key())
    office.ahead = 1000 * HOUR
    assert enrol(office, used, key).public_key() == key.public_key()


def test_a_later_invitation_withdraws_the_one_before_and_leaves_the_member_until_it_is_used(office):
    member = office.member().identity.peer
    first, second = office.invite(), office.invite()
    with pytest.raises(Denied, match="withdrawn"):
        enrol(office, first, new_key())
    office.registrar.admit(member)
    enrol(office, second, new_key())
    with pytest.raises(Denied, match="revoked"):
        office.registrar.admit(member)


def test_a_revoked_site_is_out_for_good_with_this_key(office):
    ticket, key = office.invite(), new_key()
    peer = Peer(office.authority.hub, "site", "lyon", key_digest(key.public_key()))
    enrol(office, ticket, key)
    office.registrar.admit(peer)
    assert (office.members.knows("lyon"), office.members.knows("oslo")) == (True, False)
    office.members.revoked("lyon")
    for call in (
        lambda: office.registrar.admit(peer),
        lambda: office.registrar.certify(peer, Asked(request(key))),
        lambda: enrol(office, ticket, key),
        lambda: enrol(office, office.invite(), key),
    ):
        with pytest.raises(Denied, match=r"revoked|withdrawn"):
            call()
    fresh = new_key()
    enrol(office, office.invite(), fresh)
    office.registrar.admit(Peer(office.authority.hub, "site", "lyon", key_digest(fresh.public_key())))
    with pytest.raises(Denied, match="revoked"):
        office.registrar.admit(peer)


def test_a_revocation_also_withdraws_an_invitation_that_nobody_used(office):
    ticket = office.invite()
    office.members.revoked("lyon")
    with pytest.raises(Denied, match="withdrawn"):
        enrol(office, ticket, new_key())
    assert office.recorded == []


def test_a_join_token_opens_nothing_but_enrolment_and_a_member_renews_its_own_key_only(office):
    with pytest.raises(Denied, match="opens nothing but enrolment"):
        office.registrar.admit(office.invite("oslo").identity.peer)
    keyring = office.member()
    with pytest.raises(Denied, match="a membership is one key"):
        office.exchange(keyring.identity, request(new_key()))
    hub = Peer(office.authority.hub, "hub")
    for call in (lambda: office.registrar.admit(hub), lambda: office.registrar.certify(hub, Asked(request(new_key())))):
        with pytest.raises(Denied):
            call()


def test_a_membership_ends_with_its_latest_certificate(office):
    keyring = office.member()
    peer, asked = keyring.identity.peer, request(private_key(keyring.identity.key))
    office.ahead = 23 * HOUR
    office.exchange(keyring.identity, asked)
    office.ahead = 46 * HOUR
    office.registrar.admit(peer)
    office.ahead = 48 * HOUR
    with pytest.raises(Denied, match="ran out; join again with the same token"):
        office.registrar.admit(peer)


def test_whoever_asks_again_soon_gets_the_same_and_the_journal_does_not_grow(office):
    keyring = office.member()
    asked = request(private_key(keyring.identity.key))
    first = office.exchange(keyring.identity, asked)
    assert {office.exchange(keyring.identity, asked) for _ in range(20)} == {first}
    assert len(office.recorded) == 2  # its first, and one renewal


def test_a_certificate_that_could_not_be_recorded_is_not_handed_out(office):
    ticket = office.invite()
    office.full = True
    with pytest.raises(Unavailable, match="no space left"):
        enrol(office, ticket, new_key())
    office.full = False
    assert enrol(office, ticket, new_key()) is not None  # and the token was not spent


# --- a site's keyring


def test_a_sites_key_is_made_here_lies_in_a_private_file_and_is_not_in_what_is_sent(office, tmp_path):
    sent = []

    def exchange(identity, asked):
        sent.append(asked)
        return office.exchange(identity, asked)

    keyring = Keyring(tmp_path, "lyon")
    identity = keyring.join(office.invite(), exchange)
    assert identity.peer.name == "lyon"
    path = tmp_path / "identity.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "joining.json").exists()
    assert (len(sent), b"PRIVATE" in sent[0]) == (1, False)
    assert Keyring(tmp_path, "lyon").identity == identity


def test_who_has_joined_does_not_ask_again(office, tmp_path):
    ticket, keyring = office.invite(), Keyring(tmp_path, "lyon")
    first = keyring.join(ticket, office.exchange)
    assert keyring.join(ticket, lambda identity, asked: pytest.fail("asked again")) == first


def test_an_interrupted_join_is_repeated_with_the_same_key(office, tmp_path):
    ticket = office.invite()

    def lost(identity, asked):
        office.exchange(identity, asked)
        raise LinkLost("the answer was lost")

    with pytest.raises(LinkLost):
        Keyring(tmp_path, "lyon").join(ticket, lost)
    with pytest.raises(NotFound, match="joined no hub yet"):
        _ = Keyring(tmp_path, "lyon").identity
    assert (tmp_path / "joining.json").stat().st_mode & 0o777 == 0o600
    assert Keyring(tmp_path, "lyon").join(ticket, office.exchange).peer.key == office.recorded[0].key


def test_a_new_token_makes_a_new_key_and_a_refused_one_leaves_the_old(office, tmp_path):
    keyring = Keyring(tmp_path, "lyon")
    first = keyring.join(office.invite(), office.exchange)
    office.ahead = 2 * HOUR
    stale = office.invite(hours=-1)
    with pytest.raises(Denied, match="out of date"):
        keyring.join(stale, office.exchange)
    assert Keyring(tmp_path, "lyon").identity == first
    second = keyring.join(office.invite(), office.exchange)
    assert second.key != first.key
    assert Keyring(tmp_path, "lyon").identity == second


def test_a_site_that_was_away_for_longer_than_its_certificate_comes_back_by_the_same_token(office, tmp_path):
    ticket = office.invite()
    first = Keyring(tmp_path, "lyon").join(ticket, office.exchange)
    said = json.loads((tmp_path / "identity.json").read_text())
    old = Paper(starts=-30, ends=-1, key=private_key(first.key)).signed(office.ca)
    (tmp_path / "identity.json").write_text(json.dumps({**said, "certificate": old.certificate.decode()}))
    office.ahead = 30 * HOUR
    again = Keyring(tmp_path, "lyon").join(ticket, office.exchange)
    assert (again.key, again.peer) == (first.key, first.peer)
    assert again.ends > datetime.now(UTC)


def test_a_token_for_another_site_is_not_used(office, tmp_path):
    with pytest.raises(Invalid, match="for site 'oslo' and this is 'lyon'"):
        Keyring(tmp_path, "lyon").join(office.invite("oslo"), lambda *_: pytest.fail("was sent"))


def test_a_hub_that_answers_with_another_certificate_is_not_believed(office, tmp_path):
    ticket = office.invite()
    (tmp_path / "x").mkdir()
    answers = {
        "nothing": lambda identity, asked: b"",
        "another key": lambda identity, asked: office.member("lyon").identity.certificate,
        "the invitation's": lambda identity, asked: identity.certificate,
        "another name": lambda identity, asked: office.authority.certify("oslo", requested(asked)).pem,
        "another CA": lambda identity, asked: Office(tmp_path / "x").authority.certify("lyon", requested(asked)).pem,
    }
    for answer in answers.values():
        with pytest.raises(Denied, match="certificate: "):
            Keyring(tmp_path, "lyon").join(ticket, answer)
    assert not (tmp_path / "identity.json").exists()


def test_a_keyring_that_was_changed_or_opened_to_others_is_not_used(office, tmp_path):
    keyring = office.member()
    path = office.folder / "lyon" / "identity.json"
    path.chmod(0o644)
    with pytest.raises(Denied, match="chmod 600"):
        Keyring(path.parent, "lyon")
    path.chmod(0o600)
    said = json.loads(path.read_text())
    for change in ({"key": "x"}, {"root": ""}, {"certificate": ""}, {"certificate": "x"}, {"more": 1}):
        path.write_text(json.dumps({**said, **change}))
        with pytest.raises(Corrupt, match="join with a new token"):
            Keyring(path.parent, "lyon")
    path.write_text("{")
    with pytest.raises(Corrupt):
        Keyring(path.parent, "lyon")
    assert keyring.identity.peer.name == "lyon"


# --- renewal


def aged(office, hours):
    """Return the keyring of a member whose certificate was signed ``hours`` ago and lasts a day."""
    keyring = office.member()
    path = office.folder / "lyon" / "identity.json"
    said = json.loads(path.read_text())
    paper = Paper(starts=-hours - 1, ends=24 - hours, key=private_key(keyring.identity.key)).signed(office.ca)
    path.write_text(json.dumps({**said, "certificate": paper.certificate.decode()}))
    return Keyring(path.parent, "lyon")


@pytest.mark.parametrize(("hours", "due"), [(0, False), (15.9, False), (16.1, True), (23.9, True), (30, True)])
def test_a_certificate_is_renewed_from_two_thirds_of_its_life_on(office, hours, due):
    assert aged(office, hours).due() is due


def test_a_renewal_keeps_the_key_and_is_in_force_at_once_and_after_a_restart(office):
    keyring = aged(office, 17)
    before = keyring.identity
    after = keyring.renew(lambda asked: office.exchange(before, asked))
    assert (after.key, after.peer) == (before.key, before.peer)
    assert after.ends > before.ends
    assert keyring.due() is False
    assert Keyring(office.folder / "lyon", "lyon").identity == after


def test_a_renewal_that_failed_leaves_the_certificate_and_is_not_tried_again_at_once(office):
    keyring = aged(office, 17)
    before = keyring.identity

    def lost(asked):
        raise LinkLost("the link broke")

    with pytest.raises(LinkLost):
        keyring.renew(lost)
    assert (keyring.identity, keyring.due()) == (before, False)


def test_a_site_that_has_joined_nothing_has_nothing_to_renew(tmp_path):
    assert Keyring(tmp_path, "lyon").due() is False
