"""What came out: a model version with its lineage, and where it answers."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from atoll.spec.document import Digest, Document, Label, Name


class TensorSpec(Document):
    """Name and shape of one float32 tensor; a model's tensors, in order, make one flat vector."""

    name: Label
    shape: Annotated[tuple[NonNegativeInt, ...], Field(max_length=16)]

    @property
    def size(self) -> int:
        size = 1
        for extent in self.shape:
            size *= extent
        return size


Signature = Annotated[tuple[TensorSpec, ...], Field(max_length=100_000)]


class Moments(Document):
    """Pooled statistics of one column over all sites' training rows, with missing values left out."""

    count: NonNegativeInt
    mean: float
    std: float  # population standard deviation; 1.0 where the column is constant


class Bundle(Document):
    """The user's code as it travels: file name -> source text. Its digest is what policies approve."""

    files: dict[str, str]


class Source(Document):
    """One dataset a model saw: where, and exactly which bytes."""

    site: Name
    dataset: Name
    fingerprint: Digest
    rows: NonNegativeInt


class Lineage(Document):
    """Where a model came from: model <- run <- plan <- job, code, data, decisions."""

    run: Name
    job: Digest
    plan: Digest
    code: Digest
    sources: tuple[Source, ...] = ()
    decisions: tuple[str, ...] = ()  # the policy decisions that let it happen, in words
    parents: tuple[str, ...] = ()  # name@version of models it started from


class Model(Document):
    """A version in the registry. The weights are a safetensors blob under `weights`."""

    name: Name
    version: PositiveInt
    weights: Digest
    code: Digest
    task: str  # class name in the bundle
    file: str  # file of the bundle that holds the class
    params: dict[str, JsonValue] = {}
    signature: Signature
    columns: dict[str, str] = {}  # Arrow types of the rows it was trained on, which a request's rows follow
    statistics: dict[str, Moments] = {}
    metrics: dict[str, float] = {}
    lineage: Lineage

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


class Deployment(Document):
    """Where a model answers."""

    name: Name
    model: str  # name@version
    port: NonNegativeInt = 0  # 0: a free one
    host: Literal["127.0.0.1"] = "127.0.0.1"  # loopback only until identity exists
    max_batch: PositiveInt = 32
    queue: PositiveInt = 256  # requests waiting; one more is answered 429
