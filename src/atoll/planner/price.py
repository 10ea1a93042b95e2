"""What a candidate is predicted to cost: one stated model, so that a wrong prediction can be traced to a term.

P parameters, S sites, T steps, F fragments, k = period / F, R = ceil(T / k) rounds, float32:

    step       s = computing / ranks + what the ranks of a site's layout say to each other: `atoll.planner.step`
    compute    C = T x max over sites of s, or with `seconds`, B, at most R x max(B, that of one step)
    down       4 P, or with fragments or `down` a change: as up, by the transforms of `down`      bytes
    up         o + b(n), with p = ceil(P / F), n = p and o = 0, or under topk n = ceil(share p) and places that take
               o = min(ceil(p / 8), 2 n)                                                          bytes
    b(n)       4 n, bfloat16 2 n, int8 n + 4 ceil(n / 1024), int4 ceil(n / 2) + 2 ceil(n / 64)    bytes
    link       L = max over sites of ROUND_TRIPS x latency + (down + up) / bandwidth              seconds
    hub        H = n (down + up) / HUB_BANDWIDTH, for the hub shares its link among n sites       seconds
    look       K = LOOK_SECONDS x p x (n with a bound + n (n - 1) / 2 x passes over pairs, of multi_krum one, of the
               geometric median two)                                                              seconds
    transfer   X = R x (max(0, max(L, H) + K - delay x max over sites of s) + ROUND_SECONDS)      seconds
    bytes      R x n x (down + up) + 4 P, the last for the first weights going up
    memory     max(4 P, M + 4 q x (start + delta)) + what the measured worker held beside its M   bytes a rank
    seconds    (C + X) x n / S

n is S, unless rounds wait for a buffer of n updates: then sites deliver by turns, and a round comes S / n times as
often; then a site's last version is seldom the one before, and weights are priced whole. A quorum is priced as if every
site came. M, of a rank's part of q parameters, is the step's in `atoll.spec.footprint`, and 4 P what building the model
takes before it is cut. With control variates 2 P numbers go down and up in a round, and a rank
holds 20 P bytes more. What zstd saves is not known before it is tried, and counts as
nothing. Compute hides of a round's transfer what `delay` steps of the slowest site take, for that is how far sites go
on meanwhile; nothing else of the two overlaps. Starting workers, statistics and evaluation are not counted, nor is the
work of encoding, nor several sites sharing one machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atoll.planner.step import nodes_of, step_seconds
from atoll.spec.fleet import Dataset, Fleet, Link, Node, Profile
from atoll.spec.footprint import FLOAT_BYTES, kept, step_bytes
from atoll.spec.job import TrainJob
from atoll.spec.plan import Layout, Price
from atoll.spec.privacy import AT_ONCE
from atoll.spec.sync import Sync
from atoll.spec.wire import Transform

_WHOLE = Layout()
INT8_BLOCK = 1024  # parameters that share one float32 scale
INT4_BLOCK = 64  # parameters that share one bfloat16 scale
HUB_BANDWIDTH = 1e9  # bytes per second a hub on two cores receives, adds and sends
LOOK_SECONDS = 1e-9  # of one element of an update, or of a pair of them, at the hub
PASSES = {"multi_krum": 1, "geometric_median": 2}  # over all pairs of updates
ROUND_TRIPS = 3  # assignment, weights, update
ROUND_SECONDS = 1e-2  # the hub's journal and the start of a round in the workers


@dataclass(frozen=True, slots=True)
class Place:
    """What the model needs to know of one site."""

    profile: Profile
    link: Link
    layout: Layout
    nodes: tuple[Node, ...]

    def step_seconds(self, job: TrainJob) -> float:
        """Seconds of one inner step under this layout."""
        return step_seconds(self.profile, self.layout, self.nodes, job)

    def link_seconds(self, size: int) -> float:
        """Seconds that `size` bytes and a round's messages take between this site and the hub."""
        return ROUND_TRIPS * self.link.latency + size / self.link.bandwidth


def places(layouts: Mapping[str, Layout], fleet: Fleet, profiles: Mapping[str, Profile]) -> tuple[Place, ...]:
    """Return what the model needs to know of each site in `layouts`, in its order."""
    found: list[Place] = []
    for name, layout in layouts.items():
        found.append(Place(profiles[name], fleet.link(name), layout, nodes_of(fleet.site(name))))
    return tuple(found)


def wire_bytes(parameters: int, sync: Sync) -> int:
    """Bytes of one site's update on the wire, after the sync's transforms, as if it were one chunk."""
    return _encoded(parameters, sync.wire)


def down_bytes(parameters: int, sync: Sync) -> int:
    """Bytes of the weights on their way to one site: whole, or what changed since the round before."""
    if sync.wait.kind == "buffer" or not (sync.down or sync.fragments > 1):
        return FLOAT_BYTES * parameters
    return _encoded(math.ceil(parameters / sync.fragments), sync.down)


