"""How a train job asks for differential privacy of single rows, and what a site's workers do for it."""

from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from atoll.spec.budget import Accountant
from atoll.spec.compute import Compute
from atoll.spec.document import Document
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync

AT_ONCE = 2  # expected batches whose examples a private step takes at once: a larger batch comes rarely, in pieces


class Privacy(Document):
    """What a train job promises about each row of each dataset it trains on, by DP-SGD (Abadi et al., 2016).

    Each site finds the noise for its own rows: a row lies at one site only, so what one site's steps cost costs no
    other's. With `noise` it is given, and the epsilon follows.
    """

    clip: PositiveFloat = 1.0  # the most that one example's gradient may weigh in a step, as an L2 norm
    epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # of the whole run, at each dataset
    noise: float | None = Field(default=None, ge=0.2, le=1e6)  # a step's standard deviation over `clip`
    delta: float = Field(gt=0, lt=1)  # below one over the number of rows
    accountant: Accountant = "pld"

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.epsilon is None) == (self.noise is None):
            raise ValueError("privacy is an epsilon or the noise that is to be added; set epsilon: 4.0, or noise: 1.1")
        return self


class PrivateSteps(Document):
    """How a site's workers take their steps: each row is in a batch with chance `sampling`, by itself.

    Each example's gradient is scaled to a norm of at most `clip`, they are added up, noise of standard deviation
    `multiplier * clip` is added to each number once, and the sum is divided by `sampling * rows`: the examples of a
    batch as one expects them, for how many they are in truth tells of the rows.
    """

    clip: PositiveFloat
    multiplier: float = Field(ge=0.2, le=1e6)
    sampling: float = Field(gt=0, le=1)
    rows: PositiveInt  # that are trained on, one example of each

    @property
    def expected(self) -> int:
        """How many examples a batch has, to the nearest whole one: what a site says of it."""
        return max(1, round(self.sampling * self.rows))


def beyond_private(sync: Sync, layout: Layout, compute: Compute) -> str | None:
    """Return which coordinate private steps do not go with, and the mend; None where they go with all of them."""
    if sync.exchange == "gradient":
        return "sync.exchange: gradient: sums what is not clipped example by example; use delta, as preset: fedavg does"
    if sync.control:
        return "sync.control: variates are of gradients without noise; set control: false"
    if layout.ranks > 1:
        return f"layout: {layout.ranks} ranks, and the noise of a step is drawn by one; set layout: {{data: 1}}"
    if compute.precision != "float32":
        return f"compute.precision: {compute.precision}: gradients are clipped one by one in float32; set float32"
    if compute.compile:
        return "compute.compile: hides the layers whose gradients are clipped one by one; set compile: false"
    if compute.checkpointing:
        return "compute.checkpointing: computes a layer twice, and its examples' gradients with it; set it to false"
    return None
