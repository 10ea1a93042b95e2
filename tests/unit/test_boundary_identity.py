"""Names, certificates of the hub's own CA, requests and join tokens, without a socket between."""

import base64
import json
import os
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from atoll.boundary.certificates import SITE_LIFE, SKEW, Authority, requested
from atoll.boundary.identity import Peer, Ticket, key_digest, new_key, pem_of, private_key, request
from atoll.errors import Corrupt, Denied, Invalid, NotFound, Unavailable
from atoll.spec.document import sha256
from tests.unit.papers import CLIENT, PEM, SERVER, Office

KEY = 64 * "a"
HUB = 16 * "b"


@pytest.fixture
def office(tmp_path):
    return Office(tmp_path)


def certificate(data):
    return x509.load_pem_x509_certificate(data)


def extension(found, kind):
    return found.extensions.get_extension_for_class(kind)


# --- names


@pytest.mark.parametrize("kind", ["site", "invited"])
def test_a_name_is_read_as_it_was_written(kind):
    peer = Peer(HUB, kind, "saint-luc.1", f"sha256:{KEY}")
    assert str(peer) == f"spiffe://atoll/{HUB}/{kind}/saint-luc.1/{KEY}"
    assert Peer.read(str(peer)) == peer
    assert Peer.read(f"spiffe://atoll/{HUB}/hub") == Peer(HUB, "hub")


WRONG_NAMES = [
    "",
    "lyon",
    f"spiffe://elsewhere/{HUB}/site/lyon/{KEY}",
    f"spiffe://atoll/{HUB}/site/lyon",
    f"spiffe://atoll/{HUB}/site/../{KEY}",
    f"spiffe://atoll/{HUB}/site/Lyon/{KEY}",
    f"spiffe://atoll/{HUB}/site/lyon/{KEY}/more",
    f"spiffe://atoll/{HUB}/site/lyon/{KEY}\n",
    f"spiffe://atoll/{HUB}/site/lyon/{KEY[1:]}",
    f"spiffe://atoll/{HUB}/hub/lyon/{KEY}",
    f"spiffe://atoll/{HUB}/admin/lyon/{KEY}",
    f"spiffe://atoll/{HUB[1:]}/hub",
]


@pytest.mark.parametrize("uri", WRONG_NAMES)
def test_another_form_of_name_admits_nobody(uri):
    with pytest.raises(Denied, match="no name that a hub gives"):
        Peer.read(uri)


# --- the CA


def test_the_ca_is_one_private_file_that_is_never_written_over(tmp_path):
    Authority.create(tmp_path / "ca")
    path = tmp_path / "ca" / "root.pem"
    before = path.read_bytes()
    assert ((path.stat().st_mode & 0o777), (path.parent.stat().st_mode & 0o777)) == (0o600, 0o700)
    assert os.listdir(path.parent) == ["root.pem"]
    with pytest.raises(Invalid, match="this hub has a CA"):
        Authority.create(tmp_path / "ca")
    assert path.read_bytes() == before


def test_a_hub_keeps_its_name_and_no_two_have_one(tmp_path):
    for name in "ab":
        Authority.create(tmp_path / name)
    assert Authority(tmp_path / "a").hub == Authority(tmp_path / "a").hub != Authority(tmp_path / "b").hub


def test_a_ca_that_is_missing_open_to_others_or_spoilt_is_not_used(tmp_path):
    folder = tmp_path / "ca"
    with pytest.raises(NotFound, match="atoll hub init"):
        Authority(folder)
    Authority.create(folder)
    (folder / "root.pem").chmod(0o640)
    with pytest.raises(Denied, match="chmod 600"):
        Authority(folder)
    (folder / "root.pem").chmod(0o600)
    Authority.create(tmp_path / "other")
    mixed = (folder / "root.pem").read_text().split("-----BEGIN CERTIFICATE")[0]
    mixed += "-----BEGIN CERTIFICATE" + (tmp_path / "other" / "root.pem").read_text().split("-----BEGIN CERTIFICATE")[1]
    (folder / "root.pem").write_text(mixed)
    with pytest.raises(Corrupt, match="for another key"):
        Authority(folder)
    (folder / "root.pem").write_text("")
    with pytest.raises(Corrupt, match="restore it"):
        Authority(folder)


