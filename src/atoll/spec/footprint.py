"""What a rank of a layout holds while it trains: bytes by one stated model, before anything is started.

Of P parameters, under data d, shard s, tensor t, pipeline p, context c, expert e:

    parts        q = (rest + cut by tensor / t + experts / e) x stage / s, stage = the most that one has of the model
    state        q x (4 weights + 4 gradient + 4 for each of the optimiser's moments, and 4 for what copies send of it)
    made whole   with shard: what is outside of the blocks, with its gradient; two blocks, one of them with its gradient
    activations  A a' / (p c) for each example under way; A of one example as measured, a' = 10/34 + 24/34 / t

The state is divided as in Rajbhandari et al. (2020, "ZeRO"). Of a transformer's activations 24 of 34 parts are cut by
tensor parallelism (Korthikanti et al., 2022). With checkpointing a rank keeps what goes between blocks and what is
of one block.
"""

import math

from atoll.spec.compute import Compute
from atoll.spec.fleet import ModelShape, Profile
from atoll.spec.job import Optimiser
from atoll.spec.plan import Layout

FLOAT_BYTES = 4
_UNCUT = 10 / 34  # of activations, under tensor


def moments(optimiser: Optimiser) -> int:
    """How many numbers the inner optimiser keeps for each parameter."""
    return 2 if optimiser.kind in ("adam", "adamw") else int(optimiser.momentum > 0)


def kept(profile: Profile, layout: Layout) -> int:
    """How many parameters a rank keeps: the rank of the fullest stage."""
    shape, total = profile.shape, profile.parameters
    cut = shape.tensor_parameters or total - shape.expert_parameters  # a task's own way is taken to cut all
    rest = max(0, total - cut - shape.expert_parameters)
    held = rest + cut / layout.tensor + shape.expert_parameters / layout.expert
    return math.ceil(held * _stage(profile, layout.pipeline) / layout.shard)


def step_bytes(profile: Profile, layout: Layout, optimiser: Optimiser, compute: Compute, batch: int) -> int:
    """Bytes that a rank holds in a step on its share of ``batch`` examples."""
    sent = layout.plain and layout.data > 1  # torch's buckets of the gradient
    state = FLOAT_BYTES * kept(profile, layout) * (2 + moments(optimiser) + sent)
    return state + _made_whole(profile, layout, compute) + activations(profile.shape, layout, compute, batch)


def activations(shape: ModelShape, layout: Layout, compute: Compute, batch: int) -> int:
    """Bytes that a rank keeps between the forward and the backward pass."""
    each = shape.activation_bytes
    if compute.checkpointing and shape.layers:
        between = FLOAT_BYTES * shape.positions * shape.width * shape.layers
        each = min(each, between + each // shape.layers)
    each = each * (_UNCUT + (1 - _UNCUT) / layout.tensor) / (layout.pipeline * layout.context)
    if compute.precision == "bfloat16":
        each /= 2
    share = math.ceil(batch / layout.shares)
    return math.ceil(each * share * under_way(layout, compute, share))


def under_way(layout: Layout, compute: Compute, share: int) -> float:
    """Return which part of a share's examples is under way in a rank at once."""
    pieces = micro_batches(layout, compute, share)
    if layout.pipeline == 1:
        return 1 / pieces
    return 1.0 if compute.schedule == "gpipe" else min(layout.pipeline, pieces) / pieces


def micro_batches(layout: Layout, compute: Compute, share: int) -> int:
    """How many pieces a share of a batch is taken in; under a pipeline they are equal. 0: there is no such number."""
    wanted = min(max(compute.microbatches, layout.pipeline), share)
    if layout.pipeline == 1:
        return max(1, wanted)
    return next((n for n in range(wanted, layout.pipeline - 1, -1) if share % n == 0), 0)


def outside(profile: Profile) -> int:
    """How many parameters are in no block: without blocks, all."""
    return max(0, profile.parameters - profile.shape.block_parameters)


def _made_whole(profile: Profile, layout: Layout, compute: Compute) -> int:
    if layout.shard == 1:
        return 0
    shape = profile.shape
    narrow = 2 if compute.precision == "bfloat16" else FLOAT_BYTES
    block = shape.block_parameters / max(shape.layers, 1)
    whole = outside(profile) * (narrow + FLOAT_BYTES) + block * (2 * narrow + FLOAT_BYTES)
    return math.ceil(whole / layout.tensor)


def _stage(profile: Profile, stages: int) -> float:
    """Return the share of the model that its fullest stage may have: its blocks', and all that is in none."""
    layers = profile.shape.layers
    if stages == 1 or not layers:
        return 1 / stages
    inside = profile.shape.block_parameters / max(profile.parameters, 1)
    return inside * math.ceil(layers / stages) / layers + max(0.0, 1 - inside)
