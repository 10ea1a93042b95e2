"""Points at which a process can be told to end itself, so that a test can kill it at every one of them.

Nothing happens unless the environment variable ATOLL_FAULT is set when a process starts. Its value is one line,

    hub:journalled:run.merged:2

which reads: at the hub, the second time in this process's life that a merge is journalled, end by SIGKILL, right there.
One line is one death: what the process starts does not inherit it, and the first of those that it is for is given it.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NoReturn, TypeVar, get_args

from atoll.errors import Invalid
from atoll.spec.event import RunEvent

VARIABLE = "ATOLL_FAULT"
_EVENTS: tuple[str, ...] = tuple(kind.model_fields["kind"].default for kind in get_args(RunEvent))
_TENSORS, _STAGES = ("initialise", "train"), ("probe", "measure", "initialise", "train", "evaluate")

# party -> point -> what may be there. `tests/system/faults.py` has a line for each.
POINTS: dict[str, dict[str, tuple[str, ...]]] = {
    "hub": {
        "posted": _EVENTS,  # an event is about to be journalled
        "journalled": _EVENTS,  # and is not folded yet
        "performed": _EVENTS,  # and what it commands has been begun
        "giving": ("code", "weights"),  # a frame has left
        "receiving": _TENSORS,  # a frame has been written
        "spooled": _TENSORS,  # the update has its name, and is not journalled
        "merging": ("weights",),  # they are written, and the outer state is not
        "publishing": ("model",),  # its blob is stored, and it is not journalled
        "resuming": ("run",),  # its spool was looked through, and nothing is journalled
    },
    "site": {
        "assigned": _STAGES,  # an assignment was taken
        "fetched": ("train", "evaluate"),  # its weights are here
        "ordered": ("open", "probe", "initialise", "train", "evaluate"),  # every worker has the order
        "computed": _STAGES,  # the workers, or the agent, have answered
        "encoded": ("train",),  # and what goes out and what is fed back are written, without a mark
        "marked": ("train",),  # and not sent
        "sending": _TENSORS,  # a frame has been handed over
        "sent": _STAGES,  # the hub has it, and nothing here says so
        "settled": ("train",),  # what only earlier rounds needed is dropped
        "released": ("run",),  # the run is over, and its folder is still there
    },
    "worker": {
        "step": ("train",),  # taken, and not told
        "written": _TENSORS,  # what was computed, and no reply
    },
}
Item = TypeVar("Item")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Fault:
    line: str
    party: str
    place: tuple[str, str, str]  # party, point, what
    left: int  # times that it is reached until the end
    handed: bool = False


_turn = threading.Lock()
_fault: _Fault | None = None


def arm() -> None:
    """Take ATOLL_FAULT, where it is set, out of the environment. Raises `Invalid` for a line that names no point."""
    global _fault
    line = os.environ.pop(VARIABLE, None)
    if line is not None:
        _fault = _read(line)
        log.warning("%s=%s: a process of this party ends itself by SIGKILL at this point", VARIABLE, line)


def reached(party: str, point: str, what: str) -> None:
    """Tell that this point is reached, which ends the process where that was asked for."""
    fault = _fault
    if fault is not None and fault.place == (party, point, what):
        with _turn:
            fault.left -= 1
            if not fault.left:
                _end(fault)


def along(party: str, point: str, what: str, items: Iterable[Item]) -> Iterator[Item]:
    """Return the items, with the point reached behind each, once the next one is asked for. Costs nothing unarmed."""
    armed = _fault is not None and _fault.place == (party, point, what)
    return _each(party, point, what, items) if armed else iter(items)


def handed_on(*parties: str) -> dict[str, str]:
    """Return the environment for a process of these parties, or one that starts such: the line, the first time."""
    fault = _fault
    if fault is None or fault.party not in parties:
        return {}
    with _turn:
        handed, fault.handed = fault.handed, True
    return {} if handed else {VARIABLE: fault.line}


def _each(party: str, point: str, what: str, items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        yield item
        reached(party, point, what)


def _end(fault: _Fault) -> NoReturn:
    log.critical("%s=%s: reached", VARIABLE, fault.line)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


def _read(line: str) -> _Fault:
    party, point, what, count = (*line.split(":"), "", "", "", "")[:4]
    known = " ".join(f"{a}:{b}:{'|'.join(c)}" for a, points in POINTS.items() for b, c in points.items())
    if what not in POINTS.get(party, {}).get(point, ()) or not count.isdecimal() or not int(count):
        raise Invalid(f"{VARIABLE}: {line!r}: names no point; write PARTY:POINT:WHAT:TIME with one of: {known}")
    return _Fault(line, party, (party, point, what), int(count))
