"""A site's part in secure sums: its secrets of each, what it says to the others, and which sums it has opened.

Secrets are in memory alone, and of one vector: where another is to be masked, the site begins anew with others. What it
has opened outlives it, for of the same updates it opens no other sum.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from atoll.durable import sync_folder
from atoll.errors import AtollError, Corrupt, Denied, LinkLost, Unavailable
from atoll.journal.key import Key
from atoll.outer.masks import Masks
from atoll.outer.secret import Party
from atoll.outer.wire import reach
from atoll.runtime.disk import appearing
from atoll.runtime.peers import Peers, check_signed
from atoll.spec.document import Name
from atoll.spec.job import TrainJob
from atoll.spec.message import Assign, Message, SumSaid, SumTold
from atoll.spec.secret import Everyone, Inbox, Said, Signed, Terms, There
from atoll.spec.sync import Sync

_LOOK = 0.5  # seconds between two looks whether the sum is still wanted
_SITES: TypeAdapter[tuple[Name, ...]] = TypeAdapter(tuple[Name, ...])
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
        least=sync.parts(len(sites)),
        heaviest=weight_of(sync, sync.stride * job.batch),
    )


class Opened:
    """Whose sums this site helped to open, by run and stage: in the run's folder, as long as the updates are there."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def sites(self, terms: Terms) -> tuple[str, ...]:
        """Return of whose updates the stage's sum was that was opened; () where none was. Raises `Corrupt`."""
        path = self._path(terms)
        try:
            return _SITES.validate_json(path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValueError):
            raise Corrupt(f"{path}: cannot be read, and so no other sum is begun; submit the job again") from None

    def keep(self, terms: Terms, sites: tuple[str, ...]) -> None:
        """Write it down. Once it returns, it outlives a loss of power. Raises `Unavailable`."""
        path = self._path(terms)
        try:
            with appearing(path, durable=True) as file:
                file.write(_SITES.dump_json(sites))
            sync_folder(path.parent)
        except OSError as error:
            raise Unavailable(f"{path}: cannot be written ({error.strerror}); free some space") from None

    def _path(self, terms: Terms) -> Path:
        return self._runs / terms.run / f"opened-{terms.position}.json"


class _Sum:
    """One run's newest sum."""

    def __init__(self, terms: Terms, party: Party) -> None:
        self.terms, self.party = terms, party
        self.update: str | None = None  # the digest of what its masks are for
        self.masks: Masks | None = None
        self.failed: AtollError | None = None
        self.there: tuple[str, ...] = ()  # whose updates are in it, as this site signed
        self.ready = threading.Event()


class Concealing:
    """All sums that a site takes part in, of each run the newest. The errands' threads and the agent's may call."""

    def __init__(self, site: Name, key: Key, peers: Peers, runs: Path, say: Callable[[Message], None]) -> None:
        """``runs`` is the folder of the runs' folders."""
        self._site, self._key, self._peers, self._say = site, key, peers, say
        self._turn = threading.Lock()
        self._sums: dict[str, _Sum] = {}
        self._opened = Opened(runs)

    def begin(self, a: Assign) -> Terms:
        """Tell the others this site's keys for a round's sum, also once more after a lost link.

        Raises `Denied` where the hub asks for a sum in which this site would not be hidden, or no sum has its noise.
        """
        assert isinstance(a.job, TrainJob)
        if self._site not in a.together or len(set(a.together)) < max(3, len(a.together)):
            raise Denied(f"{self._site} refuses: wire: mask: among {len(a.together)} sites nothing is hidden; ask 3")
        terms = terms_of(a.run, a.position, a.epoch, a.together, a.sync, a.job)
        if terms.least > len(a.together):
            raise Denied(
                f"{self._site} refuses: wait.count: {terms.least}: each adds its part of the noise, and "
                f"{len(a.together)} sites are asked; lower it"
            )
        with self._turn:
            found = self._sums.get(a.run)
            if found is None or found.terms != terms:
                found = self._begun(terms)
            elif found.failed is not None and found.masks is None:  # it may have been the disk
                found.failed = None
                found.ready.clear()
        self._tell(terms, found.party.keys())
        return terms

    def _begun(self, terms: Terms) -> _Sum:
        """Begin a sum with new secrets; who gave keys for it before is told so by the hub, which begins it anew."""
        before = self._opened.sites(terms)
        party = Party(terms, self._site, str(self._key.public), self._key.sign, check_signed, before)
        self._sums[terms.run] = made = _Sum(terms, party)
        return made

    def masks(self, terms: Terms, update: str, wanted: Callable[[], bool]) -> tuple[Masks, str]:
        """Return the masks of this site's update, once all keys and shares are here, and a word that names them.

        ``update`` is the digest of all that the masked vector follows from: under the masks of one vector no other one
        ever leaves, for what two differ in would be plain. Raises what a step of the sum did, and `LinkLost` once it is
        not ``wanted`` any more.
        """
        keys = None
        with self._turn:
            found = self._sums.get(terms.run)
            if found is not None and found.terms == terms:
                if found.update not in (None, update):
                    found = self._begun(terms)
                    keys = found.party.keys()
                found.update = update
        if keys is not None:
            self._tell(terms, keys)
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
            if found.failed is not None and found.masks is None:
                log.info("run %s: a word of a secure sum that failed here", message.run)
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
                others = {one.site: one.signer for one in keys if one.site != self._site}
                self._peers.meet([site for site in found.terms.sites if site != self._site], others)
                return found.party.deal(keys)
            case Inbox(sealed=sealed):
                found.masks = found.party.mask(sealed)
                found.ready.set()
                return None
            case There(sites=sites):
                agreed = found.party.agree(sites)
                found.there = tuple(sorted(sites))
                return agreed
            case Signed(agreed=signed):
                unsealed = found.party.unseal(signed)
                self._opened.keep(found.terms, found.there)  # before anybody can open it
                return unsealed

    def _tell(self, terms: Terms, said: Said) -> None:
        self._say(SumSaid(run=terms.run, position=terms.position, attempt=terms.attempt, said=said))

    def drop(self, run: str) -> None:
        """Forget a run's secrets."""
        with self._turn:
            self._sums.pop(run, None)
