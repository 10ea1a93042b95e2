"""What if: the price of a plan with more sites or nodes, faster links or a bigger model, by the model of `price`.

The plan's sync stays as it is: the answer says how this plan scales, not which plan would then be chosen. Layouts are
chosen anew where the model or the nodes change, unless the job pins one. More sites mean more examples a round, not
fewer steps. A model x times as big takes x times the seconds a step, and is wider by the root of x.
"""

import math
from collections.abc import Mapping

from pydantic import Field, PositiveFloat

from atoll.planner.explain import spelled
from atoll.planner.layouts import choose_layout, misfit
from atoll.planner.price import Place, places, price, round_bytes
from atoll.spec.document import Document
from atoll.spec.fleet import Fleet, Profile
from atoll.spec.footprint import step_bytes
from atoll.spec.job import TrainJob
from atoll.spec.plan import Plan, Price
from atoll.spec.sync import Sync

_SITES = (1, 4, 16)
_NODES = (1, 3)
_FACTORS = (2.0, 10.0)


class Change(Document):
    """What would be otherwise; nothing, as it stands."""

    sites: int = Field(default=0, ge=0, le=1 << 16)  # so many more, like the slowest
    nodes: int = Field(default=0, ge=0, le=1 << 10)  # so many more at each site, like its largest
    bandwidth: PositiveFloat = 1.0  # of links, so many times
    parameters: float = Field(default=1.0, gt=0, le=1e6)  # so many times

    @property
    def words(self) -> str:
        """The change in words."""
        said: list[str] = []
        if self.sites:
            said.append(f"{self.sites} more {'site' if self.sites == 1 else 'sites'} like the slowest")
        if self.nodes:
            said.append(f"{self.nodes} more {'node' if self.nodes == 1 else 'nodes'} at each site")
        if self.bandwidth != 1:
            said.append(f"links {self.bandwidth:g} times as fast")
        if self.parameters != 1:
            said.append(f"a model {self.parameters:g} times as big")
        return ", ".join(said) or "no change"


class Outlook(Document):
    """A change in words, the price now and the price under it."""

    change: str
    now: Price
    then: Price


def what_if(job: TrainJob, plan: Plan, fleet: Fleet, profiles: Mapping[str, Profile], change: Change) -> Outlook:
    """Return the price under a change, which is told with the layouts that it makes other, and what does not fit."""
    layouts = {site: plan.layouts[site] for site in plan.sites}
    at = places(layouts, fleet, profiles)
    changed = [_changed(job, place, change) for place in at]
    slowest = max(range(len(at)), key=lambda number: _round_seconds(job, at[number], plan.sync))
    notes = dict.fromkeys(note for before, then in zip(at, changed, strict=True) for note in _notes(job, before, then))
    return Outlook(
        change=change.words + (f" ({'; '.join(notes)})" if notes else ""),
        now=price(job, plan.sync, at),
        then=price(job, plan.sync, [*changed, *[changed[slowest]] * change.sites]),
    )


def table(job: TrainJob, plan: Plan, fleet: Fleet, profiles: Mapping[str, Profile]) -> tuple[Outlook, ...]:
    """Return one row for each usual question: more sites, more nodes, faster links, a bigger model."""
    usual = [
        *(Change(sites=count) for count in _SITES),
        *(Change(nodes=count) for count in _NODES),
        *(Change(bandwidth=factor) for factor in _FACTORS),
        *(Change(parameters=factor) for factor in _FACTORS),
    ]
    return tuple(what_if(job, plan, fleet, profiles, change) for change in usual)


def _round_seconds(job: TrainJob, place: Place, sync: Sync) -> float:
    size, step = round_bytes(place.profile.parameters, sync), place.step_seconds(job)
    compute = step * sync.stride
    if sync.seconds is not None:
        compute = min(compute, max(sync.seconds, step))
    return compute + max(0.0, place.link_seconds(size) - sync.delay * step)


def _changed(job: TrainJob, place: Place, change: Change) -> Place:
    profile = _grown(job, place.profile, change.parameters)
    largest = max(place.nodes, key=lambda node: len(node.devices))
    nodes = (*place.nodes, *(largest,) * change.nodes)
    link = place.link.model_copy(update={"bandwidth": place.link.bandwidth * change.bandwidth})
    layout = place.layout
    if (change.nodes or change.parameters != 1) and job.layout is None:
        layout = choose_layout(job, nodes, profile).layout
    return Place(profile, link, layout, nodes)


def _grown(job: TrainJob, before: Profile, times: float) -> Profile:
    if times == 1:
        return before
    wider = math.sqrt(times)
    shape, more = before.shape, ("block_parameters", "tensor_parameters", "expert_parameters")
    update = {name: round(getattr(shape, name) * times) for name in more}
    update |= {name: round(getattr(shape, name) * wider) for name in ("width", "activation_bytes")}
    profile = before.model_copy(
        update={
            "parameters": round(before.parameters * times),
            "step_seconds": before.step_seconds * times,
            "shape": shape.model_copy(update=update),
        }
    )
    # What the measured worker held beside the model (interpreter, examples) stays; the model's own share grows.
    now, then = (step_bytes(one, one.layout, job.optimiser, job.compute, job.batch) for one in (before, profile))
    memory = max(0, before.memory_bytes + then - now) if before.memory_bytes else 0
    return profile.model_copy(update={"memory_bytes": memory})


def _notes(job: TrainJob, before: Place, then: Place) -> list[str]:
    if words := misfit(job, then.nodes, then.profile, then.layout):
        return [f"does not fit: {words}"]
    return [f"by {spelled(then.layout)}"] if then.layout != before.layout else []
