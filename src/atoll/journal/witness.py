"""What a witness does: it remembers the last checkpoint of another's journal, and accepts only one that extends it.

A journal that was rolled back, and one that is shown to different parties with different ends, need the witness to
forget, or two witnesses that never speak of each other. https://c2sp.org/tlog-witness says the same for public logs.
"""

from dataclasses import dataclass

from atoll.errors import Corrupt, Invalid
from atoll.journal.key import PublicKey
from atoll.journal.note import Checkpoint, opened
from atoll.journal.proofs import read
from atoll.journal.tree import extends
from atoll.spec.record import Attested


@dataclass(frozen=True, slots=True)
class Seen:
    """The last checkpoint of a journal that was accepted, by the one key that may sign it, and its note."""

    key: PublicKey
    checkpoint: Checkpoint
    note: str

    def __str__(self) -> str:
        return f"{self.key}\n{self.note}"

    @staticmethod
    def parse(text: str) -> "Seen":
        """Read what `str` spells. Raises `Invalid` or `Corrupt` for anything else."""
        first, _, note = text.partition("\n")
        key = PublicKey.read(first)
        return Seen(key, opened(note, key), note)


def judge(seen: Seen | None, owner: str, shown: Attested) -> Seen:
    """Return what is seen from now on of ``owner``'s journal. The first checkpoint is believed, whatever it says.

    Raises `Corrupt`, in words for people, when the journal was rolled back, is another one than it was or has another
    key, and `Invalid` for what is no checkpoint or no proof at all.
    """
    key = PublicKey.read(shown.key)
    if key.owner != owner:
        raise Invalid(f"key: {key.name} is not of {owner}; a journal is shown by its owner only")
    if seen is not None and key != seen.key:
        raise Corrupt(f"the journal of {owner} is signed by {key.name}, and was signed by {seen.key.name}")
    now = opened(shown.checkpoint, key)
    if seen is None:
        return Seen(key, now, shown.checkpoint)
    before, had = seen.checkpoint, f"{seen.checkpoint.size} entries were seen"
    if now.size < before.size:
        raise Corrupt(f"the journal of {owner} was rolled back: {had} of it, and it has {now.size}")
    if not extends(before.size, before.root, now.size, now.root, read(shown.proof)):
        raise Corrupt(f"the journal of {owner} was changed: {had} of it, and its {now.size} do not begin with these")
    return Seen(key, now, shown.checkpoint)
