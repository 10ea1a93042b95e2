"""How a site's ranks take a step: in what precision, in how many pieces, with what kept and what bounded."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from atoll.spec.document import Document


class Compute(Document):
    """What changes the time and memory of a step but not its mathematics, `precision` and `clip` apart.

    precision: bfloat16 computes in 8 significant bits; weights, their gradients' sums and the optimiser stay float32.
    microbatches: a rank's share of a batch is taken in so many pieces, one after the other, and stepped on once. Of a
    pipeline they are what is under way in it at once; there they must be equally large.
    shares: measured cuts batches anew between rounds where a rank is slow, so that all end a step together; sums over
    other shares are rounded otherwise. even: always alike, so that a run done again gives the same bits.
    schedule: the order in which a pipeline's stages take them: GPipe (Huang et al., 2019), 1F1B (Narayanan et al.,
    2019), interleaved (Narayanan et al., 2021), zero_bubble (Qi et al., 2023).
    checkpointing: activations of a block are computed anew for its gradient instead of kept (Chen et al., 2016).
    clip: the most that the L2 norm of the whole model's gradient may be.
    compile: blocks are compiled by torch.compile.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    microbatches: PositiveInt = 1
    shares: Literal["measured", "even"] = "measured"
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    checkpointing: bool = False
    clip: PositiveFloat | None = None
    compile: bool = False
