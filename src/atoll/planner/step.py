"""How long an inner step takes under a layout: computing shared by ranks, and what they say to each other.

An alpha-beta model: a collective of n ranks on V bytes takes START_SECONDS + f(n) V / bandwidth. With one rank's
seconds W of a step, taken from what was measured, B = 4 x parameters kept by a rank x shard, h = bytes that go between
two blocks for a rank's share of a batch, l = layers of a stage, m micro-batches:

    compute   W / min(ranks, devices) x (1 + (p - 1) / (v m)), v = 2 stages a rank if interleaved or zero-bubble, else 1
    data      all-reduce of B / s:                     2 (d-1)/d B / s
    shard     all-gather twice, reduce-scatter once:   (2 m + 1) (s-1)/s B, a collective each block and one for the rest
    tensor    4 all-reduces a layer:                   4 l x 2 (t-1)/t h
    pipeline  h to the next stage and its gradient back
    context   8 all-to-alls a layer, and an all-reduce of the gradient
    expert    4 all-to-alls a layer, and an all-reduce of the gradient of what is not the experts'

Narayanan et al. (2021) for tensor and pipeline, Rajbhandari et al. (2020) for shard; rings as in Patarasuk and Yuan
(2009). Ranks are placed with the innermost axis first, so an axis that fits into a node stays within it; one that does
not shares the node's link with the node's other ranks. Nothing of this is hidden behind computing.
"""

import math
from collections.abc import Sequence

from atoll.spec.fleet import Node, Profile, Site
from atoll.spec.footprint import FLOAT_BYTES, kept, micro_batches
from atoll.spec.job import TrainJob
from atoll.spec.plan import Layout

START_SECONDS = 1e-3  # of one collective between processes, gloo
LOCAL_BANDWIDTH = 1e9  # bytes per second between ranks of one machine, gloo over loopback
NODE_BANDWIDTH = 1.25e9  # bytes per second that all ranks of a node have to others: 10 Gb/s, as nobody measures it
_AXES = ("tensor", "context", "expert", "shard", "data", "pipeline")  # innermost first, as ranks are laid out
_LEAST = 0.05  # of a measured step that is computing, whatever the model says of its collectives


def nodes_of(site: Site | None) -> tuple[Node, ...]:
    """Return a site's nodes that have devices, the largest first."""
    found = [node for node in site.nodes if node.devices] if site else []
    return tuple(sorted(found, key=lambda node: -len(node.devices))) or (Node(),)


def step_seconds(profile: Profile, layout: Layout, nodes: Sequence[Node], job: TrainJob) -> float:
    """Seconds of one inner step under a layout at these nodes; under the one that was measured, as measured."""
    talk = _talk(profile, profile.layout, nodes, job)
    computing = max(profile.step_seconds - talk, _LEAST * profile.step_seconds)
    alone = computing * _speed(profile.layout, nodes, job)
    return alone / _speed(layout, nodes, job) + _talk(profile, layout, nodes, job)


def _speed(layout: Layout, nodes: Sequence[Node], job: TrainJob) -> float:
    """Return how many times as fast as one rank these compute."""
    devices = sum(len(node.devices) for node in nodes)
    each = 2 if job.compute.schedule in ("interleaved", "zero_bubble") else 1
    bubble = (layout.pipeline - 1) / (each * max(1, _pieces(layout, job)))
    return min(layout.ranks, max(devices, 1)) / (1 + bubble)


def _talk(profile: Profile, layout: Layout, nodes: Sequence[Node], job: TrainJob) -> float:
    if layout.ranks == 1:
        return 0.0
    held = FLOAT_BYTES * kept(profile, layout)
    between = _between(profile, layout, job)
    layers = max(1, math.ceil(profile.shape.layers / layout.pipeline))
    pieces = _pieces(layout, job)
    experts = FLOAT_BYTES * profile.shape.expert_parameters / layout.expert / layout.shard / layout.pipeline
    said = {  # axis -> starts, and bytes that each rank of n sends, over (n - 1) / n
        "data": (1.0, 2.0 * held),
        "shard": ((2 * pieces + 1.0) * (layers + 1), (2 * pieces + 1.0) * held * layout.shard),
        "tensor": (4.0 * layers * pieces, 4 * layers * 2 * between),
        "pipeline": (2.0 * pieces, 2 * between),
        "context": (8.0 * layers * pieces + 1, 8 * layers * between + 2 * held),
        "expert": (4.0 * layers * pieces + 1, 4 * layers * between + 2 * max(0.0, held - experts)),
    }
    total = 0.0
    for axis, (starts, sent) in said.items():
        degree: int = getattr(layout, axis)
        if degree > 1:
            part = 1.0 if axis == "pipeline" else (degree - 1) / degree
            total += starts * START_SECONDS + part * sent / _bandwidth(layout, axis, nodes)
    return total


def _between(profile: Profile, layout: Layout, job: TrainJob) -> float:
    """Return the bytes between two blocks of a rank's share of a batch."""
    narrow = 2 if job.compute.precision == "bfloat16" else FLOAT_BYTES
    share = math.ceil(job.batch / layout.shares)
    return narrow * share * profile.shape.positions * profile.shape.width / layout.context


def _pieces(layout: Layout, job: TrainJob) -> int:
    return micro_batches(layout, job.compute, math.ceil(job.batch / layout.shares))


def _bandwidth(layout: Layout, axis: str, nodes: Sequence[Node]) -> float:
    """Return the bytes per second that a rank has along an axis."""
    node = max((len(one.devices) for one in nodes), default=1)
    within = 1  # ranks that are next to each other along the axes inside of this one
    for inner in _AXES[: _AXES.index(axis)]:
        within *= getattr(layout, inner)
    if len(nodes) < 2 or within * getattr(layout, axis) <= node:
        return LOCAL_BANDWIDTH
    return min(LOCAL_BANDWIDTH, NODE_BANDWIDTH / max(1, min(within, node)))
