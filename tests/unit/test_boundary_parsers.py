"""Whatever another party sends is read as what it is, or refused in words: on a line, in a token, in a request."""

import base64
import itertools
import json
import socket

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_pem_x509_csr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from atoll.boundary.certificates import requested
from atoll.boundary.channel import Frame
from atoll.boundary.identity import Peer, Ticket, new_key, request
from atoll.boundary.line import HEAD, WORD, Line, lost, parsed, raise_told, told
from atoll.boundary.session import Session
from atoll.boundary.visit import Opening
from atoll.errors import AtollError, Denied, Invalid, LinkLost
from atoll.spec.message import MESSAGE, Assign, Beat, Progress, Release
from tests.unit.ends import WAIT, plain, progress
from tests.unit.papers import Office

SLOW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
HEADED = st.builds(
    lambda size, scales, offset, length, rest: HEAD.pack(size, scales, offset, length) + rest,
    st.integers(0, 100) | st.sampled_from([(4 << 20) + 1, (16 << 20) + 1, 2**31, 2**32 - 1]),
    st.integers(0, 3) | st.sampled_from([(1 << 20) + 1, 2**31, 2**32 - 1]),
    st.integers(0, 10) | st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([WORD, 0, 1]) | st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=120),
)
WORDS = st.builds(
    lambda word: HEAD.pack(len(word), 0, 0, WORD) + word, JSON.map(lambda value: json.dumps(value).encode()) | HEADED
)
BYTES = st.lists(st.binary(max_size=60) | HEADED | WORDS, max_size=5).map(b"".join)


def sent(data):
    """Return a line on which these bytes come, and then the end."""
    one, other = socket.socketpair()
    one.sendall(data)
    one.shutdown(socket.SHUT_WR)
    line = Line(other, WAIT)
    line.parting = 0.01
    return one, line


def outcome(call, *arguments):
    """Return what a call returns, or the error of ours that it raises: any other is a fault."""
    try:
        return call(*arguments)
    except AtollError as error:
        return error


# --- lines


@given(BYTES)
def test_what_comes_is_a_word_or_is_refused(data):
    far, line = sent(data)
    while isinstance(found := outcome(line.hear), dict):
        pass
    assert isinstance(found, AtollError)
    line.close()
    far.close()


@given(BYTES)
def test_what_comes_is_a_stream_or_is_refused(data):
    far, line = sent(data)
    found = outcome(plain, line.frames())
    if not isinstance(found, AtollError):
        assert all(min(frame.offset, frame.length) >= 0 for frame in found)
        assert sum(HEAD.size + len(frame.data) + len(frame.scales) for frame in found) < len(data)
    outcome(line.drain)
    line.close()
    far.close()


FRAMES = st.builds(
    Frame, st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1), st.binary(max_size=300), st.binary(max_size=30)
)
TABLES = st.dictionaries(st.text(max_size=10), JSON, max_size=4).filter(lambda word: word.keys() != {"error", "words"})


@given(st.lists(TABLES, max_size=3), st.lists(FRAMES, max_size=5))
def test_words_and_frames_come_as_they_were_sent(words, frames):
    one, other = socket.socketpair()
    site, hub = Line(one, WAIT), Line(other, WAIT)
    for word in words:
        site.say(word)
    site.send(frames)
    assert [repr(hub.hear()) for _ in words] == [repr(word) for word in words]  # as text, where a NaN is itself
    assert plain(hub.frames()) == frames
    for end in (site, hub):
        end.close()


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_word_is_a_table_or_none(data):
    assert isinstance(outcome(parsed, data), dict | Invalid)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 9000,
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"{}\0",
    ],
)
def test_what_other_readers_of_json_would_stumble_over_is_refused(data):
    with pytest.raises(Invalid, match="no JSON table"):
        parsed(data)


@given(TABLES | st.fixed_dictionaries({"error": JSON, "words": JSON}))
def test_an_error_that_is_told_is_one_of_ours_and_short(word):
    error = outcome(raise_told, word)
    assert (error is not None) == (word.keys() == {"error", "words"})
    if error is not None:
        assert len(str(error)) <= 4000
        assert parsed(json.dumps(told(error)).encode()) == told(error)


@given(st.integers(0, 200), st.text(max_size=20) | st.none())
def test_nothing_that_breaks_a_connection_is_a_denial(number, words):
    assert type(lost(OSError(number, words))) is LinkLost


# --- sessions


MESSAGES = [progress(1), Beat(), Release(run="run", words="zoë"), Release(run="other", words="w" * 500)]


def heard(data):
    """Return the messages that a session hears of these bytes, and the words it ends with."""
    found = []
    far, line = sent(data)
    words = Session(line, found.append).run()
    line.close()
    far.close()
    return found, words


@given(BYTES)
def test_a_session_hears_messages_or_ends_in_words(data):
    found, words = heard(data)
    assert isinstance(words, str)
    assert all(MESSAGE.validate_json(MESSAGE.dump_json(message)) == message for message in found)


