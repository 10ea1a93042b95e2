"""How one site's ranks share a model: which layouts there are for it, which of them fit, and which is taken.

Data parallelism is taken while it fits, by as few ranks as make its step as fast; then, of all that fits, the fastest.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atoll.planner.explain import spelled, volume
from atoll.planner.price import rank_memory
from atoll.planner.step import step_seconds
from atoll.spec.fleet import Node, Profile
from atoll.spec.footprint import FLOAT_BYTES, micro_batches
from atoll.spec.job import TrainJob
from atoll.spec.plan import Layout

TIE_SHARE = 0.10  # steps that differ by less count as equally fast
_MOST_SHARDS = 4096  # tried, to say how many devices a model would take


@dataclass(frozen=True, slots=True)
class Choice:
    """A site's layout, and each other one that did not fit, in words."""

    layout: Layout
    too_big: tuple[tuple[Layout, str], ...] = ()


def candidates(job: TrainJob, nodes: Sequence[Node], profile: Profile) -> tuple[Layout, ...]:
    """Return the layouts that these nodes could have, data parallel ones first and each kind by rising ranks.

    Data, shard and both together; tensor within a node and pipelines over nodes where the model brings a plan, each
    with data and shard beside it. A task of arrays has one rank, and so has one whose steps are private.
    """
    if not profile.gradients or job.privacy is not None:
        return (Layout(),)
    devices = sum(len(node.devices) for node in nodes)
    found = [Layout(data=data) for data in degrees(min(devices, job.batch))]
    inner = [*_tensor(nodes[0], profile), *_pipelines(job, nodes, profile)]
    for base in (Layout(), *inner):
        spread = sorted(_spread(job, base, devices), key=lambda one: (one.ranks, one.data))
        found += spread
    return tuple(dict.fromkeys(found))


def degrees(most: int) -> list[int]:
    """Return the degrees tried up to ``most``: 1 to 4, the powers of 2, and the most itself."""
    doubled = {1 << power for power in range(most.bit_length())}
    return sorted({*range(1, min(most, 4) + 1), *doubled, most} if most > 0 else {1})


def choose_layout(job: TrainJob, nodes: Sequence[Node], profile: Profile) -> Choice:
    """Return the pinned layout, or the one to take. Where none fits, that which comes nearest: see `unfit`."""
    if job.layout is not None:
        return Choice(job.layout)
    options = candidates(job, nodes, profile)
    words = {layout: misfit(job, nodes, profile, layout) for layout in options}
    too_big = tuple((layout, said) for layout, said in words.items() if said)
    fitting = [layout for layout, said in words.items() if not said]
    copies = [layout for layout in fitting if layout.plain]
    if not fitting:
        return Choice(min(options, key=lambda layout: rank_memory(profile, job, layout, control(job))), too_big)
    seconds = [(step_seconds(profile, layout, nodes, job), layout) for layout in copies or fitting]
    limit = min(one for one, _ in seconds) * (1 + TIE_SHARE)
    close = [layout for one, layout in seconds if one <= limit]
    return Choice(min(close, key=lambda layout: layout.ranks), too_big)


def misfit(job: TrainJob, nodes: Sequence[Node], profile: Profile, layout: Layout) -> str:
    """Return why a layout's ranks do not fit into these devices, "" where they do."""
    needed, there = rank_memory(profile, job, layout, control(job)), smallest(nodes)
    if needed <= there:
        return ""
    return f"{spelled(layout)}: needs {volume(needed)} a rank where a device has {volume(there)}"


def unfit(job: TrainJob, nodes: Sequence[Node], profile: Profile) -> str | None:
    """Return what a rank needs and has, and what would mend it; None where the layout to take fits."""
    layout = choose_layout(job, nodes, profile).layout
    if not misfit(job, nodes, profile, layout):
        return None
    needed, there = rank_memory(profile, job, layout, control(job)), smallest(nodes)
    under = f" under {spelled(layout)}" if layout.ranks > 1 else ""
    return (
        f"a rank needs {volume(needed)}{under} and its device has {volume(there)}; {_mend(job, nodes, profile, layout)}"
    )


def control(job: TrainJob) -> bool:
    """Whether the job pins a sync with control variates, which take memory."""
    return job.sync is not None and job.sync.control


def smallest(nodes: Sequence[Node]) -> int:
    """Return the memory of the smallest device: any rank may be there."""
    return min((device.memory_bytes for node in nodes for device in node.devices), default=0)


