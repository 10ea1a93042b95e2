"""Users' tokens: what opens the API, and everything that looks like it and does not."""

import base64
import hashlib
import hmac
import json
import time

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from atoll.console.guard import Keys
from atoll.console.tokens import AUDIENCE, OWN, SCOPES, Tokens
from atoll.errors import Corrupt, Denied, Invalid, NotFound
from atoll.spec.user import TokenIssued, User
from tests.unit.people import ADA, BOB, People


@pytest.fixture
def people(tmp_path):
    made = People(tmp_path)
    made.users.put(ADA, "local")
    yield made
    made.journal.close()


@pytest.fixture
def tokens(people, tmp_path):
    return Tokens(tmp_path, people.users)


def forged(tokens, tmp_path, people, **changes):
    """Return a token signed by the hub's own key with other claims, of an id that the journal knows."""
    people.users.issued(TokenIssued(token="t-1", name="ada", scope=("all",), expires=time.time() + 60, by="local"))
    now = int(time.time())
    claims = {"iss": f"atoll/{tokens.kid}", "sub": "ada", "aud": AUDIENCE, "jti": "t-1", "scope": "all"}
    claims |= {"iat": now, "nbf": now, "exp": now + 60, **changes}
    key = (tmp_path / "users.key").read_text()
    left = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(left, key, algorithm="EdDSA", headers={"kid": tokens.kid})


def unsigned(header, claims, sign=lambda text: b""):
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    text = b".".join(parts)
    return (text + b"." + base64.urlsafe_b64encode(sign(text)).rstrip(b"=")).decode()


def test_a_token_opens_for_its_user_with_the_roles_of_now(tokens, people):
    token = tokens.issue("ada", 1.0, ("read", "submit"), "local")
    found = tokens.check(token)
    assert (found.user, found.scope) == (ADA, ("view", "audit", "submit", "cancel"))
    assert found.expires == pytest.approx(time.time() + 3600, abs=5)
    people.users.put(User(name="ada", roles=("viewer",)), "local")
    assert tokens.check(token).user.roles == ("viewer",)
    assert tokens.renewed(found).user.roles == ("viewer",)


def test_what_the_journal_has_of_a_token_opens_nothing(tokens, people, tmp_path):
    token = tokens.issue("ada", 1.0, ("all",), "local")
    written = (tmp_path / "journal.db").read_bytes() + (tmp_path / "journal.db-wal").read_bytes()
    assert token.rpartition(".")[2].encode() not in written
    [issued] = [entry.event for entry in people.journal.entries(kinds=("token.issued",))]
    assert (issued.name, issued.by, issued.scope) == ("ada", "local", ("all",))


def test_a_revoked_token_and_all_of_a_user_and_those_of_a_removed_one_open_nothing(tokens, people):
    first, second, third = (tokens.issue("ada", 1.0, ("all",), "local") for _ in range(3))
    passed = tokens.check(first)
    assert people.users.revoke(passed.token, "local") == (passed.token,)
    for refuse in (lambda: tokens.check(first), lambda: tokens.renewed(passed)):
        with pytest.raises(Denied, match="revoked"):
            refuse()
    tokens.check(second)
    assert len(people.users.revoke("ada", "local")) == 2
    with pytest.raises(Denied, match="revoked"):
        tokens.check(third)
    fourth = tokens.issue("ada", 1.0, ("all",), "local")
    people.users.remove("ada", "local")
    people.users.put(ADA, "local")
    with pytest.raises(Denied, match="revoked, or its user removed"):
        tokens.check(fourth)
    with pytest.raises(NotFound):
        people.users.revoke("ada", "local")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exp": 1}, "expired"),
        ({"nbf": 4_000_000_000}, "not yet valid"),
        ({"iat": 4_000_000_000}, "not yet valid"),
        ({"aud": "another"}, "[Aa]udience"),
        ({"iss": "atoll/other"}, "issuer"),
        ({"exp": None}, 'missing the "exp" claim'),
        ({"jti": None}, 'missing the "jti" claim'),
        ({"aud": None}, 'missing the "aud" claim'),
        ({"jti": "t-2"}, "revoked"),
        ({"sub": "bob"}, "revoked"),
        ({"sub": "local"}, "revoked"),
    ],
)
def test_a_token_with_one_wrong_claim_is_refused_though_the_key_is_right(tokens, people, tmp_path, changes, words):
    people.users.put(BOB, "local")
    with pytest.raises(Denied, match=words):
        tokens.check(forged(tokens, tmp_path, people, **changes))
    assert tokens.check(forged(tokens, tmp_path, people)).user == ADA