@given(st.lists(st.sampled_from(MESSAGES), max_size=6), st.binary(max_size=30))
def test_what_was_said_before_the_nonsense_is_heard(messages, rest):
    items = [MESSAGE.dump_json(message) for message in messages]
    found, words = heard(b"".join(HEAD.pack(len(item), 0, 0, WORD) + item for item in items) + rest)
    assert found == [message for message in messages if not isinstance(message, Beat)]
    assert words


@given(st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=4), st.data())
def test_a_message_may_come_in_any_pieces(messages, data):
    items = [MESSAGE.dump_json(message) for message in messages]
    whole = b"".join(HEAD.pack(len(item), 0, 0, WORD) + item for item in items)
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=6))})
    one, other = socket.socketpair()
    session, found = Session(Line(other, WAIT), lambda message: None), []
    for start, end in itertools.pairwise(cuts):
        session._in += whole[start:end]
        while (message := session._message()) is not None:
            found.append(message)
    assert found == messages
    one.close()
    other.close()


# --- what begins a conversation


@given(JSON | st.fixed_dictionaries({}, optional={name: JSON for name in Opening.model_fields}))
def test_a_conversation_begins_with_an_opening_or_not_at_all(word):
    try:
        opening = Opening.model_validate(word)
    except ValidationError:
        return
    assert opening.verb in ("here", "session", "put", "get", "certify")
    assert set(word) <= set(Opening.model_fields)


def test_a_message_is_closed_to_what_nobody_asked_for():
    for kind in (Assign, Progress, Release):
        with pytest.raises(ValidationError):
            kind.model_validate({**dict.fromkeys(kind.model_fields), "more": 1})


# --- tokens, names and requests


def changed(data, edits):
    """Return bytes with some of them replaced, left out or put in."""
    made = bytearray(data)
    for place, kind, value in edits:
        at = place % (len(made) or 1)
        made[at : at + (0 if kind == "in" else 1)] = b"" if kind == "out" else bytes([value])
    return bytes(made)


EDITS = st.lists(
    st.tuples(st.integers(0, 5000), st.sampled_from(["to", "in", "out"]), st.integers(0, 255)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def ticket(tmp_path_factory):
    return Office(tmp_path_factory.mktemp("office")).invite()


def spelt(token):
    """Return the table that a token spells."""
    return json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))


@given(st.text(max_size=100) | st.binary(max_size=100).map(lambda data: base64.urlsafe_b64encode(data).decode()))
def test_any_text_is_no_token(text):
    with pytest.raises(Invalid, match="this is no join token"):
        Ticket.read(text)


@SLOW
@given(
    st.dictionaries(st.sampled_from(["address", "key", "certificate", "root", "more"]), JSON, min_size=1, max_size=2)
)
def test_a_token_of_other_parts_is_no_token(ticket, parts):
    text = base64.urlsafe_b64encode(json.dumps({**spelt(ticket.token()), **parts}).encode()).decode()
    with pytest.raises(Invalid, match="this is no join token"):
        Ticket.read(text)


@SLOW
@given(st.sampled_from(["key", "certificate", "root"]), EDITS)
def test_a_token_with_a_byte_changed_in_it_is_another_or_none(ticket, part, edits):
    table = spelt(ticket.token())
    was = base64.urlsafe_b64decode(table[part] + "==")
    table[part] = base64.urlsafe_b64encode(changed(was, edits)).decode().rstrip("=")
    read = outcome(Ticket.read, base64.urlsafe_b64encode(json.dumps(table).encode()).decode())
    if isinstance(read, AtollError):
        assert "this is no join token" in str(read)
    else:  # nothing in it that counts is another
        assert (read.site, read.invitation, read.address) == (ticket.site, ticket.invitation, ticket.address)
        assert (read.identity.key, read.identity.peer) == (ticket.identity.key, ticket.identity.peer)


@given(st.text(max_size=200))
def test_any_text_is_no_name(text):
    with pytest.raises(Denied, match="no name that a hub gives"):
        Peer.read(text)


KEY = new_key()
ASKED = load_pem_x509_csr(request(KEY)).public_bytes(serialization.Encoding.DER)


@given(st.binary(max_size=300) | EDITS.map(lambda edits: changed(request(KEY), edits)))
def test_any_bytes_are_no_request_or_the_same(data):
    found = outcome(requested, data)
    assert found == KEY.public_key() or "no signed request" in str(found)


@given(EDITS)
def test_a_request_with_a_byte_changed_in_it_proves_nothing_else(edits):
    data = base64.encodebytes(changed(ASKED, edits))
    pem = b"-----BEGIN CERTIFICATE REQUEST-----\n" + data + b"-----END CERTIFICATE REQUEST-----\n"
    found = outcome(requested, pem)
    assert found == KEY.public_key() or "no signed request" in str(found)