def test_a_folder_where_nothing_can_be_written_is_unavailable(tmp_path):
    (tmp_path / "ca").write_text("a file is in the way")
    with pytest.raises(Unavailable, match="cannot be"):
        Authority.create(tmp_path / "ca")


def test_the_root_may_sign_leaves_and_nothing_else(office):
    root = office.ca[1]
    assert extension(root, x509.BasicConstraints).value == x509.BasicConstraints(ca=True, path_length=0)
    usage = extension(root, x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)


def test_each_leaf_is_good_for_one_side_of_tls_and_signs_no_other(office):
    hub = office.authority.identity(["hub.example", "192.0.2.7"])
    site, invited = office.member().identity, office.invite().identity
    for leaf, usage in ((hub, SERVER), (site, CLIENT), (invited, CLIENT)):
        found = certificate(leaf.certificate)
        assert list(extension(found, x509.ExtendedKeyUsage).value) == [usage]
        assert extension(found, x509.BasicConstraints).value == x509.BasicConstraints(ca=False, path_length=None)
        assert extension(found, x509.KeyUsage).value.key_cert_sign is False
        assert isinstance(found.public_key().curve, ec.SECP256R1)
        found.verify_directly_issued_by(office.ca[1])
    serials = {certificate(leaf.certificate).serial_number for leaf in (hub, site, invited)}
    assert len(serials) == 3


def test_the_hubs_leaf_names_what_sites_dial_and_its_key_is_new_each_time(office):
    first, second = (office.authority.identity(["hub.example", "192.0.2.7", "::1"]) for _ in range(2))
    names = extension(certificate(first.certificate), x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "hub.example"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1", "192.0.2.7"]
    assert first.peer == Peer(office.authority.hub, "hub")
    assert first.key != second.key
    assert "PRIVATE" not in repr(first)


@pytest.mark.parametrize("name", ["", "two words", "hub.example/x", "hub..example", "300 characters " * 20, "*"])
def test_a_name_that_nobody_can_dial_is_refused(office, name):
    with pytest.raises(Invalid, match="neither a DNS name nor an IP address"):
        office.authority.identity([name])


def test_a_sites_certificate_lasts_a_day_and_is_dated_back_for_slow_clocks(office):
    now = datetime.now(UTC)
    identity = office.member().identity
    assert timedelta(0) <= now + SITE_LIFE - identity.ends < timedelta(seconds=2) or identity.ends > now + SITE_LIFE
    assert now - SKEW - timedelta(seconds=2) <= identity.starts <= datetime.now(UTC) - SKEW


# --- requests


def requests():
    key = new_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hub")])
    bare = x509.CertificateSigningRequestBuilder().subject_name(name)
    edwards = ed25519.Ed25519PrivateKey.generate()
    other = ec.generate_private_key(ec.SECP384R1())
    good = request(key)
    body = bytearray(base64.b64decode(b"".join(good.splitlines()[1:-1])))
    body[-1] ^= 1
    forged = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(body))
    return {
        "no P-256 key": bare.sign(edwards, None).public_bytes(PEM),
        "another curve": bare.sign(other, hashes.SHA256()).public_bytes(PEM),
        "a broken signature": forged + b"-----END CERTIFICATE REQUEST-----\n",
        "nothing": b"",
        "nonsense": b"\xff\x00 not PEM",
        "a key": pem_of(key),
        "too long": good + 5000 * b"#",
    }


@pytest.mark.parametrize("wrong", requests())
def test_a_request_that_proves_no_p256_key_is_refused(wrong):
    with pytest.raises(Invalid, match="no signed request for a P-256 key"):
        requested(requests()[wrong])


