"""Keys, checkpoints and proofs: what was signed is told from what was not, and nothing is believed by halves."""

import base64
import hashlib
import re
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import Corrupt, Denied, Invalid, NotFound
from atoll.journal import Journal, note, proofs
from atoll.journal.key import Key, PublicKey
from atoll.journal.note import Checkpoint, Witnessed
from atoll.spec.event import Joined

ROOT = hashlib.sha256(b"root").digest()


def written(path, count=20):
    with Journal(path, "hub") as journal:
        for number in range(count):
            journal.append(Joined(run=f"run-{number}", site="berlin"), actor="hub")
    return Journal(path, "hub")


def signed(key, size=812):
    checkpoint = Checkpoint(key.public.name, size, ROOT)
    return checkpoint, checkpoint.note(key.public, checkpoint.signed(key))


def test_a_key_is_spelt_as_in_signed_notes_and_read_back():
    key = Key.new("lyon").public
    name, number, rest = str(key).split("+", 2)
    raw = base64.b64decode(rest)
    assert re.fullmatch(r"atoll/lyon/[0-9a-f]{16}", name)
    assert raw[:1] == b"\x01"
    assert number == hashlib.sha256(name.encode() + b"\n" + raw).hexdigest()[:8]
    assert PublicKey.read(str(key)) == key


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("lyon", "bern"),
        lambda text: text[:-5] + ("A" if text[-5] != "A" else "B") + text[-4:],
        lambda text: text.replace("+", "-", 1),
        lambda text: text + "=",
        lambda text: text.replace("atoll/", "atoll/../"),
        lambda text: "",
        lambda text: text * 10,
    ],
)
def test_a_key_whose_parts_do_not_fit_is_none(spoil):
    with pytest.raises(Invalid, match="is no key of a journal"):
        PublicKey.read(spoil(str(Key.new("lyon").public)))


def test_a_key_is_kept_in_a_private_file_and_made_once(tmp_path):
    path = tmp_path / "journal.key"
    with pytest.raises(NotFound, match="is gone"):
        Key.kept(path, "hub", make=False)
    made = Key.kept(path, "hub", make=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Key.kept(path, "hub", make=True).public == made.public
    assert [file.name for file in tmp_path.iterdir()] == ["journal.key"]
    assert "PRIVATE" not in repr(made)
    path.chmod(0o644)
    with pytest.raises(Denied, match="chmod 600"):
        Key.kept(path, "hub", make=False)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(Corrupt, match="holds no Ed25519 key"):
        Key.kept(path, "hub", make=False)


def test_a_checkpoint_is_the_text_of_transparency_logs_and_its_signature_is_over_that_text():
    key = Key.new("hub")
    checkpoint, text = signed(key)
    body, line = text.split("\n\n")
    assert body == f"{key.public.name}\n812\n{base64.b64encode(ROOT).decode()}"
    mark, name, signature = line.rstrip("\n").split(" ")
    assert (mark, name) == ("—", key.public.name)
    Ed25519PublicKey.from_public_bytes(key.public.raw).verify(base64.b64decode(signature)[4:], f"{body}\n".encode())
    assert note.opened(text, key.public) == checkpoint


def test_a_note_is_opened_by_the_key_that_signed_it_and_by_no_other():
    key, other = Key.new("hub"), Key.new("hub")
    _, text = signed(key)
    with pytest.raises(Corrupt, match="is not signed by"):
        note.opened(text, other.public)
    with pytest.raises(Corrupt, match="is not signed by"):
        note.opened(text.replace("\n812\n", "\n813\n"), key.public)
    elsewhere = Checkpoint("atoll/hub/0000000000000000", 812, ROOT)  # the same key for another journal
    with pytest.raises(Corrupt, match="is not signed by"):
        note.opened(elsewhere.note(key.public, elsewhere.signed(key)), key.public)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "\n\n", "a\n1\nb\n\n", "a\n01\n" + 43 * "A" + "=\n\n— a AAAAAAAA\n", "a\n1\nAAAA\n\n— a AAAAAAAA\n"],
)
def test_what_is_no_note_is_told_so(text):
    with pytest.raises(Invalid, match="checkpoint: is"):
        note.opened(text, Key.new("hub").public)


