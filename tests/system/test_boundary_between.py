"""Whoever stands between a site and its hub, plaintext where TLS is due, addresses, and old versions of TLS."""

import socket
import ssl
import threading

import pytest

from atoll.boundary.channel import Frame
from atoll.boundary.line import Line
from atoll.boundary.network import SocketChannel, connect
from atoll.boundary.visit import Visit
from atoll.errors import Denied, Invalid, LinkLost
from tests.unit.ends import SECRET, WAIT, Desk, frames, refused, source, update
from tests.unit.papers import Office

pytestmark = pytest.mark.system


# --- whoever stands between


ALERTS = {
    "bad": 42,
    "unsupported": 43,
    "revoked": 44,
    "expired": 45,
    "unknown": 46,
    "CA": 48,
    "denied": 49,
    "none": 116,
}


@pytest.mark.parametrize(
    "said",
    [
        *(bytes([21, 3, 3, 0, 2, 2, code]) for code in ALERTS.values()),
        b'\x2a\x00\x00\x00\x00\x00\x00\x00{"error": "Denied", "words": "begone"}',
        b"HTTP/1.1 403 Forbidden\r\n\r\n",
        b"",
    ],
)
def test_who_stands_between_a_site_and_its_hub_cannot_deny_it_anything(tls, said):
    identity = tls.office.member().identity
    with socket.create_server(("127.0.0.1", 0)) as between:

        def answering():
            connection, _ = between.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said)

        thread = threading.Thread(target=answering)
        thread.start()
        kind, _ = refused(f"tls://127.0.0.1:{between.getsockname()[1]}", identity)
        thread.join(WAIT)
    assert kind is LinkLost


def test_what_somebody_changes_on_the_way_is_noticed_and_not_taken(tls):
    """A relay that flips a bit late in the stream: TLS finds it, and half an update is none."""
    with socket.create_server(("127.0.0.1", 0)) as between:
        ends = []

        def relay(source, sink, spoilt):
            passed = 0
            try:
                while data := source.recv(1 << 16):
                    passed += len(data)
                    if spoilt and passed > 1 << 20:
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    sink.sendall(data)
            except OSError:
                pass
            for end in (source, sink):
                end.close()

        def relaying():
            for _ in range(2):
                near = between.accept()[0]
                far = socket.create_connection(("127.0.0.1", tls.server.port), WAIT)
                for pair in ((near, far, True), (far, near, False)):
                    ends.append(threading.Thread(target=relay, args=pair))
                    ends[-1].start()

        accepting = threading.Thread(target=relaying)
        accepting.start()
        address = f"tls://127.0.0.1:{between.getsockname()[1]}"
        channel = SocketChannel(address, "lyon", tls.office.member().identity)
        big = [Frame(number, 1, bytes(1 << 18)) for number in range(16)]
        with pytest.raises(LinkLost):
            channel.put(update(), source(big))
        channel.close()
        accepting.join(WAIT)
    tls.server.close()
    for end in ends:
        end.join(WAIT)
        assert not end.is_alive()
    assert tls.desk.taken == []


# --- where there is no TLS


def test_plaintext_and_tls_do_not_meet_and_say_so(tls, serve):
    member, secret = tls.office.member().identity, ("lyon", SECRET)
    bare = tls.server.address.replace("tls", "tcp")
    for address, credential in ((bare, member), (tls.server.address, secret)):
        with pytest.raises(Invalid, match="is not what this site dials"):
            SocketChannel(address, "lyon", credential)
    kind, words = refused(serve().address.replace("tcp", "tls"), member)
    assert (kind, "speaks no TLS" in words) == (LinkLost, True)


def test_a_site_that_the_hub_started_comes_without_tls_to_the_same_port(tls):
    bare = tls.server.address.replace("tls", "tcp")
    channel = SocketChannel(bare, "lyon", ("lyon", SECRET))
    channel.put(update(), source(frames(2)))
    channel.close()
    assert tls.desk.taken == [("lyon", update(), frames(2))]
    kind, words = refused(bare, ("lyon", "x" * 32))
    assert (kind, "join with a token" in words) == (Denied, True)