def test_no_scope_is_no_right(tokens, people, tmp_path):
    assert tokens.check(forged(tokens, tmp_path, people, scope="")).scope == ()
    assert tokens.check(forged(tokens, tmp_path, people, scope="everything")).scope == ()
    with pytest.raises(Invalid, match="scope: 'al'; did you mean 'all'"):
        tokens.issue("ada", 1.0, ("al",), "local")
    for hours in (0.0, 721.0):
        with pytest.raises(Invalid, match="hours: "):
            tokens.issue("ada", hours, ("all",), "local")
    with pytest.raises(NotFound, match="there is no 'adda'"):
        tokens.issue("adda", 1.0, ("all",), "local")
    with pytest.raises(Invalid, match="the hub's own token"):
        tokens.issue("local", 1.0, ("all",), "local")
    assert set(SCOPES["all"]) == {action for actions in SCOPES.values() for action in actions}


def test_another_key_and_another_algorithm_are_refused(tokens, people, tmp_path):
    good = forged(tokens, tmp_path, people)
    head, body, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    header = {"alg": "none", "kid": tokens.kid, "typ": "JWT"}
    stranger = Ed25519PrivateKey.generate()
    raw = tokens.public
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = Ed25519PrivateKey.from_private_bytes(
        serialization.load_pem_private_key((tmp_path / "users.key").read_bytes(), None).private_bytes_raw()
    ).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, form)
    bad = [
        unsigned(header, claims),
        f"{head}.{body}.",
        f"{head}.{body}.{signature[:-4]}AAAA",
        unsigned({**header, "alg": "EdDSA"}, claims, stranger.sign),
        unsigned({**header, "alg": "EdDSA", "kid": "other"}, claims, stranger.sign),
        unsigned({"alg": "EdDSA", "typ": "JWT"}, claims, stranger.sign),
        unsigned({**header, "alg": "EdDSA", "kid": 7}, claims, stranger.sign),
        *(
            unsigned({**header, "alg": "HS256"}, claims, lambda text, key=key: hmac.digest(key, text, hashlib.sha256))
            for key in (raw, pem)
        ),
        "",
        "a.b",
        "....",
        "x" * 100_000,
        good.replace(".", "!", 1),
    ]
    for token in bad:
        with pytest.raises(Denied, match="token: "):
            tokens.check(token)
    assert tokens.check(good).user == ADA


def test_a_session_ends_with_its_token_and_never_becomes_the_hubs_own(tokens, people):
    keys = Keys("t" * 43, tokens)
    token = tokens.issue("ada", 1.0, ("read",), "local")
    session = keys.session(keys.ticket(tokens.check(token)))
    assert keys.remembered(session).scope == SCOPES["read"]
    people.users.revoke("ada", "local")
    with pytest.raises(Denied, match="revoked"):
        keys.remembered(session)
    with pytest.raises(Denied, match="this link was used"):
        keys.session(token)
    assert keys.remembered(keys.session("t" * 43)).user == OWN.user


def test_the_key_is_kept_and_is_nobody_elses(tokens, people, tmp_path):
    token = tokens.issue("ada", 1.0, ("all",), "local")
    assert (tmp_path / "users.key").stat().st_mode & 0o777 == 0o600
    assert Tokens(tmp_path, people.users).check(token).user == ADA
    (tmp_path / "users.key").chmod(0o640)
    with pytest.raises(Denied, match="others than its owner can make tokens"):
        Tokens(tmp_path, people.users)
    (tmp_path / "users.key").chmod(0o600)
    (tmp_path / "users.key").write_text("no key")
    with pytest.raises(Corrupt, match="no Ed25519 key"):
        Tokens(tmp_path, people.users)
