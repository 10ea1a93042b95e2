"""Mutual TLS on the hub's port: who is let in, under which name, for how long, and what everybody else is told."""

import socket

import pytest
from cryptography import x509

from atoll.boundary.gate import enrol
from atoll.boundary.identity import Identity, Ticket, new_key, pem_of, private_key, request
from atoll.boundary.keyring import Keyring
from atoll.boundary.line import Line
from atoll.boundary.network import SocketChannel, connect
from atoll.boundary.secure import client_context
from atoll.errors import Corrupt, Denied, Invalid, LinkLost
from tests.unit.ends import SECRET, WAIT, answer, frames, progress, refused, source, update
from tests.unit.papers import SERVER, Office, Paper

pytestmark = pytest.mark.system


@pytest.fixture
def other(tmp_path):
    (tmp_path / "other").mkdir()
    return Office(tmp_path / "other")


# --- joining


def test_a_site_joins_over_the_one_port_and_is_who_its_certificate_says(tls, tmp_path):
    ticket = Ticket.read(tls.office.invite("oslo", tls.server.address).token())
    identity = Keyring(tmp_path, "oslo").join(ticket, lambda mine, asked: enrol(ticket.address, mine, asked))
    channel = tls.open(identity)
    channel.send(progress(1))
    assert tls.desk.said.get(timeout=WAIT) == ("oslo", progress(1))
    channel.put(update(), source(frames(2)))
    assert tls.desk.taken == [("oslo", update(), frames(2))]


def test_an_enrolment_that_is_refused_says_why(tls):
    ticket = tls.office.invite("lyon", tls.server.address)
    with pytest.raises(Invalid, match="no signed request"):
        enrol(ticket.address, ticket.identity, b"nonsense")
    late = tls.office.invite("oslo", tls.server.address, hours=-1)
    with pytest.raises(Denied, match="out of date"):
        enrol(late.address, late.identity, request(new_key()))


def test_a_token_leads_nowhere_but_to_its_own_hub(tls, other):
    ticket = other.invite("lyon", tls.server.address)  # as if somebody had put another address into it
    with pytest.raises(LinkLost, match="see that it is the hub you joined"):
        enrol(ticket.address, ticket.identity, request(new_key()))
    assert tls.office.recorded == []


def test_no_word_makes_a_member_another_one(tls):
    line = tls.line()
    tls.desk.secrets["oslo"] = SECRET
    line.say({"verb": "here", "site": "oslo", "secret": SECRET})
    with pytest.raises(Invalid):
        line.hear()
    line.say({"verb": "session", "site": "oslo", "secret": SECRET})
    assert line.hear() == {"open": True}
    line.say(progress(1).model_dump_json().encode())
    assert tls.desk.said.get(timeout=WAIT) == ("lyon", progress(1))
    line.close()


# --- papers that are not in order


def test_certificates_of_another_hub_are_worth_nothing_here(tls, other):
    kind, words = refused(tls.server.address, other.member().identity)
    assert (kind, "the certificate of the other end" in words) == (LinkLost, True)
    forger = Paper().signed(other.ca, root=tls.office.registrar.identity.root)  # trusts the right hub, and no more
    hub = Identity(forger.key, forger.certificate, forger.root)
    with pytest.raises(LinkLost, match="answers, which is not the hub of this site"):  # it names another hub
        connect(tls.server.address, hub)
    kind, words = answer(raw(tls.server, hub), {"verb": "session"})
    assert (kind, "of another CA" in words) == (LinkLost, True)
    assert tls.desk.sends.empty()


def test_a_certificate_without_its_key_is_told_to_who_has_it(tls):
    member = tls.office.member("oslo").identity
    mixed = Identity(pem_of(new_key()), member.certificate, member.root)
    with pytest.raises(Corrupt, match="do not belong together"):
        SocketChannel(tls.server.address, "oslo", mixed)


def raw(server, identity):
    """Return a connection of somebody who does not look at what the hub shows of itself but for its CA."""
    connection = socket.create_connection(("127.0.0.1", server.port), WAIT)
    return Line(client_context(identity).wrap_socket(connection), WAIT)


def test_a_certificate_that_the_ca_signed_for_what_the_hub_does_not_know_is_denied(tls):
    kind, words = refused(tls.server.address, Paper().signed(tls.office.ca))
    assert (kind, "does not know its certificate" in words) == (Denied, True)
    for uri in ("spiffe://atoll/x/admin", f"spiffe://atoll/{'0' * 16}/site/lyon/"):
        line = raw(tls.server, Paper(uri=uri).signed(tls.office.ca))
        kind, words = answer(line, {"verb": "session"})
        assert (kind, "no name that a hub gives" in words) == (Denied, True)


TIMES = {
    "expired": (Paper(starts=-2, ends=-1), "does not take this one: its certificate ran out, or a clock is wrong"),
    "not yet valid": (Paper(starts=1, ends=2), "by the clock there, not valid yet; compare the clocks"),
}


@pytest.mark.parametrize("what", TIMES)
def test_a_site_whose_certificate_is_out_of_its_time_is_told_so(tls, what):
    """Not `Denied`: TLS says it, and its words are no hub's own."""
    paper, words = TIMES[what]
    with pytest.raises(LinkLost, match=words):
        SocketChannel(tls.server.address, "lyon", paper.signed(tls.office.ca))
    assert tls.desk.sends.empty()


HUBS = {
    "expired": (Paper(usage=SERVER, starts=-2, ends=-1), "certificate has expired"),
    "not yet valid": (Paper(usage=SERVER, starts=1, ends=2), "certificate is not yet valid"),
    "of another hub": (Paper(usage=SERVER, uri=f"spiffe://atoll/{'0' * 16}/hub"), "not the hub of this site"),
    "of no name": (Paper(usage=SERVER, uri="spiffe://atoll/x/admin"), "not the hub of this site"),
    "a site's, for a server": (Paper(usage=SERVER), "not the hub of this site"),
    "a site's": (Paper(), "unsuitable certificate purpose"),
}


@pytest.mark.parametrize("what", HUBS)
def test_a_site_speaks_to_no_hub_whose_certificate_is_wrong(tls, serve, what):
    paper, words = HUBS[what]
    identity, invited = tls.office.member().identity, tls.office.invite("oslo").identity
    server = serve(tls.office.registrar, paper.signed(tls.office.ca))
    with pytest.raises(LinkLost, match=words):
        SocketChannel(server.address, "lyon", identity)
    with pytest.raises(LinkLost, match=words):
        enrol(server.address, invited, request(new_key()))


def test_the_hubs_certificate_opens_no_door_and_a_members_signs_no_other(tls):
    hub = tls.office.registrar.identity
    kind, words = refused(tls.server.address, hub)
    assert (kind, "for another use" in words) == (LinkLost, True)
    member = tls.office.member().identity
    key = private_key(member.key)
    below = Paper().signed((key, x509.load_pem_x509_certificate(member.certificate)), root=hub.root)
    chain = Identity(below.key, below.certificate + member.certificate, hub.root)
    assert answer(raw(tls.server, chain), {"verb": "session"})[0] is LinkLost
    assert tls.desk.sends.empty()
