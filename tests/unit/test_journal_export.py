"""A journal as a file: verified by itself, and the first bad entry is named whatever was done to it."""

import json

import pytest

from atoll.errors import Invalid, NotFound
from atoll.journal import Journal, export, note, proofs
from atoll.journal.key import Key
from atoll.journal.note import Witnessed
from atoll.journal.tree import Frontier, leaf
from atoll.spec.event import Joined


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The lines of a journal of 1,100 entries that lyon cosigned at 1,050, and the journal's key."""
    path = tmp_path_factory.mktemp("export") / "journal.db"
    with Journal(path, "hub") as journal:
        journal.append(*(joined(number) for number in range(1000)), actor="hub")
        journal.append(*(joined(number) for number in range(1000, 1050)), actor="hub")
        checkpoint, signature = journal.checkpoint()
        journal.keep(Witnessed(checkpoint, signature, note.cosigned(checkpoint, Key.new("lyon"), 1_700_000_000)))
        journal.append(*(joined(number) for number in range(1050, 1100)), actor="hub")
        return list(export.lines(journal)), journal.key


def joined(number):
    return Joined(run=f"run-{number}", site="berlin")


def at(lines, seq):
    """Return where an entry's line is."""
    return next(number for number, line in enumerate(lines) if b'"seq":%d,' % seq in line)


def verdict(tmp_path, lines, key=None):
    path = tmp_path / "hub.jsonl"
    path.write_bytes(b"".join(lines))
    return export.verify(path, key)


def test_an_export_is_json_lines_and_is_verified_alone(tmp_path, exported):
    lines, key = exported
    found = verdict(tmp_path, lines, key)
    assert (found.intact, found.entries, found.words) == (True, 1100, "")
    assert (found.key, found.witnesses) == (str(key), {"lyon": 1050})
    told = [json.loads(line) for line in lines]
    assert [one["entry"]["seq"] for one in told if "entry" in one] == list(range(1, 1101))
    assert [number for number, one in enumerate(told) if "checkpoint" in one] == [0, 1001, 1052, 1103]


def test_a_key_from_elsewhere_decides_whose_it_is(tmp_path, exported):
    found = verdict(tmp_path, exported[0], Key.new("hub").public)
    assert (found.intact, found.entries) == (False, 0)
    assert "not by the key of that journal" in found.words


def test_an_edited_line_is_named(tmp_path, exported):
    lines = list(exported[0])
    place = at(lines, 77)
    lines[place] = lines[place].replace(b"berlin", b"zurich")
    found = verdict(tmp_path, lines)
    assert (found.intact, found.bad, found.entries) == (False, 77, 76)
    assert "entry 77 is edited" in found.words


def rehashed(lines, old, new):
    """Edit lines, and make all hashes anew."""
    frontier, made = Frontier(), []
    for line in lines:
        if line.startswith(b'{"entry":'):
            body = line[9:].rpartition(b',"hashes"')[0].replace(old, new)
            hashes = b"".join(frontier.append(leaf(body))).hex().encode()
            line = b'{"entry":' + body + b',"hashes":"' + hashes + b'"}\n'
        made.append(line)
    return made


def test_an_edit_with_all_hashes_made_anew_lies_between_two_checkpoints(tmp_path, exported):
    found = verdict(tmp_path, rehashed(exported[0], b'"run-1020"', b'"run-9999"'))
    assert (found.intact, found.bad, found.entries) == (False, 1001, 1000)
    assert "one of entries 1001 to 1050 is not what it was, for what its owner's signature says" in found.words


@pytest.mark.parametrize(
    ("change", "bad"),
    [
        (lambda lines: lines[:500], 500),
        (lambda lines: lines[:-51], 1051),
        (lambda lines: lines[:30] + lines[31:], 30),
        (lambda lines: [*lines[:30], lines[31], lines[30], *lines[32:]], 30),
        (lambda lines: [*lines[:30], lines[29], *lines[30:]], 30),
        (lambda lines: [*lines[:30], b"nonsense\n", *lines[31:]], 30),
        (lambda lines: [*lines[:30], b'{"entry":nonsense,"hashes":"00"}\n', *lines[31:]], 30),
        (lambda lines: [*lines[:30], b'{"entry":{},"hashes":"zz"}\n', *lines[31:]], 30),
        (lambda lines: [*lines[:30], b'{"entry":' + b"[" * 100_000 + b',"hashes":"00"}\n', *lines[31:]], 30),
    ],
)
def test_lines_that_are_missing_moved_or_none_are_named(tmp_path, exported, change, bad):
    found = verdict(tmp_path, change(list(exported[0])))
    assert (found.intact, found.bad, found.entries) == (False, bad, bad - 1)


@pytest.mark.parametrize(
    ("line", "old", "new", "words"),
    [
        (0, b'"entries":1100', b'"entries":1099', "its first line says 1099 entries"),
        (0, b"\\n1100\\n", b"\\n1200\\n", "is not signed by"),
        (1052, b"\\n1050\\n", b"\\n1051\\n", "is not signed by"),
        (0, b'"journal":"hub"', b'"journal":"lyon"', "not by the key of that journal"),
        (1052, b'{"checkpoint"', b'{"other":1,"checkpoint"', "unreadable"),
    ],
)
def test_a_checkpoint_that_was_changed_vouches_for_nothing(tmp_path, exported, line, old, new, words):
    lines = list(exported[0])
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new)
    found = verdict(tmp_path, lines)
    assert not found.intact
    assert words in found.words


def test_a_witness_that_did_not_sign_is_found(tmp_path, exported):
    lines = list(exported[0])
    mark = json.loads(lines[1052])
    text, _, word = mark["checkpoint"].rstrip("\n").rpartition(" ")
    spoilt = f"{text} {word[:40]}{'A' if word[40] != 'A' else 'B'}{word[41:]}\n"
    lines[1052] = json.dumps({"checkpoint": spoilt}).replace("{", "{", 1).replace(": ", ":", 1).encode() + b"\n"
    assert "a word of lyon up to entry 1050 is not by its key" in verdict(tmp_path, lines).words


def test_a_file_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        export.verify(tmp_path / "nothing")
    for text in ("", "nonsense", '{"checkpoint":1}', "{}"):
        (tmp_path / "file").write_text(text)
        with pytest.raises(Invalid):
            export.verify(tmp_path / "file")


def test_a_proof_in_a_file_is_told_from_an_export_and_checked(tmp_path, exported):
    with Journal(tmp_path / "journal.db", "hub") as journal:
        journal.append(*(joined(number) for number in range(9)), actor="hub")
        proof = proofs.prove(journal, 4)
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(proof.model_dump(mode="json"), indent=2))
    assert export.is_proof(path)
    assert export.verify_proof(path).intact
    path.write_text(path.read_text().replace("run-3", "run-4"))
    found = export.verify_proof(path)
    assert (found.intact, found.bad) == (False, 4)
    (tmp_path / "hub.jsonl").write_bytes(b"".join(exported[0]))
    assert not export.is_proof(tmp_path / "hub.jsonl")
    with pytest.raises(NotFound):
        export.is_proof(tmp_path / "nothing")