def _tensor(node: Node, profile: Profile) -> list[Layout]:
    shape = profile.shape
    if "tensor" not in shape.axes or not shape.heads:
        return []
    return [Layout(tensor=n) for n in range(2, len(node.devices) + 1) if shape.heads % n == 0]


def _pipelines(job: TrainJob, nodes: Sequence[Node], profile: Profile) -> list[Layout]:
    shape = profile.shape
    kept_local = job.sync is not None and bool(job.sync.keep_local)
    if "pipeline" not in shape.axes or kept_local or len(nodes) < 2:
        return []
    stages = 2 if job.compute.schedule in ("interleaved", "zero_bubble") else 1
    most = min(len(nodes), shape.layers // stages)
    found = [Layout(pipeline=n) for n in range(2, most + 1)]
    return [
        *found,
        *(cut.model_copy(update={"pipeline": p.pipeline}) for p in found for cut in _tensor(nodes[0], profile)),
    ]


def _spread(job: TrainJob, base: Layout, devices: int) -> Iterator[Layout]:
    """Yield a layout with data and shard beside its other degrees, so that its ranks have devices and examples."""
    room = min(devices // base.ranks, job.batch)
    for shard in degrees(room) if room else ():
        for data in degrees(room // shard):
            if shard == 1 and data > 1 and base.plain:
                continue  # copies only
            layout = base.model_copy(update={"shard": shard, "data": data})
            if micro_batches(layout, job.compute, _share(job, layout)):
                yield layout


def _share(job: TrainJob, layout: Layout) -> int:
    """Return the examples of each share, 0 where a pipeline would get unequal ones."""
    return job.batch // layout.shares if layout.pipeline == 1 or job.batch % layout.shares == 0 else 0


def _mend(job: TrainJob, nodes: Sequence[Node], profile: Profile, layout: Layout) -> str:
    """Return what would make a model fit, what costs least first."""
    for change, words in (({}, ""), *_lighter(job, layout)):
        other = job.model_copy(update={"compute": job.compute.model_copy(update=change)})
        free = other.model_copy(update={"layout": None})
        if words and not misfit(other, nodes, profile, layout):
            return f"set compute: {{{words}}}"
        fitting = [one for one in candidates(free, nodes, profile) if not misfit(free, nodes, profile, one)]
        if fitting and job.layout is not None:
            least = min(fitting, key=lambda one: one.ranks)
            return f"set layout: {_yaml(least)}, or leave it out" + (f", and compute: {{{words}}}" if words else "")
        if fitting:
            return f"set compute: {{{words}}}"
    if FLOAT_BYTES * profile.parameters > smallest(nodes):
        whole = volume(FLOAT_BYTES * profile.parameters)
        return f"each rank builds the whole model, {whole}, before it cuts it; use devices with more memory"
    for power in range(1, _MOST_SHARDS.bit_length()):
        shards = Layout(shard=1 << power)
        if profile.gradients and shards.ranks <= job.batch and not misfit(job, nodes, profile, shards):
            return (
                f"it would fit on {shards.ranks} devices by layout: {_yaml(shards)}; use a smaller model or batch here"
            )
    return "use a smaller model or batch"


def _lighter(job: TrainJob, layout: Layout) -> Iterator[tuple[dict[str, object], str]]:
    """Yield changes of how a step is computed that take less memory, in fields and in words."""
    share, compute = math.ceil(job.batch / layout.shares), job.compute
    change: dict[str, object] = {}
    words: list[str] = []
    plain = job.privacy is None  # private steps take nothing else
    wanted: list[tuple[str, object, str]] = []
    wanted += [("checkpointing", True, "true")] if plain and not compute.checkpointing else []
    wanted += [("microbatches", share, str(share))] if share > compute.microbatches else []
    wanted += [("precision", "bfloat16", "bfloat16")] if plain and compute.precision == "float32" else []
    for field, value, said in wanted:
        yield {field: value}, f"{field}: {said}"
    for field, value, said in wanted:
        change[field] = value
        words.append(f"{field}: {said}")
        yield dict(change), ", ".join(words)


def _yaml(layout: Layout) -> str:
    said = ", ".join(f"{axis}: {degree}" for axis, degree in layout.model_dump().items() if degree > 1)
    return f"{{{said or 'data: 1'}}}"
