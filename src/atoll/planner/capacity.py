"""What if: the price of a plan with more sites, faster links or a bigger model, by the model of `price`.

The plan's sync stays as it is: the answer says how this plan scales, not which plan would then be chosen. More sites
mean more examples a round, not fewer steps. A model x times as big takes x times the seconds a step.
"""

from collections.abc import Mapping
from dataclasses import replace

from atoll.errors import Invalid
from atoll.planner.price import Place, places, price, round_bytes, step_memory
from atoll.spec.document import Document
from atoll.spec.fleet import Fleet, Profile
from atoll.spec.job import TrainJob
from atoll.spec.plan import Plan, Price, Sync

_SITES = (1, 4, 16)
_FACTORS = (2.0, 10.0)


class Outlook(Document):
    """A change in words, the price now and the price under it."""

    change: str
    now: Price
    then: Price


def what_if(
    job: TrainJob,
    plan: Plan,
    fleet: Fleet,
    profiles: Mapping[str, Profile],
    sites: int | None = None,
    bandwidth: float | None = None,
    parameters: float | None = None,
) -> Outlook:
    """Return the price with `sites` more sites like the slowest, links `bandwidth` times as fast, a model
    `parameters` times as big; raise `Invalid` for a number that makes no sense.
    """
    more, faster, bigger = (
        sites or 0,
        1.0 if bandwidth is None else bandwidth,
        1.0 if parameters is None else parameters,
    )
    if more < 0:
        raise Invalid(f"sites: {more} more sites; give 0 or more")
    for field, factor in (("bandwidth", faster), ("parameters", bigger)):
        if not 0 < factor < float("inf"):
            raise Invalid(f"{field}: {factor} times; give a number above 0")
    layouts = {site: plan.layouts[site] for site in plan.sites}
    at = places(layouts, fleet, profiles)
    slowest = max(at, key=lambda place: _round_seconds(place, plan.sync))
    changed = [_changed(job, place, faster, bigger) for place in (*at, *[slowest] * more)]
    return Outlook(
        change=_words(more, faster, bigger), now=price(job, plan.sync, at), then=price(job, plan.sync, changed)
    )


def table(job: TrainJob, plan: Plan, fleet: Fleet, profiles: Mapping[str, Profile]) -> tuple[Outlook, ...]:
    """Return one row for each usual question: more sites, faster links, a bigger model."""
    more = [what_if(job, plan, fleet, profiles, sites=count) for count in _SITES]
    faster = [what_if(job, plan, fleet, profiles, bandwidth=factor) for factor in _FACTORS]
    bigger = [what_if(job, plan, fleet, profiles, parameters=factor) for factor in _FACTORS]
    return (*more, *faster, *bigger)


def _round_seconds(place: Place, sync: Sync) -> float:
    size = round_bytes(place.profile.parameters, sync)
    hidden = sync.delay * place.step_seconds
    compute = place.step_seconds * sync.stride
    if sync.seconds is not None:
        compute = min(compute, max(sync.seconds, place.step_seconds))
    return compute + max(0.0, place.link_seconds(size) - hidden)


def _changed(job: TrainJob, place: Place, faster: float, bigger: float) -> Place:
    before = place.profile
    parameters = round(before.parameters * bigger)
    # What the measured worker held beside the model (interpreter, batch) stays; the model's own share grows.
    grown = step_memory(parameters, job.optimiser) - step_memory(before.parameters, job.optimiser)
    memory = max(0, before.memory_bytes + grown) if before.memory_bytes else 0
    profile = Profile(parameters=parameters, step_seconds=before.step_seconds * bigger, memory_bytes=memory)
    link = place.link.model_copy(update={"bandwidth": place.link.bandwidth * faster})
    return replace(place, profile=profile, link=link)


def _words(more: int, faster: float, bigger: float) -> str:
    said: list[str] = []
    if more:
        said.append(f"{more} more {'site' if more == 1 else 'sites'} like the slowest")
    if faster != 1:
        said.append(f"links {faster:g} times as fast")
    if bigger != 1:
        said.append(f"a model {bigger:g} times as big")
    return ", ".join(said) or "no change"
