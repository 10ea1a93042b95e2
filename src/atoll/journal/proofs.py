"""That an entry is in a journal, told so that it can be checked with the journal's public key alone."""

import base64

from atoll.errors import Corrupt, Invalid, NotFound
from atoll.journal import note
from atoll.journal.key import PublicKey, decoded
from atoll.journal.sqlite import Journal
from atoll.journal.tree import consistency, includes, inclusion, leaf
from atoll.spec.record import Proof


def prove(journal: Journal, seq: int) -> Proof:
    """Return the proof that entry ``seq`` is in the journal: under the newest checkpoint with it that others cosigned,
    else under the newest of all. Raises `NotFound` for an entry that is not there."""
    newest, signature = journal.checkpoint()
    if not 1 <= seq <= newest.size:
        raise NotFound(f"seq: the journal of {journal.owner} has entries 1 to {newest.size}, and no {seq}")
    words = [word for word in journal.cosignatures() if word.checkpoint.size >= seq]
    size = max((word.checkpoint.size for word in words), default=0)
    words = [word for word in words if word.checkpoint.size == size]
    text = words[0].checkpoint.note(journal.key, words[0].signature) if words else newest.note(journal.key, signature)
    (row,) = journal.rows(seq - 1, seq)
    return Proof(
        journal=journal.owner,
        key=str(journal.key),
        seq=seq,
        entry=row.body.decode(errors="replace"),
        path=tuple(spelled(step) for step in inclusion(seq - 1, size or newest.size, journal.stored)),
        checkpoint=text + "".join(word.cosignature.line for word in words),
        witnesses=tuple(str(word.cosignature.key) for word in words),
    )


def check(proof: Proof, key: PublicKey | None = None) -> note.Checkpoint:
    """Return the checkpoint under which a proof holds. ``key`` is the journal's, known from elsewhere.

    Raises `Corrupt` for a proof that does not hold, or not by this key, `Invalid` for one that is none.
    """
    named = PublicKey.read(proof.key)
    if named.owner != proof.journal or (key is not None and named != key):
        raise Corrupt(f"proof: it is by the key {named.name}, and not by the one of that journal; ask its owner for it")
    checkpoint = note.opened(proof.checkpoint, named)
    if not includes(proof.seq - 1, checkpoint.size, leaf(proof.entry.encode()), read(proof.path), checkpoint.root):
        raise Corrupt(f"proof: this text is not entry {proof.seq} of the {checkpoint.size} under the checkpoint")
    for witness in proof.witnesses:
        by = PublicKey.read(witness)
        if not any(word.holds(checkpoint) for word in note.cosignatures(proof.checkpoint, by)):
            raise Corrupt(f"proof: {by.owner} is named as a witness, and its key did not cosign the checkpoint")
    return checkpoint


def grown(journal: Journal, old: int) -> tuple[str, tuple[str, ...]]:
    """Return the newest checkpoint's note, and the proof that it extends that of ``old`` entries: none where there are
    fewer by now, which whoever asks will notice. Raises `NotFound` for a journal without entries."""
    checkpoint, signature = journal.checkpoint()
    path = consistency(old, checkpoint.size, journal.stored) if old <= checkpoint.size else []
    return checkpoint.note(journal.key, signature), tuple(spelled(step) for step in path)


def spelled(step: bytes) -> str:
    return base64.b64encode(step).decode()


def read(path: tuple[str, ...]) -> list[bytes]:
    """Return the hashes of a proof. Raises `Invalid` for text that spells none."""
    steps = [step for step in map(decoded, path) if step is not None]
    if len(steps) != len(path):
        raise Invalid("path: holds something else than hashes in base64; give the proof as it was printed")
    return steps
