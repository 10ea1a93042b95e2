"""How a run's batches are cut among a site's ranks, kept in the run's folder: a round done again takes the same shares.

What was measured is never measured the same again, so this is written down, and outlives a loss of power.
"""

import logging
from pathlib import Path

from atoll.durable import sync_folder
from atoll.errors import Invalid
from atoll.runtime.disk import appearing
from atoll.runtime.pacing import Balance
from atoll.spec.document import parse_json

_KEPT = 2  # the newest, and the one that the round before it took
log = logging.getLogger(__name__)


class Balances:
    """A file for each change, named by the first stage that it is for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, position: int) -> Balance:
        """Return the newest balance that is for this stage; an even one where there is none."""
        found = max((number for number in self._numbers() if number <= position), default=None)
        if found is None:
            return Balance()
        try:
            return parse_json(Balance, self._path(found).read_bytes(), "balance")
        except (Invalid, OSError) as error:  # of a disk that lost it; shares change speed and rounding alone
            log.warning("run %s: shares are even again: %s", self._folder.name, error)
            return Balance()

    def keep(self, position: int, balance: Balance) -> None:
        """Write down what holds from this stage on, if that is anything new. A stage may be done again."""
        if balance == self.of(position):
            return
        with appearing(self._path(position), durable=True) as file:
            file.write(balance.model_dump_json().encode())
        sync_folder(self._folder)
        for old in sorted(self._numbers())[:-_KEPT]:
            self._path(old).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        found = (path.stem.partition("-")[2] for path in self._folder.glob("balance-*.json"))
        return [int(number) for number in found if number.isdecimal()]

    def _path(self, position: int) -> Path:
        return self._folder / f"balance-{position}.json"
