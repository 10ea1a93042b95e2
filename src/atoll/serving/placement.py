"""What the hub tells a replica when it starts one, and what the replica says back: one JSON line each way."""

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


def no_port(port: int, error: OSError) -> str:
    """Return the words for a port that cannot be had."""
    return f"port: {port} cannot be had ({error.strerror}); stop what holds it, or take port: 0 for a free one"


class Ready(Document):
    """The replica answers, or `failed` says why it does not."""

    failed: str | None = None
