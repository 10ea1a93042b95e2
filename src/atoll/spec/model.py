"""What came out: a model version with its lineage, and where it answers."""

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, StringConstraints

from atoll.errors import Invalid
from atoll.spec.budget import NO_PROMISE, Guarantee, stated
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
_CONTROL, _LONGEST, _MOST = "control.", 128, 50_000  # what comes before a name, a Label's length, half a signature


def elements(signature: Signature) -> int:
    """Return how long the vector is that these tensors make."""
    return sum(spec.size for spec in signature)


def with_control(signature: Signature) -> Signature:
    """Return the signature of a model's weights with, behind them, control variates of the same shapes.

    Raises `Invalid` for more tensors than that leaves room for, and for a name that cannot be made a control's.
    """
    if len(signature) > _MOST:
        raise Invalid(f"signature: {len(signature):,} tensors where {_MOST:,} have room for their control; stack some")
    taken = {spec.name for spec in signature}
    for spec in signature:
        name = _CONTROL + spec.name
        if name in taken or len(name) > _LONGEST:
            raise Invalid(f"tensor {spec.name}: {name}, the name of its control, is taken or too long; rename it")
    return (*signature, *(TensorSpec(name=_CONTROL + spec.name, shape=spec.shape) for spec in signature))


def without_control(signature: Signature) -> Signature:
    """Return the signature that `with_control` was given; raise `Invalid` for one that it never returned."""
    half = signature[: len(signature) // 2]
    if with_control(half) != signature:
        raise Invalid("signature: control variates must follow the weights, one for each of their tensors, in order")
    return half


# Of tensors' names: `*` is any text, `?` any character, `[ab]` one of these. They are told to other parties, too.
Pattern = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.*?!\[\]-]{1,128}$")]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=100)]


def fits(name: str, patterns: Patterns) -> bool:
    """Tell whether a tensor's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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


class Promised(Document):
    """What the run that made a model promises about one dataset that it was trained on; without one it has none."""

    site: Name
    dataset: Name
    guarantee: Guarantee | None = None


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
    pretrained: Digest | None = None  # the files it needs besides its own weights, wherever it is used
    signature: Signature
    keep_local: Patterns = ()  # tensors of these names are not in it: each site of its run keeps its own
    columns: dict[str, str] = {}  # Arrow types of the rows it was trained on, which a request's rows follow
    statistics: dict[str, Moments] = {}
    metrics: dict[str, float] = {}
    promises: tuple[Promised, ...] = ()  # of each site whose updates are in it
    lineage: Lineage

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"

    def stated(self, brief: bool = False) -> tuple[str, ...]:
        """Return what of privacy its run promises, in words: a line for the sites that are promised the same."""
        return stated({one.site: one.guarantee for one in self.promises}, brief) or (NO_PROMISE,)


class Deployment(Document):
    """Where a model answers."""

    name: Name
    model: str  # name@version
    port: NonNegativeInt = 0  # 0: a free one
    host: Literal["127.0.0.1"] = "127.0.0.1"  # loopback only until identity exists
    max_batch: PositiveInt = 32
    queue: PositiveInt = 256  # requests waiting; one more is answered 429


class Aliased(Document):
    """A version has a name from now on, which another may have had before."""

    kind: Literal["model.aliased"] = "model.aliased"
    model: Name
    alias: Name
    version: PositiveInt
    user: str


class Erased(Document):
    """A version's weights are gone, or go now, and with them its aliases. The record of how it came to be stays."""

    kind: Literal["model.erased"] = "model.erased"
    model: Name
    version: PositiveInt
    user: str


class Deployed(Document):
    kind: Literal["deployment.started"] = "deployment.started"
    deployment: Deployment
    user: str


class Undeployed(Document):
    kind: Literal["deployment.stopped"] = "deployment.stopped"
    name: Name
    user: str


ModelEvent = Aliased | Erased | Deployed | Undeployed
