"""A model to deploy: y = 2x + 1 in a store, and the code that answers with it."""

from pathlib import Path

import numpy as np

from atoll.registry.blobs import Blobs
from atoll.registry.weights import save
from atoll.spec.document import sha256
from atoll.spec.model import Lineage, Model, TensorSpec


def answering(home: Path, code: str) -> tuple[Model, Path, Path]:
    """Return the document of a model of the task `Risk` in this code, the folder of its bundle, and its weights."""
    bundle = home / "bundle"
    bundle.mkdir()
    (bundle / "task.py").write_text(code)
    signature = (TensorSpec(name="weight", shape=(1, 1)), TensorSpec(name="bias", shape=(1,)))
    blobs = Blobs(home / "blobs")
    weights = blobs.put(save(np.array([2, 1], np.float32), signature))
    model = Model(
        name="heart",
        version=1,
        weights=weights,
        code=sha256(b"code"),
        task="Risk",
        file="task.py",
        signature=signature,
        lineage=Lineage(run="run-1", job=sha256(b"j"), plan=sha256(b"p"), code=sha256(b"code")),
    )
    return model, bundle, blobs.local(weights)
