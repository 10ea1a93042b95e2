"""What journals tell: whether they are whole, what crossed each border, and what happened to a run."""

from collections.abc import Callable
from pathlib import Path

from atoll.errors import Corrupt, Invalid
from atoll.journal import Journal
from atoll.runtime.view import Borders, JournalLine, line, traffic
from atoll.spec.run import Traffic, Verdict


class Record:
    """The hub's journal, and those of the sites that live in its home. ``known`` raises `NotFound` for no run."""

    def __init__(self, journal: Journal, sites: Path, borders: Borders, known: Callable[[str], object]) -> None:
        self._journal, self._sites, self._borders, self._known = journal, sites, borders, known

    def verify(self) -> list[Verdict]:
        """Verify the hub's journal and those of the sites that live in this home."""
        verdicts = [self._journal.verify()]
        for path in self._site_journals():
            try:
                with Journal(path, path.parent.name, read_only=True) as journal:
                    verdicts.append(journal.verify())
            except (Corrupt, Invalid) as error:  # no journal any more: the others are verified all the same
                verdicts.append(Verdict(journal=str(path), entries=0, intact=False, words=str(error)))
        return verdicts

    def traffic(self, run: str | None = None) -> list[Traffic]:
        """Sum what crossed each border, as the hub recorded it; a site's refusals are in that site's journal."""
        if run is not None:
            self._known(run)
        sums = self._borders.of(self._journal, run)
        for path in self._site_journals():
            with Journal(path, path.parent.name, read_only=True) as journal:
                own = self._borders.of(journal, run)
            # An owner's own record of its border is the better one.
            sums = {border: sum_ for border, sum_ in sums.items() if border[0] != path.parent.name} | own
        return traffic(sums)

    def explain(self, run: str) -> list[JournalLine]:
        """Tell everything the hub's journal has of a run, in words."""
        self._known(run)
        return [line(entry) for entry in self._journal.entries(run=run)]

    def _site_journals(self) -> list[Path]:
        return sorted(self._sites.glob("*/journal.db"))
