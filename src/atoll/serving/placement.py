"""What the hub tells a replica when it starts one, and what the replica says back: one JSON line each way."""

from typing import Self

from pydantic import NonNegativeInt, model_validator

from atoll.spec.document import Document
from atoll.spec.model import Deployment, Model
from atoll.spec.pretrained import Pretrained


class Placement(Document):
    """One model to answer with. The paths are this machine's own, already verified by whoever wrote them."""

    deployment: Deployment
    model: Model
    bundle: str  # folder of the model's code
    weights: str  # safetensors file
    columns: dict[str, str] = {}  # column -> Arrow type of the dataset it was trained on
    pretrained: Pretrained | None = None  # what the model names by digest, where it lies on this machine


class Ready(Document):
    """The replica answers at `url`, or `failed` says why it does not."""

    url: str | None = None
    pid: NonNegativeInt = 0
    failed: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.url is None) == (self.failed is None):
            raise ValueError("needs either a url or a failure")
        return self
