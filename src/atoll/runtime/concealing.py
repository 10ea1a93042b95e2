"""A site's part in secure sums: its secrets of each, what it says to the others, and by which keys it knows them.

Whatever the others say comes through the hub, which might say it in their place. So each site signs with the key of its
journal, and keeps by name the keys that it has seen: the first one is believed, and another one refused.
"""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

from atoll.durable import sync_folder
from atoll.errors import AtollError, Corrupt, Denied, Invalid, LinkLost, Unavailable
from atoll.journal.key import Key, PublicKey
from atoll.outer.masks import Masks
from atoll.outer.secret import Party
from atoll.outer.wire import reach
from atoll.runtime.disk import appearing
from atoll.spec.document import Name
from atoll.spec.job import TrainJob
from atoll.spec.message import Assign, Message, SumSaid, SumTold
from atoll.spec.secret import Everyone, Inbox, Said, Signed, Terms, There
from atoll.spec.sync import Sync

_LOOK = 0.5  # seconds between two looks whether the sum is still wanted
log = logging.getLogger(__name__)


def weight_of(sync: Sync, examples: int) -> int:
    """Return what an update of so many examples weighs in a sum."""
    return 1 if sync.merge == "mean" else examples


def terms_of(run: str, position: int, attempt: int, sites: tuple[str, ...], sync: Sync, job: TrainJob) -> Terms:
    """Return the terms of a round's sum, as both sides make them of the plan and the job."""
    return Terms(
        run=run,
        position=position,
        attempt=attempt,
        sites=sites,
        bound=reach(sync.wire, sync.parts(len(sites))),
        heaviest=weight_of(sync, sync.stride * job.batch),
    )


def check_signed(site: str, signer: str, said: bytes, signature: bytes) -> None:
    """Raise `Denied` unless the public key is one of this site's name, and made the signature."""
    try:
        key = PublicKey.read(signer)
    except Invalid:
        key = None
    if key is None or key.owner != site or not key.signed(said, signature):
        raise Denied(f"secure sum: what is said to be of {site} is not signed by it; nothing was sent")


class Known:
    """The other sites' keys that were seen, in a file by name. Any thread may ask."""

    def __init__(self, path: Path) -> None:
        self._path, self._turn = path, threading.Lock()

    def verify(self, site: str, signer: str, said: bytes, signature: bytes) -> None:
        """Raise `Denied` unless a site's key is the one that was first seen of it, and made the signature."""
        check_signed(site, signer, said, signature)
        with self._turn:
            seen = self._seen()
            if site not in seen:
                self._write({**seen, site: signer})
            elif seen[site] != signer:
                raise Denied(
                    f"secure sum: {site} signs with another key than before; ask its owner why, and remove it from "
                    f"{self._path.name} to accept the new one"
                )

    def _seen(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise Corrupt(f"{self._path}: the other sites' keys cannot be read ({error}); mend it") from None
        if not isinstance(found, dict):  # to believe anybody then would be to forget all of them
            raise Corrupt(f"{self._path}: the other sites' keys are no table of names; mend it")
        return {str(name): str(key) for name, key in cast("dict[object, object]", found).items()}

    def _write(self, seen: dict[str, str]) -> None:
        try:
            with appearing(self._path, durable=True) as file:
                file.write(json.dumps(seen, indent=1, sort_keys=True).encode())
            sync_folder(self._path.parent)
        except OSError as error:
            raise Unavailable(f"{self._path}: cannot be written ({error.strerror}); free some space") from None


class _Sum:
    """One run's newest sum."""

    def __init__(self, terms: Terms, party: Party) -> None:
        self.terms, self.party = terms, party
        self.masks: Masks | None = None
        self.failed: AtollError | None = None
        self.there: tuple[str, ...] = ()  # whose updates are in it, as the hub says
        self.ready = threading.Event()


class Concealing:
    """All sums that a site takes part in, of each run the newest. The errands' threads and the agent's may call."""

    def __init__(self, site: Name, key: Key, known: Known, say: Callable[[Message], None]) -> None:
        self._site, self._key, self._known, self._say = site, key, known, say
        self._turn = threading.Lock()
        self._sums: dict[str, _Sum] = {}
        self._opened: dict[tuple[str, int], tuple[str, ...]] = {}  # run and stage -> whose sum this site helped to open

    def begin(self, a: Assign) -> Terms:
        """Tell the others this site's keys for a round's sum, also once more after a lost link.

        Raises `Denied` where the hub asks for a sum in which this site would not be hidden.
        """
        assert isinstance(a.job, TrainJob)
        if self._site not in a.together or len(set(a.together)) < max(3, len(a.together)):
            raise Denied(f"{self._site} refuses: wire: mask: among {len(a.together)} sites nothing is hidden; ask 3")
        terms = terms_of(a.run, a.position, a.epoch, a.together, a.sync, a.job)
        with self._turn:
            found = self._sums.get(a.run)
            if found is None or found.terms != terms:
                party = Party(terms, self._site, str(self._key.public), self._key.sign, self._known.verify)
                found = self._sums[a.run] = _Sum(terms, party)
        self._tell(terms, found.party.keys())
        return terms

    def masks(self, terms: Terms, wanted: Callable[[], bool]) -> tuple[Masks, str]:
        """Return the masks of this site's update, once all keys and shares are here, and a word that names them.

        Raises what a step of the sum did, and `LinkLost` once it is not ``wanted`` any more.
        """
        with self._turn:
            found = self._sums.get(terms.run)
        while found is not None and found.terms == terms and wanted():
            if found.ready.wait(_LOOK):
                if found.masks is not None:
                    return found.masks, found.party.keys().masking
                assert found.failed is not None
                raise found.failed
        raise LinkLost(f"secure sum of run {terms.run}: it is not asked for any more")

    def heard(self, message: SumTold) -> None:
        """Take a step of a sum. What goes wrong is told to the errand that waits for its masks; later the others go on
        without this site."""
        with self._turn:
            found = self._sums.get(message.run)
            if found is None or (found.terms.position, found.terms.attempt) != (message.position, message.attempt):
                log.info("run %s: a word of a secure sum that this site is not in", message.run)
                return
            try:
                answer = self._step(found, message)
            except (Corrupt, Denied, Unavailable) as error:
                log.warning("run %s: %s", message.run, error)
                found.failed = Denied(f"{self._site} refuses: {error}") if isinstance(error, Denied) else error
                found.ready.set()
                return
        if answer is not None:
            self._tell(found.terms, answer)

    def _step(self, found: _Sum, message: SumTold) -> Said | None:
        match message.told:
            case Everyone(keys=keys):
                return found.party.deal(keys)
            case Inbox(sealed=sealed):
                found.masks = found.party.mask(sealed)
                found.ready.set()
                return None
            case There(sites=sites):
                found.there = tuple(sorted(sites))
                before = self._opened.get((found.terms.run, found.terms.position), found.there)
                if before != found.there:  # what two sums of the same updates differ in is somebody's own
                    raise Denied("secure sum: another sum of these updates was opened; submit the job again")
                return found.party.agree(sites)
            case Signed(agreed=agreed):
                unsealed = found.party.unseal(agreed)
                self._opened[found.terms.run, found.terms.position] = found.there
                return unsealed

    def _tell(self, terms: Terms, said: Said) -> None:
        self._say(SumSaid(run=terms.run, position=terms.position, attempt=terms.attempt, said=said))

    def drop(self, run: str) -> None:
        """Forget a run's secrets."""
        with self._turn:
            self._sums.pop(run, None)
            self._opened = {key: sites for key, sites in self._opened.items() if key[0] != run}