@given(st.text(max_size=300), st.integers(0, 250), st.integers(0, 60))
def test_a_note_with_anything_else_in_it_is_never_opened(words, at, length):
    key = Key.new("hub")
    text = signed(key)[1]
    spoilt = text[:at] + words + text[at + length :]
    if spoilt != text:
        try:
            note.opened(spoilt, key.public)
        except (Invalid, Corrupt):
            return
        assert text in spoilt or spoilt.startswith(text[: text.index("\n\n") + 2])  # lines of others may stand beside


def test_a_witness_signs_the_time_and_the_checkpoint_together():
    hub, lyon = Key.new("hub"), Key.new("lyon")
    checkpoint, text = signed(hub)
    word = note.cosigned(checkpoint, lyon, 1_700_000_000)
    assert word.holds(checkpoint)
    assert not word.holds(Checkpoint(checkpoint.origin, 813, ROOT))
    assert note.cosignature(word.line, lyon.public) == word
    assert note.cosignatures(text + word.line, lyon.public) == [word]
    assert note.opened(text + word.line, hub.public) == checkpoint
    data = base64.b64decode(word.line.split(" ")[2])
    assert (data[:4], int.from_bytes(data[4:12], "big")) == (lyon.public.id(b"\x04"), 1_700_000_000)
    body = f"cosignature/v1\ntime 1700000000\n{checkpoint}".encode()
    Ed25519PublicKey.from_public_bytes(lyon.public.raw).verify(data[12:], body)
    for line in ("", word.line * 2, word.line.replace("lyon", "bern"), word.line[:-9] + "\n"):
        with pytest.raises(Invalid, match="is no line of the witness"):
            note.cosignature(line, lyon.public)


# --- proofs


def test_every_entry_is_proven_by_the_key_alone(tmp_path):
    with written(tmp_path / "journal.db") as journal:
        key = journal.key
        for seq in range(1, 21):
            proof = proofs.prove(journal, seq)
            assert f'"run":"run-{seq - 1}"' in proof.entry
            assert proofs.check(proof, key).size == 20
        for seq in (0, 21):
            with pytest.raises(NotFound, match=f"has entries 1 to 20, and no {seq}"):
                proofs.prove(journal, seq)


def test_a_proof_of_anything_else_does_not_hold(tmp_path):
    with written(tmp_path / "journal.db") as journal:
        proof = proofs.prove(journal, 7)
        key = journal.key
    other = Key.new("hub")
    for change in (
        {"entry": proof.entry.replace("berlin", "zurich")},
        {"seq": 8},
        {"path": proof.path[:-1]},
        {"path": proof.path[::-1]},
        {"checkpoint": signed(other)[1]},
        {"key": str(other.public)},
        {"witnesses": (str(other.public),)},
        {"journal": "lyon"},
    ):
        with pytest.raises(Corrupt, match=r"^(proof|checkpoint): "):
            proofs.check(proof.model_copy(update=change))
    with pytest.raises(Corrupt, match="not by the one of that journal"):
        proofs.check(proof, other.public)
    assert proofs.check(proof, key) == proofs.check(proof)


def test_a_proof_is_under_what_was_cosigned_where_that_has_the_entry(tmp_path):
    lyon, bern = Key.new("lyon"), Key.new("bern")
    with written(tmp_path / "journal.db") as journal:
        for key in (lyon, bern):
            checkpoint, signature = journal.checkpoint()
            journal.keep(Witnessed(checkpoint, signature, note.cosigned(checkpoint, key, 1_700_000_000)))
        journal.append(Joined(run="later", site="berlin"), actor="hub")
        proof = proofs.prove(journal, 3)
        assert proofs.check(proof).size == 20
        assert proof.witnesses == (str(bern.public), str(lyon.public))
        later = proofs.prove(journal, 21)
        assert (proofs.check(later).size, later.witnesses) == (21, ())
