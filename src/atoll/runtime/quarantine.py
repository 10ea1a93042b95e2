"""Sites that bring nothing which can be taken: counted over the journal, in quarantine after three answers in a row."""

from atoll.journal import Entry
from atoll.spec.event import Answered, Quarantined, Rejected, SiteReleased

IN_A_ROW = 3


class Quarantine:
    """Fed every journal entry in order; may be asked from any thread.

    An answer that is taken, in whichever run, begins its site's count anew. One that only came late does not count.
    A site is in quarantine from the very entry that is one too many, so that no other answer of it is looked at.
    """

    def __init__(self) -> None:
        self._rejected: dict[str, int] = {}
        self._words: dict[str, str] = {}

    def seen(self, entry: Entry) -> Quarantined | None:
        """Return what is to be journalled where this entry puts a site in quarantine."""
        match entry.event:
            case Rejected() as event if not event.late:
                return self._count(event)
            case Answered() as event:
                for answer in event.answers:
                    for name in (answer.site, *answer.via):
                        self._rejected.pop(name, None)
            case Quarantined() as event:
                self._words[event.site] = event.words
            case SiteReleased() as event:
                self._rejected.pop(event.site, None)
                self._words.pop(event.site, None)
            case _:
                pass
        return None

    def words(self, site: str) -> str:
        """Return why a site is in quarantine and how it leaves; "" for one that is not."""
        return self._words.get(site, "")

    def _count(self, event: Rejected) -> Quarantined | None:
        site = event.site
        self._rejected[site] = self._rejected.get(site, 0) + 1
        if self._rejected[site] < IN_A_ROW or site in self._words:
            return None
        words = f"{event.words}; {IN_A_ROW} in a row: in quarantine until `atoll site release {site}`"
        self._words[site] = words
        return Quarantined(site=site, words=words)
