"""Certificates by way of relays: for whom a relay may ask, for which port, and who is believed to be one."""

import pytest
from cryptography import x509

from atoll.boundary.identity import Peer, new_key, peer_of, request
from atoll.boundary.register import Asked
from atoll.errors import Denied
from tests.unit.papers import Office


class Ways:
    """alps and jura are relays; jura is behind alps, lyon behind jura, and oslo at the hub."""

    def is_relay(self, site):
        return site in ("alps", "jura")

    def way(self, site, invited=False):
        return {"jura": ("alps",), "lyon": ("alps", "jura")}.get(site, ())


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    return Office(tmp_path_factory.mktemp("office"), ways=Ways())


def name(certificate):
    return peer_of(x509.load_pem_x509_certificate(certificate))


def test_a_relay_passes_an_invited_site_s_request_on_and_later_its_renewal(office):
    alps, ticket, key = office.member("alps").identity.peer, office.invite("lyon"), new_key()
    asked = Asked(request(key), name=str(ticket.identity.peer), through=("jura",))
    given = name(office.registrar.certify(alps, asked))
    assert (given.kind, given.name) == ("site", "lyon")
    again = Asked(request(key), name=str(given), through=("jura",))
    assert name(office.registrar.certify(alps, again)) == given


@pytest.mark.parametrize(
    ("caller", "site", "through"),
    [
        ("jura", "lyon", ()),
        ("alps", "lyon", ()),
        ("alps", "oslo", ()),
        ("oslo", "lyon", ("jura",)),
        ("alps", "alps", ()),
    ],
)
def test_a_relay_asks_for_nobody_but_who_is_behind_it_by_just_that_way(office, caller, site, through):
    peer, token = office.member(caller).identity.peer, office.invite(site).identity.peer
    with pytest.raises(Denied, match="not invited to be behind it"):
        office.registrar.certify(peer, Asked(request(new_key()), name=str(token), through=through))


def test_only_a_relay_has_a_port_certified_and_in_its_own_name(office):
    alps, oslo = office.member("alps").identity.peer, office.member("oslo").identity.peer
    given = name(office.registrar.certify(alps, Asked(request(new_key()), port=True)))
    assert (given.kind, given.name) == ("relay", "alps")
    with pytest.raises(Denied, match="not invited as a relay"):
        office.registrar.certify(oslo, Asked(request(new_key()), port=True))
    with pytest.raises(Denied):
        office.registrar.admit(given)  # a port's certificate opens no session


def test_a_relay_s_name_is_read_as_it_is_written():
    peer = Peer("0" * 16, "relay", "alps", "sha256:" + "1" * 64)
    assert Peer.read(str(peer)) == peer
