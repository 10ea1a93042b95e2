"""What a site may bring, by the hub's own state of the run and never by what the site says of it."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from atoll.boundary.channel import FrameLike, Wanted
from atoll.errors import Invalid
from atoll.runtime.state import State
from atoll.spec.event import Answer
from atoll.spec.fleet import Dataset, Site
from atoll.spec.job import QueryJob, TrainJob
from atoll.spec.message import Parcel
from atoll.spec.model import Signature, elements, fits
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform

_MODEL_LIMIT = 1 << 33  # elements of a model: 32 GiB in float32
_CUT = 1 << 20  # examples that a task may cut one row into: a text becomes many windows
_LOSS_LIMIT = 3.4e38  # of float32


def expected(state: State, answer: Answer, parcel: Parcel) -> tuple[tuple[Transform, ...], int]:
    """Return the wire and the size that an update must have, by the hub's own state and not by what it says."""
    if state.work == "initialise":
        size = elements(answer.signature)
        if not 0 < size <= _MODEL_LIMIT or size != parcel.size:
            raise Invalid(f"{answer.site}: first weights of {parcel.size} elements where the signature has {size}")
        patterns = state.plan.sync.keep_local if state.plan is not None else ()
        if staying := [spec.name for spec in answer.signature if fits(spec.name, patterns)]:
            raise Invalid(f"{answer.site}: tensor {staying[0]} stays at its site (sync.keep_local); leave it there")
        return (), size
    if state.work != "train" or state.plan is None:
        raise Invalid(f"{answer.site}: stage '{state.work}' takes no update")
    wire = state.plan.sync.wire
    first, last = span(state, answer)
    size = last - first
    if (parcel.wire, parcel.size) != (kinds(wire), size):
        raise Invalid(
            f"{answer.site}: an update of {parcel.size} elements as {list(parcel.wire)} "
            f"where the plan has {size} as {list(kinds(wire))}"
        )
    return wire, size


def span(state: State, answer: Answer) -> tuple[int, int]:
    """Return which elements of the model an answer is about, from and up to: a fragment in a train stage, else all."""
    if state.work == "initialise":
        return 0, elements(answer.signature)
    size = elements(state.signature)
    return (0, size) if state.plan is None else state.plan.sync.span(size, answer.version)


def kinds(wire: tuple[Transform, ...]) -> tuple[str, ...]:
    """Return a wire as parcels and crossings name it."""
    return tuple(transform.kind for transform in wire)


def checked(state: State, answer: Answer, known: Site | None) -> None:
    """Raise `Invalid` for numbers that this stage cannot have given: they weigh an answer against the other sites'.

    A train round takes `steps` times `batch` examples at most. The others have the rows that the plan was told of
    (``known`` is the site as it is now, for a plan that was not told), of which a task may make several examples each.
    """
    job, rows = state.job, _rows(state, answer.site, known)
    if state.work == "train" and isinstance(job, TrainJob) and state.plan is not None:
        stride = state.plan.sync.stride
        steps = max(1, min(stride, job.steps - answer.version * stride))
        check_trained(answer, job.batch, steps, state.plan.sync)
    else:
        _check_numbers(answer, str(state.work), 0, rows * _CUT)
    counted = max((sums.count for sums in answer.sums.values()), default=0)
    counted = max(counted, sum(group.rows for group in answer.groups))
    if counted > rows:
        raise Invalid(f"{answer.site}: rows: {counted}: its dataset has {rows}; look at what answers for that site")
    columns = job.data.statistics if isinstance(job, TrainJob) else ()
    for name in answer.sums:
        if name not in columns:
            raise Invalid(f"{answer.site}: sums of {name!r}, which the job's data.statistics do not name")


def check_trained(answer: Answer, batch: int, steps: int, sync: Sync) -> None:
    """Raise `Invalid` for numbers that a train round of ``steps`` steps cannot have given, wherever it is taken: what a
    relay lets pass the hub must not find wrong, or the relay would be at fault."""
    if sync.seconds is not None:  # as many steps as it tells of, and no more examples than those have
        if not 1 <= answer.steps <= steps:
            raise Invalid(
                f"{answer.site}: steps: {answer.steps}: a round has 1 to {steps}; look at what answers for that site"
            )
        steps = answer.steps
    _check_numbers(answer, "train", 1, batch * steps)


