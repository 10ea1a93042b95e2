"""What the owners of datasets want done to updates: a plan's wire has all of it, whatever its job says."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pydantic import ValidationError

from atoll.errors import Denied
from atoll.planner.points import Point
from atoll.spec.fleet import Fleet
from atoll.spec.plan import Reason
from atoll.spec.sync import Sync
from atoll.spec.wire import ORDER, Transform, Wire, disorder

_RANK = {kind: place for place, kinds in enumerate(ORDER) for kind in kinds}


def wanted(fleet: Fleet, sites: Iterable[str], dataset: str) -> dict[str, Wire]:
    """Return what these sites' owners want of updates made of a dataset, for each that wants anything."""
    held = {name: site.dataset(dataset) for name in sites if (site := fleet.site(name)) is not None}
    return {name: found.wire for name, found in held.items() if found is not None and found.wire}


def with_terms(wire: Wire, asked: Wire) -> Wire:
    """Return a wire with the transforms that it is asked to have and lacks, each in its place.

    A clip is lacking where all that there are hold to a larger norm. The wire may come out as one that cannot be
    carried out, `disorder` says so: of two ways to round, each may be somebody's wish.
    """
    steps: list[Transform] = list(wire)
    for step in asked:
        if not any(_as_strict(one, step) for one in steps):
            if step.kind == "noise":  # there is one at most, and more of it serves whoever asks for less
                steps = [one for one in steps if one.kind != "noise"]
            before = sum(_RANK[one.kind] <= _RANK[step.kind] for one in steps)
            steps.insert(before, step)
    return tuple(steps)


def bound(points: Sequence[Point], asked: dict[str, Wire], sites: int, pinned: bool) -> tuple[Point, ...]:
    """Return the points of so many sites with what owners ask for in their wires; one that cannot is there, rejected.

    Raises `Denied` when that is the one a job pins, in words that name the site.
    """
    if not asked:
        return tuple(points)
    found = tuple(_bound(point, asked, sites) for point in points)
    if pinned and (against := found[0].rejected):
        raise Denied(f"sync: {against[-1].words}")
    if all(point.rejected for point in found):
        raise Denied(f"no way to train is left: {found[-1].rejected[-1].words}")
    return found


def reasons(sync: Sync, asked: dict[str, Wire], pinned: Sync | None) -> tuple[Reason, ...]:
    """Say of each owner what of the plan's wire is there by the terms of its dataset, and not by the job."""
    had = pinned.wire if pinned is not None else ()
    told: list[Reason] = []
    for site, wire in asked.items():
        if added := [_named(step) for step in wire if step in sync.wire and step not in had]:
            told.append(Reason(by=f"terms of {site}", words=f"updates pass through {', '.join(added)}"))
    return tuple(told)


def _bound(point: Point, asked: dict[str, Wire], sites: int) -> Point:
    wire = point.sync.wire
    for site, terms in asked.items():
        wire = with_terms(wire, terms)
        words = disorder(wire) or _misfit(point.sync, wire, sites)
        if words:
            named = ", ".join(_named(step) for step in terms)
            reason = Reason(by=f"terms of {site}", words=f"{site} asks for {named} on updates: {words}")
            return replace(point, rejected=(*point.rejected, reason))
    return replace(point, sync=point.sync.model_copy(update={"wire": wire}))


def _misfit(sync: Sync, wire: Wire, sites: int) -> str:
    """Return why a sync cannot have this wire; "" when it can."""
    try:
        made = Sync.model_validate({**sync.model_dump(mode="json"), "wire": [step.model_dump() for step in wire]})
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return made.unfit(sites) or ""


def _as_strict(one: Transform, asked: Transform) -> bool:
    if one.kind != asked.kind:
        return False
    if one.value is None or asked.value is None:
        return True
    return one.value >= asked.value if one.kind == "noise" else one.value <= asked.value


def _named(step: Transform) -> str:
    return step.kind if step.value is None else f"{step.kind} {step.value:g}"