def test_plaintext_is_for_this_machine_alone(serve):
    for host in ("192.0.2.1", "hub.example", "0.0.0.0", "localhost"):
        with pytest.raises(Invalid, match="can be dialled from elsewhere"):
            serve(host=host)
        with pytest.raises(Invalid, match="another machine and without TLS"):
            SocketChannel(f"tcp://{host}:4000", "lyon", ("lyon", SECRET))


FROM = {
    "127.0.0.1": True,
    "127.8.9.10": True,
    "::1": True,
    "::ffff:127.0.0.1": True,
    "10.0.0.1": False,
    "192.0.2.1": False,
    "::ffff:10.0.0.1": False,
    "fe80::1%eth0": False,
    "2001:db8::1": False,
}


@pytest.mark.parametrize("host", FROM)
def test_a_secret_is_good_only_from_this_machine(host):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        line = Line(socket.create_connection(listening.getsockname(), WAIT), WAIT)
        visit = Visit(listening.accept()[0], host, Desk(), None)
    line.say({"verb": "here", "site": "lyon", "secret": SECRET})
    if FROM[host]:
        assert visit.greet(None, WAIT).site == "lyon"
    else:
        with pytest.raises(Denied, match="comes without TLS"):
            visit.greet(None, WAIT)
    line.close()
    visit.part()


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:4000",
        "http://127.0.0.1:4000",
        "tls://127.0.0.1",
        "tls://127.0.0.1:70000",
        "tls://hub/../x:1",
        "tls://a..b:1",
        f"tls://{'a' * 70}:1",
        "tls://User@hub:1",
    ],
)
def test_what_is_no_address_is_told_so_before_anything_is_dialled(tls, address):
    with pytest.raises(Invalid, match="address: "):
        connect(address, tls.office.member().identity)


def test_with_tls_the_port_may_be_elsewhere_and_sites_of_this_machine_still_find_it(tmp_path, serve):
    office = Office(tmp_path, names=("127.0.0.2",))
    server = serve(office.registrar, host="127.0.0.2")
    assert server.address == f"tls://127.0.0.2:{server.port}"
    SocketChannel(server.address, "lyon", office.member().identity).close()
    SocketChannel(f"tcp://127.0.0.1:{server.port}", "lyon", ("lyon", SECRET)).close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_port_of_both_kinds_of_addresses_lets_in_the_sites_of_this_machine(tmp_path, serve):
    office = Office(tmp_path)
    server = serve(office.registrar, host="::")
    assert server.address == f"tls://[::]:{server.port}"
    for host in ("127.0.0.1", "[::1]"):
        SocketChannel(f"tcp://{host}:{server.port}", "lyon", ("lyon", SECRET)).close()
        SocketChannel(f"tls://{host}:{server.port}", "lyon", office.member().identity).close()


def test_a_hub_that_is_away_is_a_lost_link(tls):
    identity, address = tls.office.member().identity, tls.server.address
    tls.server.close()
    kind, words = refused(address, identity)
    assert (kind, address in words) == (LinkLost, True)


def handshake(server, identity, folder, version):
    """Return what a client that speaks only ``version`` gets."""
    (folder / "pair.pem").write_bytes(identity.key + identity.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=identity.root.decode())
    context.load_cert_chain(folder / "pair.pem")
    context.set_ciphers("ALL:@SECLEVEL=0")  # else our own library would refuse first
    context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", server.port), WAIT) as connection,
        context.wrap_socket(connection) as line,
    ):
        return line.version()


def test_tls_is_spoken_in_its_current_version(tls, tmp_path):
    assert handshake(tls.server, tls.office.member().identity, tmp_path, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2"])
def test_older_versions_of_tls_are_refused(tls, tmp_path, version):
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(tls.server, tls.office.member().identity, tmp_path, ssl.TLSVersion[version])
