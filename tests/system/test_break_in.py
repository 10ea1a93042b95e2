"""Breaking in from outside: what strangers and members try at the API, at the port for sites and at a served model.

Each test is one attack, and says in a line what must come of it. docs/break-in.md lists them all, with those that begin
inside (`test_break_in_sites.py`), at the record (`test_break_in_record.py`) and in other files.
"""

import re
import socket
import threading
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.responses import Response

import atoll
from atoll.boundary.gate import enrol
from atoll.boundary.identity import new_key, request
from atoll.boundary.line import HEAD, WORD, Line
from atoll.boundary.port import Limits
from atoll.console.client import Client, connect
from atoll.console.guard import cookie_name
from atoll.console.host import Server
from atoll.console.routes import ROUTES
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.registry.blobs import Blobs
from atoll.registry.weights import header, load
from atoll.runtime.bundle import write_bundle
from atoll.serving.punctual import punctual
from atoll.spec.document import parse
from atoll.spec.job import QueryJob
from atoll.spec.model import Bundle, Deployment
from tests.unit.ends import (
    SECRET,
    WAIT,
    World,
    answer,
    closed,
    frames,
    progress,
    refused,
    source,
    until,
    update,
    wanted,
)

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with connect(tmp_path_factory.mktemp("attacked") / "home", sites=False) as client:
        yield client


@pytest.fixture
def stranger(hub: Client):
    with httpx.Client(base_url=hub.address.url, trust_env=False) as client:
        yield client


@pytest.fixture
def world():
    made = World("plain")
    yield made
    made.close()


# --- who may speak


CLOSED = [route.split() for route, (action, _) in ROUTES.items() if action != "open"]


def test_no_route_of_the_api_answers_who_has_no_token_or_a_wrong_one(hub, stranger):
    """401 on every route, whatever stands where the hub's token should be; and the right one only as it should be."""
    token = hub.address.token
    wrong = [
        {},
        {"Authorization": f"Bearer {token[:-1]}"},
        {"Authorization": f"Basic {token}"},
        {"Cookie": f"{cookie_name(int(hub.address.url.rsplit(':', 1)[1]))}={token}"},
        {"Authorization": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJsb2NhbCJ9."},  # a token that nobody signed
    ]
    for method, path in CLOSED:
        for headers in wrong:
            reply = stranger.request(method, re.sub(r"[{}]", "", path), headers=headers, params={"token": token})
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "Denied"), (method, path, headers)
    assert stranger.get("/docs").status_code == 401
    assert len(CLOSED) > 30