def _check_numbers(answer: Answer, work: str, least: int, most: int) -> None:
    if not least <= answer.examples <= most:
        raise Invalid(
            f"{answer.site}: examples: {answer.examples}: stage '{work}' has {least} to {most} there; "
            "look at what answers for that site"
        )
    if answer.loss is not None and not abs(answer.loss) <= _LOSS_LIMIT:  # NaN is in no range
        raise Invalid(f"{answer.site}: loss: {answer.loss}: must be a finite number; lower the optimiser's rate")


def _rows(state: State, site: str, known: Site | None) -> int:
    name = state.job.dataset if isinstance(state.job, QueryJob) else state.job.data.dataset
    told = (state.fleet.site(site), known)
    held: list[Dataset | None] = [one.dataset(name) for one in told if one is not None]
    return next((dataset.rows for dataset in held if dataset is not None), 0)


class Watched:
    """A stream's frames, handed on as they come, so that of what is wrong with them the tensor can be told."""

    def __init__(self, frames: Wanted, site: str, signature: Signature, plain: bool, first: int = 0) -> None:
        """``plain``: the frames are float32 as it is, in which a single element can be found. Their elements are those
        of the model from ``first`` on."""
        self._frames, self._site, self._plain = frames, site, plain
        self._signature, self._first = signature, first
        self._frame: FrameLike | None = None  # the one that is being taken
        self._next = 0  # the element after it

    def __call__(self, offset: int) -> Iterator[FrameLike]:
        self._next = offset
        for frame in self._frames(offset):
            self._frame = frame
            yield frame
            self._frame, self._next = None, frame.offset + frame.length

    def told(self, error: Invalid) -> str:
        """Return in words what ``error``, which taking the frames ended with, is about: site, tensor, reason."""
        words = str(error).removeprefix(f"update of {self._site}: ")
        place = self._place()
        return f"{self._site}: {place}: {words}" if place else f"{self._site}: {words}"

    def _place(self) -> str:
        frame = self._frame
        if frame is None:  # too few came, or what came is no frame
            return self._tensors(self._next, self._next + 1)
        if self._plain and len(frame.data) == 4 * frame.length:
            values = np.frombuffer(frame.data, "<f4")
            wrong = np.flatnonzero(~np.isfinite(values))
            if wrong.size:
                at = frame.offset + int(wrong[0])
                element = f"element {self._first + at} of the model"
                return f"{self._tensors(at, at + 1)}: {values[wrong[0]]} at {element}"
        return self._tensors(frame.offset, frame.offset + frame.length)

    def _tensors(self, start: int, stop: int) -> str:
        return tensors(self._signature, self._first + start, self._first + stop) if start >= 0 else ""


def tensors(signature: Signature, start: int, stop: int) -> str:
    """Name the tensors that elements `start` to `stop` of the flat vector belong to; "" for none of its elements."""
    named = [spec for spec in signature if spec.size]
    ends = list(accumulate(spec.size for spec in named))
    if not 0 <= start < stop or not ends or start >= ends[-1]:
        return ""
    first, last = bisect_right(ends, start), min(bisect_left(ends, stop), len(ends) - 1)
    if first == last:
        return f"tensor {named[first].name}"
    return f"tensors {named[first].name} to {named[last].name}"


def out_of_turn(state: State, answer: Answer, what: str) -> str:
    """Say that an answer is not one that the run waits for."""
    return (
        f"{answer.site}: an answer to stage {answer.position} of epoch {answer.epoch} {what}; "
        f"run {state.run} is at stage {state.position} of epoch {state.epoch}"
    )


def smallest(answer: Answer) -> int:
    rows = [group.rows for group in answer.groups] + [sums.count for sums in answer.sums.values() if sums.count]
    return min(rows, default=answer.examples)
