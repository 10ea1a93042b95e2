"""The hub's port before strangers and liars: who is let in, and what nonsense is answered with."""

import pyarrow as pa
import pyarrow.flight as fl
import pytest

from atoll.boundary.flight import FlightChannel
from atoll.errors import Denied
from tests.unit.ends import SECRET, WAIT, World, update


@pytest.fixture
def flight():
    made = World("flight")
    yield made
    made.close()


# --- who may come in (over a socket; in memory both ends are one process)


CREDENTIALS = {
    "none": None,
    "wrong": b"Bearer lyon:" + b"x" * 32,
    "another's": b"Bearer oslo:" + SECRET.encode(),
    "empty": b"Bearer lyon:",
    "nobody": b"Bearer :" + SECRET.encode(),
    "scheme": b"Basic lyon:" + SECRET.encode(),
    "token": b"Token lyon:guess:" + b"y" * 32,
}


@pytest.mark.parametrize("verb", [b"session ", b"put {}", b"get {}", b"anything"])
@pytest.mark.parametrize("credential", CREDENTIALS)
def test_no_verb_answers_a_stranger(flight, verb, credential):
    header = CREDENTIALS[credential]
    headers = [] if header is None else [(b"authorization", header)]
    options = fl.FlightCallOptions(timeout=WAIT, headers=headers)

    def ask(client):  # the refusal may be there already when the call is made
        _writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(verb), options)
        reader.read_chunk()

    with fl.connect(flight.server.address) as client, pytest.raises(fl.FlightUnauthenticatedError):
        ask(client)
    assert flight.desk.sends.empty()
    assert (flight.desk.taken, list(flight.desk.secrets)) == ([], ["lyon"])


@pytest.mark.parametrize("call", ["list_flights", "list_actions", "do_get", "get_flight_info", "do_action"])
def test_flights_own_verbs_answer_nobody(flight, call):
    arguments = {
        "do_get": [fl.Ticket(b"x")],
        "get_flight_info": [fl.FlightDescriptor.for_command(b"x")],
        "do_action": [fl.Action("x", b"")],
    }
    for headers in ([], [(b"authorization", f"Bearer lyon:{SECRET}".encode())]):
        options = fl.FlightCallOptions(timeout=WAIT, headers=headers)
        with fl.connect(flight.server.address) as client, pytest.raises((pa.ArrowException, NotImplementedError)):
            list(getattr(client, call)(*arguments.get(call, []), options=options))


def test_a_wrong_secret_is_denied_in_words(flight):
    with pytest.raises(Denied, match="site 'lyon' is not known by this secret"):
        FlightChannel(flight.server.address, "lyon", "x" * 32)


def test_a_token_makes_a_secret_and_the_wrong_one_does_not(flight):
    with pytest.raises(Denied, match="unknown or was used"):
        FlightChannel(flight.server.address, "oslo", "o" * 32, token="guess")
    FlightChannel(flight.server.address, "oslo", "o" * 32, token="once").close()
    FlightChannel(flight.server.address, "oslo", "o" * 32).close()
    assert flight.desk.secrets["oslo"] == "o" * 32


# --- a site that says nonsense


def exchange(flight, command):
    options = fl.FlightCallOptions(timeout=WAIT, headers=[(b"authorization", f"Bearer lyon:{SECRET}".encode())])
    client = fl.connect(flight.server.address)
    return client, *client.do_exchange(fl.FlightDescriptor.for_command(command), options)


@pytest.mark.parametrize("command", [b"dance {}", b"put", b"put {", b'put {"run": "../../x"}', b"get []", b"\xff\x00"])
def test_an_unknown_verb_or_an_ill_formed_parcel_is_answered_with_what_is_wrong(flight, command):
    client, _writer, reader = exchange(flight, command)
    said = bytes(reader.read_chunk().app_metadata)
    assert b'"error": "Invalid"' in said
    client.close()
    assert flight.desk.taken == []


@pytest.mark.parametrize("batch", ["schema", "rows", "null"])
def test_a_batch_of_another_shape_is_refused(flight, batch):
    names = ["offset", "length", "data", "scales"]
    good = pa.schema(list(zip(names, [pa.int64(), pa.int64(), pa.binary(), pa.binary()], strict=True)))
    made = {
        "schema": pa.record_batch({"offset": [1]}),
        "rows": pa.record_batch({"offset": [0, 1], "length": [1, 1], "data": [b"", b""], "scales": [b"", b""]}, good),
        "null": pa.record_batch({"offset": [0], "length": [1], "data": [None], "scales": [b""]}, good),
    }[batch]
    client, writer, reader = exchange(flight, b"put " + update().model_dump_json().encode())
    assert bytes(reader.read_chunk().app_metadata) == b'{"go": true}'
    writer.begin(made.schema)
    writer.write_batch(made)
    writer.done_writing()
    said = bytes(reader.read_chunk().app_metadata)
    assert b'"error": "Invalid"' in said
    client.close()
    assert flight.desk.taken == []


@pytest.mark.parametrize("words", [b"{", b'{"kind": "rule the world"}', b"[]"])
def test_a_session_that_speaks_nonsense_is_ended(flight, words):
    client, writer, _reader = exchange(flight, b"session ")
    writer.begin(pa.schema([]))
    writer.write_metadata(words)
    assert flight.desk.ends.get(timeout=WAIT)[0] == "lyon"
    assert flight.desk.said.empty()
    client.close()
