"""A catalogue for a process that must go on: a mistake in the file leaves the last good list in force."""

import logging
import threading
from pathlib import Path

from atoll.data.catalogue import Catalogue, Listing
from atoll.errors import Invalid

log = logging.getLogger(__name__)


class LiveCatalogue(Catalogue):
    """Reads as `Catalogue` does while the file is right, and never raises because it is wrong. Threads may share it.

    A file that is wrong from the start is an empty list: what nobody could read is offered to nobody. One that is
    taken away is an empty list too, for its owner may mean just that. What changes the list (`add`, `remove`) still
    raises, so that a file with a mistake is not overwritten. `problem` says what is wrong now.
    """

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.problem: str | None = None
        self._looking = threading.Lock()
        self._good = Listing()
        self._listing()  # so that a start with a mistake says so at once

    def _listing(self) -> Listing:
        with self._looking:
            try:
                self._good = self._listed()
                self.problem = None
            except (Invalid, OSError) as error:
                self._note(f"{error}; the list before it stays in force ({len(self._good.entries)} datasets)")
            return self._good

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.error("%s", problem)
        self.problem = problem