CREDENTIALS = {
    "wrong": {"site": "lyon", "secret": "x" * 32},
    "another's": {"site": "oslo", "secret": SECRET},
    "empty": {"site": "lyon", "secret": ""},
    "nobody": {"site": "", "secret": SECRET},
    "no": {},
    "a path": {"site": "../lyon", "secret": SECRET},
}
VERBS = ["session", "put", "get", "certify"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_no_verb_of_the_port_answers_who_has_not_the_secret(world, verb, credential):
    """Denied in words, the connection closed, and the hub's desk never hears of it."""
    line = world.bare()
    line.say({"verb": "here", **CREDENTIALS[credential]})
    line.say({"verb": verb})
    with pytest.raises(Denied, match="is not known by this secret"):
        line.hear()
    with pytest.raises(LinkLost):
        line.hear()
    line.close()
    assert (world.desk.sends.empty(), world.desk.taken) == (True, [])


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_of_the_port_answers_who_does_not_say_who_it_is(world, verb):
    """Denied: whoever comes without a certificate says first which site of this machine it is."""
    line = world.bare()
    line.say({"verb": verb, "site": "lyon", "secret": SECRET})
    with pytest.raises(Denied, match="join with a token"):
        line.hear()
    line.close()
    assert world.desk.sends.empty()


@pytest.mark.parametrize("verb", ["session", "put", "get"])
def test_a_join_token_opens_nothing_but_enrolment(tls, verb):
    """Denied on every verb but the one that certifies a key."""
    word = {"verb": verb, "parcel": update().model_dump(mode="json")}
    kind, words = answer(tls.line(tls.office.invite().identity), word)
    assert (kind, "opens nothing but enrolment" in words) == (Denied, True)
    assert (tls.desk.sends.empty(), tls.desk.taken) == (True, [])


def test_a_stolen_join_token_that_was_used_certifies_nobody_else(tls):
    """The first key that comes with it is bound to it; the thief's is denied, and the site keeps its place."""
    ticket = tls.office.invite("lyon", tls.server.address)
    mine = request(new_key())
    assert enrol(ticket.address, ticket.identity, mine).startswith(b"-----BEGIN CERTIFICATE-----")
    with pytest.raises(Denied, match="this token was used, by another key"):
        enrol(ticket.address, ticket.identity, request(new_key()))
    assert enrol(ticket.address, ticket.identity, mine).startswith(b"-----BEGIN CERTIFICATE-----")


def test_a_certificate_that_is_revoked_ends_its_live_session_at_once_and_does_not_come_back(tls):
    """What is open ends now, not at its next beat; another site goes on, and a new invitation brings a new key in."""
    identity = tls.office.member().identity
    channel, other = tls.open(identity), tls.open(tls.office.member("oslo").identity)
    channel.put(update(), source(frames(1)))  # so that a connection is kept for the next time
    tls.office.members.revoked("lyon")
    tls.server.recheck()
    assert tls.desk.ends.get(timeout=WAIT)[0] == "lyon"
    for call in (lambda: channel.receive(WAIT), lambda: channel.send(progress(1)), lambda: channel.get(wanted())):
        with pytest.raises(Denied, match="its certificate was revoked; ask for another invitation"):
            call()
    kind, words = refused(tls.server.address, identity)
    assert (kind, "was revoked" in words) == (Denied, True)
    other.send(progress(2))
    assert tls.desk.said.get(timeout=WAIT) == ("oslo", progress(2))
    tls.open().send(progress(3))  # invited anew, with another key
    assert tls.desk.said.get(timeout=WAIT) == ("lyon", progress(3))


# --- through a browser


def test_cross_site_request_forgery_changes_nothing(hub, stranger):
    """A session's cookie counts for a change only from the hub's own page; a foreign name for 127.0.0.1 is refused."""
    assert stranger.get(hub.login_url()).status_code == 303
    assert stranger.get("/v1/runs").status_code == 200, "the cookie is good"
    port = int(hub.address.url.rsplit(":", 1)[1])
    for origin in (None, "null", "http://evil.example", "http://127.0.0.1:1", f"http://127.0.0.1:{port}.evil.example"):
        headers = {"Origin": origin} if origin else {}
        for method, path in CLOSED:
            if method != "GET":
                reply = stranger.request(method, re.sub(r"[{}]", "", path), headers=headers, content=b"a=b")
                assert reply.status_code == 401, (method, path, origin)
    assert stranger.post("/v1/resume", headers={"Origin": hub.address.url}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}"):
        assert stranger.get("/v1/runs", headers={"Host": host}).status_code == 403


SCRIPT = "<script>alert(1)</script>"


def test_script_in_a_models_name_is_no_name_and_the_page_runs_none(hub, stranger):
    """No document takes such a name; the page makes text of whatever it shows, and its policy lets no script in."""
    bearer = {"Authorization": f"Bearer {hub.address.token}"}
    for kind, body in ((Deployment, {"name": SCRIPT, "model": "heart@1"}), (QueryJob, {"name": SCRIPT})):
        with pytest.raises(Invalid, match="name: "):
            parse(kind, body, "body")
    reply = stranger.post("/v1/deployments", headers=bearer, json={"name": SCRIPT, "model": SCRIPT})
    assert (reply.status_code, reply.headers["content-type"]) == (422, "application/json")
    reply = stranger.get(f"/v1/models/{SCRIPT}", headers=bearer)
    assert (reply.status_code, reply.headers["content-type"]) == (404, "application/json")
    policy = stranger.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "default-src 'none'" in policy
    page = stranger.get("/").text + stranger.get("/app.js").text
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "onclick="):
        assert way not in page


# --- names that are paths


PATH = "../../hub/token"


def test_path_traversal_in_any_name_leads_nowhere(hub, stranger, tmp_path):
    """A model's, a run's, a site's, a dataset's, a tensor's, a file's, a blob's: refused before it becomes a path."""
    bearer = {"Authorization": f"Bearer {hub.address.token}"}
    for spelt in (
        "..%2f..%2fhub%2ftoken",
        "%2e%2e%2f%2e%2e%2fhub%2ftoken",
        "..%5c..%5chub",
        "%2fetc%2fpasswd",
        "a%00b",
    ):
        for method, path in CLOSED:
            if "{" in path:
                reply = stranger.request(method, re.sub(r"\{.*?\}", spelt, path), headers=bearer, json={})
                assert reply.status_code in (404, 405, 422), (method, path, reply.text)
                assert hub.address.token not in reply.text
    attacks = (
        lambda: parse(QueryJob, {"name": "q", "purpose": "p", "sql": "SELECT 1", "dataset": PATH}, "job"),
        lambda: load(header([(PATH, "F32", [1], 4)]) + bytes(4)),
        lambda: write_bundle(Bundle(files={PATH: "x"}), tmp_path / "code" / "digest"),
        lambda: write_bundle(Bundle(files={"/etc/passwd": "x"}), tmp_path / "code" / "digest"),
        lambda: Blobs(tmp_path).get(f"sha256:{PATH}"),
    )
    for attack in attacks:
        with pytest.raises(AtollError):
            attack()
    assert list(tmp_path.rglob("*token*")) == []


