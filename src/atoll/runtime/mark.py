"""The mark of an update that a site keeps: what its answer says, what lies beside it, and of what it was made.

An update is sent again as it is only for the very assignment that it was made for: clip and noise are on it already,
of another wire they are not, and who is charged for it is the dataset that it was made from.
"""

import secrets
from dataclasses import dataclass, field
from typing import Any

from atoll.runtime.disk import BOOT
from atoll.spec.document import canonical, sha256
from atoll.spec.fleet import Dataset
from atoll.spec.message import Assign
from atoll.spec.wire import noised

# What of an assignment an update does not follow from: who asks and when, how many ranks share its batches, who else
# takes part, what the hub says of the site's own data. Whatever is not named here it does follow from.
_ELSEWHERE = {"epoch", "user", "roles", "layout", "code_bytes", "together", "branches", "fingerprint", "counted"}
_OF_ROUND = {"work", "position", "version", "steps", "done", "weights", "signature"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Of what a round's update is made, by what the site itself knows of its data."""

    run: str  # digest of what all rounds of one run here have in common
    made: str  # digest of that and of all that this round's update follows from
    base: int | None  # the stage whose residual or control variates go into it
    ledger: str  # the dataset that is charged for it,
    unit: str  # in this unit; "": what is promised is nothing


@dataclass(frozen=True, slots=True)
class Kept:
    """What goes with a computed update: the weights it started from, and what the answer says of it."""

    weights: str
    examples: int
    loss: float
    seconds: float
    state_crc: int | None = None  # of the inner optimiser's state after it, where that is kept
    base: int | None = None  # the stage whose residual was added to it; None: there was none yet
    residual_crc: int | None = None  # of what it lost on the wire itself, where that is fed back
    control_crc: int | None = None  # of the site's control variates after it
    local_crc: int | None = None  # of its personal tensors after it
    steps: int = 0  # that it took
    pace: dict[str, Any] | None = None  # of its newest steps, as it is told
    token: str = field(default_factory=lambda: secrets.token_hex(16))  # names the file that is sent, and no other
    boot: str = BOOT  # the start of the machine that it was written in
    private: int = 0  # steps of the run's private mechanism so far, of all that it can rest on; 0: it promises nothing
    run: str = ""  # as in `Origin`; "" of a relay's sum, and of an Atoll that wrote none, whose updates are made anew
    made: str = ""
    ledger: str = ""
    unit: str = ""

    @property
    def lasts(self) -> bool:
        """Tell whether later rounds may go on from something that it left."""
        return any(crc is not None for crc in (self.state_crc, self.residual_crc, self.control_crc, self.local_crc))


def origin_of(a: Assign, base: int | None, dataset: Dataset, ledger: str, unit: str) -> Origin:
    """Return of what the update of an assignment is made from a dataset, which the site's ledger has by that name."""
    said = a.model_dump(mode="json", exclude=_ELSEWHERE)
    said["sync"].pop("wait")  # but for the parts of noise, which follow
    own = [dataset.name, dataset.fingerprint, ledger, unit]
    run = sha256(canonical([{name: said[name] for name in said.keys() - _OF_ROUND}, own]))
    parts = a.sync.parts(len(a.together)) if noised(a.sync.wire) else None
    goes_on = a.counted if a.sync.streaming else None
    made = sha256(canonical([run, {name: said[name] for name in _OF_ROUND}, base, goes_on, parts]))
    return Origin(run, made, base, ledger, unit)
