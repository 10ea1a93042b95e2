"""Where a site's own weights go on from round to round, and the part that was merged meanwhile is mixed into them.

Streaming DiLoCo (Douillard et al., 2025): a round exchanges one fragment of the model; the site has gone on by `delay`
steps when the merged fragment comes in, so it keeps a share `blend` of what it has made of it itself.
"""

from collections.abc import Iterable

import numpy as np
import torch

from atoll.inner.held import Held
from atoll.spec.order import Train


def mixing_step(order: Train) -> int:
    """Return after how many steps of the round the merged part is mixed in: before the last one, at the latest."""
    return min(order.sync.delay, order.steps - 1) if order.goes_on else 0


def mix_in(order: Train, own: Iterable[Held], weights: torch.Tensor) -> None:
    """Mix what the round before merged into a site's own weights, in place, where they lie; ``weights`` are flat
    float32 of the whole model.

    A site that goes on has taken part in the round before, so `order.version` is at least 1.
    """
    first, last = order.sync.span(weights.numel(), order.version - 1)
    share = np.float32(order.sync.blend)
    rest = np.float32(1) - share
    for one in own:
        for each in one.between(first, last):
            mine, merged = each.value, each.of(weights)
            if share:
                mine.copy_(mine.float().cpu() * float(share) + merged * float(rest))
            else:
                mine.copy_(merged)  # which 0 times infinity, or a negative zero, would not leave as it is