def test_what_a_request_says_of_itself_is_ignored(office):
    key = new_key()
    claims = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(f"spiffe://atoll/{office.authority.hub}/hub"), x509.DNSName("localhost")]
    )
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "oslo")]))
        .add_extension(claims, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=5), critical=True)
        .add_extension(x509.ExtendedKeyUsage([SERVER]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(PEM)
    )
    given = certificate(office.exchange(office.invite("lyon").identity, asked))
    names = extension(given, x509.SubjectAlternativeName).value
    peer = Peer(office.authority.hub, "site", "lyon", key_digest(key.public_key()))
    assert list(names) == [x509.UniformResourceIdentifier(str(peer))]
    assert extension(given, x509.BasicConstraints).value.ca is False
    assert list(extension(given, x509.ExtendedKeyUsage).value) == [CLIENT]
    assert "oslo" not in given.subject.rfc4514_string()


# --- join tokens


def test_a_token_is_read_as_it_was_made(office):
    ticket = office.invite("lyon", "tls://hub.example:8443")
    read = Ticket.read(ticket.token())
    assert read == ticket
    assert (read.address, read.site) == ("tls://hub.example:8443", "lyon")
    assert len(ticket.token()) < 2000
    assert Ticket.read(f"  {ticket.token()}\n") == ticket


@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "tls://hub.example:8443", "tls://[::1]:8443"])
def test_a_token_says_where_the_hub_is_whichever_way_it_is_dialled(office, address):
    assert Ticket.read(office.invite("lyon", address).token()).address == address


def test_the_hub_keeps_nothing_with_which_a_token_could_be_made(office):
    ticket = office.invite()
    public = private_key(ticket.identity.key).public_key()
    assert ticket.invitation == key_digest(public)
    kept = b"".join(path.read_bytes() for path in office.folder.rglob("*") if path.is_file())
    assert ticket.identity.key not in kept


def parts(office, **changed):
    token = office.invite("lyon").token()
    said = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    return base64.urlsafe_b64encode(json.dumps({**said, **changed}).encode()).decode().rstrip("=")


def tampered(office, tmp_path):
    (tmp_path / "x").mkdir()
    other = Office(tmp_path / "x")
    token, theirs = office.invite("lyon").token(), other.invite("lyon").token()
    their = json.loads(base64.urlsafe_b64decode(theirs + "=="))
    return {
        "empty": "",
        "cut": token[:-20],
        "letters": token[:100] + "é" + token[101:],
        "spaces": token[:100] + " " + token[101:],
        "an old one": base64.urlsafe_b64encode(b'{"address": "a", "site": "s", "token": "t"}').decode(),
        "too long": token + "A" * 9000,
        "its root": parts(office, root=their["root"]),
        "its certificate": parts(office, certificate=their["certificate"]),
        "its key": parts(office, key=their["key"]),
        "a key of nothing": parts(office, key=base64.urlsafe_b64encode(bytes(32)).decode().rstrip("=")),
        "its address to plaintext": parts(office, address="tcp://127.0.0.1:1"),
        "its address to another scheme": parts(office, address="http://127.0.0.1:1"),
        "its address to a path": parts(office, address="tls://hub/../x:1"),
        "more": parts(office, site="oslo"),
        "a member's certificate": parts(office, certificate=_b64(office.member("oslo").identity.certificate)),
    }


def _b64(pem):
    return base64.b64encode(b"".join(pem.splitlines()[1:-1])).decode()


def test_a_token_whose_parts_do_not_agree_is_no_token(office, tmp_path):
    found = tampered(office, tmp_path)
    for what, token in found.items():
        with pytest.raises(Invalid, match="paste what `atoll site invite` printed") as raised:
            Ticket.read(token)
        assert "\n" not in str(raised.value), what
    for place in range(10, 1500, 97):
        token = office.invite("lyon").token()
        flipped = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        try:
            read = Ticket.read(flipped)
        except Invalid:
            continue
        assert read.identity.peer.name == "lyon"  # the address is not signed: whoever is there must prove to be the hub


def test_digests_of_keys_are_of_the_whole_public_key_info():
    from cryptography.hazmat.primitives import serialization

    key = new_key().public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert key_digest(key) == sha256(der)
