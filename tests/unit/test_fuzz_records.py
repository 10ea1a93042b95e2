"""What strangers hand over to be checked, journals and proofs, and notes between witnesses: good, or told bad."""

import base64
import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.journal import Journal, export, note, proofs, witness
from atoll.journal.key import Key, PublicKey
from atoll.journal.note import Witnessed
from atoll.journal.tree import extends, includes
from atoll.spec.document import canonical, parse_json
from atoll.spec.event import Joined
from atoll.spec.record import Attested
from tests.unit.mutations import mutated, outcome

SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclasses.dataclass
class Record:
    """A journal of seven entries that lyon cosigned at five, in all forms in which it is handed over."""

    key: PublicKey
    exported: bytes
    proof: bytes
    note: str
    attested: bytes
    seen: witness.Seen


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    with Journal(tmp_path_factory.mktemp("record") / "journal.db", "hub") as journal:
        journal.append(*(Joined(run=f"run-{number}", site="berlin") for number in range(5)), actor="hub")
        checkpoint, signature = journal.checkpoint()
        journal.keep(Witnessed(checkpoint, signature, note.cosigned(checkpoint, Key.new("lyon"), 1_700_000_000)))
        seen = witness.Seen(journal.key, checkpoint, checkpoint.note(journal.key, signature))
        journal.append(*(Joined(run=f"run-{number}", site="lyon") for number in range(2)), actor="hub")
        text, path = proofs.grown(journal, 5)
        return Record(
            key=journal.key,
            exported=b"".join(export.lines(journal)),
            proof=canonical(proofs.prove(journal, 3)),
            note=text,
            attested=canonical(Attested(seen=5, key=str(journal.key), checkpoint=text, proof=path)),
            seen=seen,
        )


def entries(exported):
    return [line for line in exported.split(b"\n") if line.startswith(b'{"entry"')]


@SAME_FOLDER
@given(data=st.data())
def test_an_exported_journal(record, tmp_path, data):
    path = tmp_path / "hub.jsonl"
    path.write_bytes(made := data.draw(mutated(record.exported)))
    verdict = outcome(export.verify, path, record.key)
    if not isinstance(verdict, AtollError) and verdict.intact:
        assert entries(made) == entries(record.exported)
    assert isinstance(outcome(export.is_proof, path), bool)


@SAME_FOLDER
@given(data=st.data())
def test_a_proof(record, tmp_path, data):
    path = tmp_path / "proof.json"
    path.write_bytes(data.draw(mutated(record.proof)))
    verdict = outcome(export.verify_proof, path, record.key)
    if not isinstance(verdict, AtollError) and verdict.intact:
        assert b"run-2" in path.read_bytes(), "nothing else is proven of the third entry"


@SAME_FOLDER
@given(data=st.data())
def test_a_note(record, data):
    text = data.draw(mutated(record.note.encode())).decode(errors="replace")
    assert isinstance(outcome(note.opened, text, record.key), note.Checkpoint | AtollError)
    outcome(note.cosignatures, text, record.key)
    outcome(note.cosignature, text, record.key)
    outcome(witness.Seen.parse, f"{record.key}\n{text}")


@SAME_FOLDER
@given(data=st.data())
def test_what_a_journals_owner_shows_its_witness(record, data):
    shown = outcome(parse_json, Attested, data.draw(mutated(record.attested)), "attested")
    if isinstance(shown, Attested):
        found = outcome(witness.judge, record.seen, "hub", shown)
        if not isinstance(found, AtollError):
            assert found.checkpoint.size >= record.seen.checkpoint.size
            assert found.key == record.key


@given(st.text(max_size=250) | st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()))
def test_a_key(text):
    for spelt in (text, f"atoll/hub/0123456789abcdef+00112233+{text}"):
        assert isinstance(outcome(PublicKey.read, spelt), AtollError)


HASHES = st.lists(st.binary(min_size=32, max_size=32) | st.binary(max_size=3), max_size=70)


@given(st.integers(0, 2**62), st.integers(0, 2**62), HASHES)
def test_a_path_of_any_length_to_a_tree_of_any_size_proves_nothing(place, size, path):
    root = bytes(32)
    assert not includes(place, size, root, path, bytes(31) + b"x")
    assert not extends(min(place, size) or 1, b"y" * 32, max(place, size, 2), root, path)