def _encoded(parameters: int, wire: tuple[Transform, ...]) -> int:
    """Places that topk keeps take a bit a parameter, or about two bytes each where that is less. zstd counts as
    nothing."""
    kinds = {step.kind: step for step in wire}
    numbers, places = parameters, 0
    if (topk := kinds.get("topk")) and topk.share is not None:
        numbers = math.ceil(topk.share * parameters)
        places = min(math.ceil(parameters / 8), 2 * numbers)
    if "bfloat16" in kinds:
        return places + 2 * numbers
    if "int8" in kinds:
        return places + numbers + FLOAT_BYTES * math.ceil(numbers / INT8_BLOCK)
    if "int4" in kinds:
        return places + math.ceil(numbers / 2) + 2 * math.ceil(numbers / INT4_BLOCK)
    return places + FLOAT_BYTES * numbers


def rounds(steps: int, stride: int) -> int:
    """How many rounds take `steps` inner steps; the last may be shorter."""
    return math.ceil(steps / stride)


def round_bytes(parameters: int, sync: Sync) -> int:
    """Bytes between one site and the hub in one round: the weights or their change down, an update up."""
    exchanged = 2 * parameters if sync.control else parameters
    return down_bytes(exchanged, sync) + wire_bytes(math.ceil(exchanged / sync.fragments), sync)


def look_seconds(parameters: int, sync: Sync, updates: int) -> float:
    """Seconds that the hub takes to look at a round's whole updates, for their norms and how far they are apart."""
    looks = updates * (sync.bound is not None) + updates * (updates - 1) // 2 * PASSES.get(sync.merge, 0)
    return LOOK_SECONDS * math.ceil(parameters / sync.fragments) * looks


def rank_memory(profile: Profile, job: TrainJob, layout: Layout = _WHOLE, control: bool = False) -> int:
    """Bytes a rank needs: what the model explains, and what the measured worker held beside that."""
    explained = step_bytes(profile, profile.layout, job.optimiser, job.compute, job.batch)
    beside = max(0, profile.memory_bytes - explained)
    # The round's start and the delta of what a rank keeps.
    held = step_bytes(profile, layout, job.optimiser, job.compute, job.batch) + 2 * FLOAT_BYTES * kept(profile, layout)
    # Both control variates, their difference, and gradients summed in float64, of the whole model.
    more = 5 * FLOAT_BYTES * profile.parameters if control else 0
    if job.privacy is not None:  # each example's own gradient
        more += FLOAT_BYTES * profile.parameters * math.ceil(AT_ONCE * job.batch / job.compute.microbatches)
    return beside + max(FLOAT_BYTES * profile.parameters, held) + more


def price(job: TrainJob, sync: Sync, at: Sequence[Place]) -> Price:
    """Price `job` under `sync` at these places (at least one)."""
    parameters = max(place.profile.parameters for place in at)
    size = round_bytes(parameters, sync)
    count = sync.wait.count if sync.wait.kind == "buffer" and sync.wait.count else len(at)
    share = min(1.0, count / len(at))
    trips = rounds(job.steps, sync.stride)
    step = max(place.step_seconds(job) for place in at)
    compute = job.steps * step * share
    if sync.seconds is not None:
        compute = min(compute, trips * max(sync.seconds, step) * share)
    carried = max(max(place.link_seconds(size) for place in at), count * size / HUB_BANDWIDTH)
    carried = max(0.0, carried + look_seconds(parameters, sync, count) - sync.delay * step)
    transfer = trips * (carried + ROUND_SECONDS) * share
    return Price(
        seconds=compute + transfer,
        compute_seconds=compute,
        transfer_seconds=transfer,
        bytes=trips * count * size + FLOAT_BYTES * parameters,
        memory_bytes=max(rank_memory(place.profile, job, place.layout, sync.control) for place in at),
    )


def gather_price(job: TrainJob, datasets: Sequence[Dataset], at: Sequence[Place]) -> Price:
    """Price moving all rows to the site that holds most, which then does every site's steps alone.

    `datasets` and `at` are of the same sites in the same order.
    """
    home = max(range(len(at)), key=lambda index: datasets[index].bytes)
    moved = [dataset.bytes for dataset in datasets]
    moved[home] = 0
    compute = job.steps * len(at) * at[home].step_seconds(job)
    total = sum(moved)
    slowest = max(place.link_seconds(size) for place, size in zip(at, moved, strict=True))
    # The hub passes every row on, so what it takes in it also sends, over home's link.
    transfer = max(slowest, at[home].link_seconds(total), 2 * total / HUB_BANDWIDTH)
    return Price(
        seconds=compute + transfer,
        compute_seconds=compute,
        transfer_seconds=transfer,
        bytes=2 * total,
        memory_bytes=rank_memory(at[home].profile, job, at[home].layout),
    )
