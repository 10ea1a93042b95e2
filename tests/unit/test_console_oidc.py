"""People of an identity provider: a real one, small, on 127.0.0.1, which serves its discovery document and its keys."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from atoll.console import oidc
from atoll.console.guard import Keys
from atoll.console.oidc import AGAIN, FRESH, LARGEST, STALE, Provider, ProviderFile
from atoll.console.tokens import Tokens
from atoll.errors import Denied, Invalid, Unavailable
from atoll.spec.document import parse
from tests.unit.people import ADA, People

RSA, OTHER = (rsa.generate_private_key(65537, 2048) for _ in range(2))
CURVE = ec.generate_private_key(ec.SECP256R1())
SECRET = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"  # of a shared key, which must never count


def published(algorithm, key, kid, **more):
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, **more}


KEYS = [
    published(RSAAlgorithm, RSA, "one", alg="RS256", use="sig"),
    published(ECAlgorithm, CURVE, "two"),
    published(RSAAlgorithm, OTHER, "for-encryption", use="enc"),
    {"kty": "oct", "k": SECRET, "kid": "shared", "alg": "HS256"},
    {"kty": "strange", "kid": "strange"},
    "no table",
]


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        issuer = self.server
        issuer.asked.append(self.path)
        said = issuer.said.get(self.path, (404, b"{}"))
        status, body = said if isinstance(said, tuple) else (200, said)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", issuer.url + "/keys")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        """Tests print nothing."""


@contextmanager
def serving():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.asked, server.said = [], {"/keys": {"keys": KEYS}}
        server.said["/.well-known/openid-configuration"] = {"issuer": server.url, "jwks_uri": f"{server.url}/keys"}
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def issuer():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def known():
    """A provider that has been asked for its keys, and is not asked again while these tests last."""
    with serving() as server:
        one = provider(server, lambda: 1000.0)
        one.check(token(server))
        yield server, one


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def provider(server, clock=time.monotonic, **more):
    table = {"staff": ["scientist"], "lead": ["operator", "viewer"]}
    fields = {"issuer": server.url, "audience": "atoll", "claim": "realm.groups", "roles": table, **more}
    return Provider(parse(ProviderFile, fields, "oidc.yaml"), clock)


def token(issuer, key=RSA, kid="one", algorithm="RS256", **changes):
    now = int(time.time())
    claims = {"iss": issuer.url, "aud": "atoll", "sub": "Ada|1", "iat": now, "exp": now + 60}
    claims |= {"realm": {"groups": ["staff", "others"]}, **changes}
    left = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(left, key, algorithm=algorithm, headers={"kid": kid})


def test_a_provider_vouches_for_its_users_in_the_roles_of_the_table(issuer):
    one = provider(issuer, projects=["lung"])
    found = one.check(token(issuer))
    assert (found.user.name, found.user.roles, found.user.projects) == ("sso:Ada|1", ("scientist",), ("lung",))
    both = one.check(token(issuer, CURVE, "two", "ES256", realm={"groups": "lead staff"}))
    assert both.user.roles == ("viewer", "scientist", "operator")
    assert issuer.asked == ["/.well-known/openid-configuration", "/keys"], "keys are kept"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"iss": "https://elsewhere"}, "issuer"),
        ({"aud": "another"}, "[Aa]udience"),
        ({"exp": 1}, "expired"),
        ({"nbf": 4_000_000_000}, "not yet valid"),
        ({"exp": None}, 'missing the "exp" claim'),
        ({"sub": None}, 'missing the "sub" claim'),
        ({"sub": "../../ada"}, "no name that can be used"),
        ({"sub": "a" * 200}, "no name that can be used"),
        ({"realm": {"groups": ["others"]}}, "nothing in its claim 'realm.groups' is a role here"),
        ({"realm": "staff"}, "nothing in its claim"),
        ({"kid": "nowhere"}, "has no key 'nowhere'"),
        ({"kid": "for-encryption", "key": OTHER}, "has no key 'for-encryption'"),
        ({"kid": "strange"}, "has no key 'strange'"),
        ({"key": OTHER}, "[Ss]ignature"),
        ({"kid": "shared", "key": SECRET, "algorithm": "HS256"}, "has no key 'shared'"),
        ({"kid": "one", "key": SECRET, "algorithm": "HS256"}, "alg"),
        ({"kid": "one", "key": None, "algorithm": "none"}, "alg"),
        ({"kid": "one", "key": CURVE, "algorithm": "ES256"}, "alg"),
        ({"kid": "one", "algorithm": "RS512"}, "alg"),
    ],
)
def test_what_the_provider_does_not_vouch_for_is_refused(known, changes, words):
    issuer, one = known
    with pytest.raises(Denied, match=words):
        one.check(token(issuer, **changes))
    assert one.check(token(issuer)).user.roles == ("scientist",)


@pytest.mark.parametrize("said", [None, False, 7, "", "a" * 121, ["ada@example.org"]])
def test_a_token_without_the_claim_that_users_are_called_by_is_nobodys(known, said):
    issuer, one = known
    by_mail = Provider(one.file.model_copy(update={"name": "email"}), lambda: 1000.0)
    told = by_mail.check(token(issuer, email="ada@example.org"))
    assert told.user.name == "sso:ada@example.org"
    with pytest.raises(Denied, match=r"its claim 'email' is .*, which is no name that can be used; have the provider"):
        by_mail.check(token(issuer, email=said))


def test_keys_are_asked_for_anew_when_one_is_unknown_but_not_for_every_made_up_one(issuer):
    clock = Clock()
    one = provider(issuer, clock, keys=f"{issuer.url}/keys")
    one.check(token(issuer))
    issuer.said["/keys"] = {"keys": [published(RSAAlgorithm, OTHER, "new")]}
    for _ in range(5):
        with pytest.raises(Denied, match="has no key"):
            one.check(token(issuer, OTHER, "new"))
    assert issuer.asked == ["/keys"]
    clock.now += AGAIN + 1
    assert one.check(token(issuer, OTHER, "new")).user.name == "sso:Ada|1"
    with pytest.raises(Denied, match="has no key 'one'"):
        one.check(token(issuer))


def test_a_provider_that_does_not_answer_is_believed_for_an_hour_and_no_longer(issuer):
    clock = Clock()
    one = provider(issuer, clock, keys=f"{issuer.url}/keys")
    one.check(token(issuer))
    issuer.said["/keys"] = (500, b"")
    clock.now += FRESH + 1
    one.check(token(issuer))
    clock.now += STALE
    for _ in range(2):
        with pytest.raises(Unavailable):
            one.check(token(issuer))


@pytest.mark.parametrize(
    "said",
    [
        b"no JSON",
        [1],
        {"keys": "none"},
        {"keys": []},
        {"keys": [KEYS[3]]},
        b"[" * 100_000,
        b" " * (LARGEST + 1),
        (302, b""),
        (404, b""),
    ],
)
def test_a_provider_without_a_key_for_us_vouches_for_nobody(issuer, said):
    issuer.said["/jwks"] = said
    with pytest.raises(Unavailable):
        provider(issuer, keys=f"{issuer.url}/jwks").check(token(issuer))


def test_anothers_discovery_document_leads_nowhere(issuer):
    issuer.said["/.well-known/openid-configuration"] = {"issuer": "https://other", "jwks_uri": f"{issuer.url}/keys"}
    with pytest.raises(Unavailable, match="discovery document is another's"):
        provider(issuer).check(token(issuer))
    issuer.said["/.well-known/openid-configuration"] = {"issuer": issuer.url, "jwks_uri": "http://example.org/keys"}
    with pytest.raises(Unavailable, match="names no https jwks_uri"):
        provider(issuer).check(token(issuer))


def test_what_can_be_read_on_the_way_is_no_provider(issuer, tmp_path):
    for change in ({"issuer": "http://id.example.org"}, {"keys": "http://id.example.org/keys"}, {"keys": "file:///x"}):
        with pytest.raises(Invalid, match="can be read and changed on the way; use https"):
            provider(issuer, **change)
    with pytest.raises(Invalid, match="algorithms"):
        provider(issuer, algorithms=["HS256"])
    assert oidc.safe("https://id.example.org")
    assert Provider.of(tmp_path) is None
    file = "issuer: https://id.example.org\naudience: atoll\nroles: {staff: [scientist]}\n"
    (tmp_path / "oidc.yaml").write_text(file)
    found = Provider.of(tmp_path)
    assert found is not None
    assert found.file.algorithms == ("RS256", "ES256")


def test_each_token_is_checked_by_whoever_made_it(known, tmp_path):
    issuer, one = known
    people = People(tmp_path)
    people.users.put(ADA, "local")
    tokens = Tokens(tmp_path, people.users)
    keys = Keys("t" * 43, tokens, one)
    mine = tokens.issue("ada", 1.0, ("all",), "local")
    names = [asyncio.run(keys.check(given)).user.name for given in ("t" * 43, mine, token(issuer))]
    assert names == ["local", "ada", "sso:Ada|1"]
    session = keys.session(keys.ticket(one.check(token(issuer))))
    assert keys.remembered(session).user.name == "sso:Ada|1"
    for given in ("", "a.b.c", mine[:-8], token(issuer, iss=f"atoll/{tokens.kid}"), token(issuer, OTHER)):
        with pytest.raises(Denied, match="token: "):
            asyncio.run(keys.check(given))
    people.journal.close()
