"""What a hub and a site do for each other's journals: show their own, remember the other's, and notice a roll-back.

What was seen lies in a small file for each party, a signed note that anybody can read. It is on disk before the other
is told, so that no crash lets a witness accept two histories.
"""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from atoll.durable import sync_folder
from atoll.errors import AtollError, Corrupt, Invalid, NotFound, Unavailable
from atoll.journal import Journal, note, proofs, tree
from atoll.journal.key import PublicKey
from atoll.journal.witness import Seen, judge
from atoll.runtime.disk import appearing
from atoll.runtime.reports import shortened
from atoll.spec.document import Name
from atoll.spec.record import Attest, Attested, Cosigned, Disputed

log = logging.getLogger(__name__)
EVERY = 30.0  # seconds between two looks at the other's journal


@dataclass(frozen=True, slots=True)
class Judged:
    """What to tell the other, and what to write down of its journal where it is not accepted."""

    answer: Attested | Cosigned | None = None
    dispute: Disputed | None = None


class Witness:
    """One party's part, with its own ``journal`` and what it saw in ``folder``. Any thread may call."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal
        self._turn = threading.Lock()

    def ask(self, party: Name) -> Attest | None:
        """Return the question for a party's journal; nothing where what was seen of it cannot be read."""
        try:
            with self._turn:
                seen = self._seen(party)
        except Unavailable as error:
            log.error("%s", error)
            return None
        return Attest(seen=seen.checkpoint.size if seen is not None else 0)

    def heard(self, party: Name, owner: Name, message: Attest | Attested | Cosigned) -> Judged:
        """Take what another party says. ``owner`` is what its journal calls it.

        What is no dispute, and goes wrong, is logged: it is tried again, and no run waits for it.
        """
        try:
            match message:
                case Attest():
                    return Judged(self._show(message))
                case Attested():
                    return self._judge(party, owner, message)
                case Cosigned():
                    self._take(party, owner, message)
        except AtollError as error:
            log.warning("witnessing with %s: %s", party, error)
        return Judged()

    def forget(self, party: Name) -> None:
        """Believe a party's next checkpoint whatever it says: a person looked into it, or its journal is a new one."""
        with self._turn:
            self.file(party).unlink(missing_ok=True)

    # --- the other's journal

    def _judge(self, party: Name, owner: Name, shown: Attested) -> Judged:
        """Accept what a party shows, or dispute it. An answer to a question before the last one is let go, and there is
        nothing to say of what was seen before."""
        with self._turn:
            seen = self._seen(party)
            if shown.seen != (seen.checkpoint.size if seen is not None else 0):
                return Judged()
            try:
                now = judge(seen, owner, shown)
            except Corrupt as error:
                told = Cosigned(size=shown.seen, key=str(self._journal.key), words=shortened(str(error)))
                before = seen.note if seen is not None else ""
                return Judged(told, Disputed(party=party, words=str(error), seen=before, shown=shown.checkpoint))
            if seen is not None and seen.checkpoint == now.checkpoint:
                return Judged()
            self._remember(party, now)
        word = note.cosigned(now.checkpoint, self._journal.signer, int(time.time()))
        return Judged(Cosigned(size=now.checkpoint.size, key=str(word.key), line=word.line))

    def file(self, party: Name) -> Path:
        """Return where a party's journal is remembered."""
        return self._folder / party

    def _seen(self, party: Name) -> Seen | None:
        path = self.file(party)
        try:
            return Seen.parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, Invalid, Corrupt) as error:
            raise Unavailable(f"{path}: what was seen of {party}'s journal cannot be read ({error}); mend it") from None

    def _remember(self, party: Name, seen: Seen) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with appearing(self.file(party), durable=True) as file:
                file.write(str(seen).encode())
            sync_folder(self._folder)
        except OSError as error:
            raise Unavailable(f"{self._folder}: cannot be written ({error.strerror}); free some space") from None

    # --- one's own journal

    def _show(self, asked: Attest) -> Attested | None:
        """Return the end of our journal; nothing as long as it has no entries."""
        try:
            checkpoint, path = proofs.grown(self._journal, asked.seen)
        except NotFound:
            return None
        return Attested(seen=asked.seen, key=str(self._journal.key), checkpoint=checkpoint, proof=path)

    def _take(self, party: Name, owner: Name, said: Cosigned) -> None:
        """Keep a witness's word on our journal. Raises `Invalid` for one that does not hold."""
        if said.words:
            log.error("%s does not accept this journal: %s", party, said.words)
            return
        key = PublicKey.read(said.key)
        if key.owner != owner or not said.size:
            raise Invalid(f"cosignature: {key.name} is not of {owner}; a witness speaks for itself only")
        root = tree.root(said.size, self._journal.stored)
        checkpoint = note.Checkpoint(self._journal.key.name, said.size, root)
        word = note.Witnessed(checkpoint, checkpoint.signed(self._journal.signer), note.cosignature(said.line, key))
        if not word.holds:
            raise Invalid(f"cosignature: {owner} signed another checkpoint of {said.size} entries than is here")
        self._journal.keep(word)