# --- more than anybody needs


def test_a_huge_or_endless_upload_is_refused_before_it_is_read(hub):
    """413 by its stated length alone, 411 for one that states none; what is sent beyond the length is no body of it."""
    port = int(hub.address.url.rsplit(":", 1)[1])
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {hub.address.token}\r\n"
    for more, status in (
        (f"Content-Length: {10**12}\r\n\r\n", b"413"),
        ("Transfer-Encoding: chunked\r\n\r\n" + 1000 * "ffff\r\n", b"411"),
        ("Content-Length: -1\r\n\r\n", b"400"),
        ("Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}", b"400"),
        ("X: " + 200_000 * "x", b"400"),  # a header without an end
        ("Content-Length: 2\r\n\r\n{}" + 70_000 * "x", b"422"),
    ):
        with socket.create_connection(("127.0.0.1", port), WAIT) as line:
            line.sendall((head + more).encode())
            assert line.recv(1000).split(b" ")[1] == status, more[:40]
    assert hub.runs() == []


def test_an_item_over_the_ports_limits_is_refused_before_it_is_read(world):
    """The header of an item says how long it is, and nothing is kept for more than there may be."""
    line = world.line()
    line.write(HEAD.pack(2**32 - 1, 0, 0, WORD))
    with pytest.raises(Invalid, match="over the limit"):
        line.hear()
    assert closed(line)
    line.close()


# --- all the time in the world


class Slow:
    """A server as the hub's and the replicas', but with little patience, and an answer that is long."""

    def __init__(self):
        self.answering = threading.Event()

        async def app(scope, receive, send):
            while (await receive()).get("more_body"):
                pass
            self.answering.set()
            await Response(bytes(64 << 20))(scope, receive, send)

        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=punctual(request=0.3, reading=0.3), log_config=None, lifespan="off")
        self.uvicorn = uvicorn.Server(config)
        self.served = Server(self.uvicorn, listener, threading.Event())
        self.port = listener.getsockname()[1]
        self.served.start()


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.served.close()


LORIS = {
    "says nothing": b"",
    "half a header": b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ",
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{",
}


@pytest.mark.parametrize("what", LORIS)
def test_a_slow_loris_is_cut_off_from_the_api_and_from_a_served_model(slow, what):
    """A byte now and then keeps no connection: a request has its time as a whole."""
    with socket.create_connection(("127.0.0.1", slow.port), WAIT) as line:
        gone = threading.Event()

        def drip():
            try:
                line.sendall(LORIS[what])
                while LORIS[what] and not gone.wait(0.02):
                    line.sendall(b"x")
            except OSError:
                return

        thread = threading.Thread(target=drip)
        thread.start()
        assert closed(Line(line, WAIT))
        gone.set()
        thread.join(WAIT)
    assert until(lambda: not slow.uvicorn.server_state.connections)


def test_who_reads_nothing_of_an_answer_is_cut_off(slow):
    """An answer that nobody takes is dropped, and with it the connection and the memory."""
    with socket.create_connection(("127.0.0.1", slow.port), WAIT) as line:
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.answering.wait(WAIT)
        assert until(lambda: not slow.uvicorn.server_state.connections)


def test_every_server_of_ours_has_that_patience_and_a_bound_on_connections():
    """Nobody adds one without."""
    made = [path.read_text() for path in Path(atoll.__file__).parent.rglob("*.py")]
    servers = [text.split("uvicorn.Config(")[1].split(")\n")[0] for text in made if "uvicorn.Config(" in text]
    assert len(servers) == 2
    assert all("http=punctual()" in text and "limit_concurrency=CONNECTIONS" in text for text in servers)


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_slow_loris_is_cut_off_from_the_port_for_sites(kind, tmp_path):
    """Whoever does not say in time who it is, however it drips, is gone."""
    world = World(kind, tmp_path, Limits(greeting=0.1))
    line = world.bare()
    gone = threading.Event()

    def drip():
        try:
            for byte in HEAD.pack(200, 0, 0, WORD) + b'{"verb": "' + bytes(100_000):
                line.write(bytes([byte]))
                if gone.wait(0.02):
                    return
        except LinkLost:
            return

    thread = threading.Thread(target=drip)
    thread.start()
    assert closed(line)
    gone.set()
    thread.join(WAIT)
    line.close()
    world.close()


# --- the list itself


def test_the_page_of_attacks_names_tests_that_there_are():
    """docs/break-in.md is what a stranger reads: each test that it names exists."""
    root = Path(__file__).parents[2]
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(\w+)`", (root / "docs" / "break-in.md").read_text())
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (root / file).read_text()]
    assert missing == []
    assert len(named) > 30
