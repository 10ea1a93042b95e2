"""What exists: sites, their machines and datasets, and the links between them, as measured."""

from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from atoll.spec.budget import Budget
from atoll.spec.document import Digest, Document, Name
from atoll.spec.plan import Layout
from atoll.spec.sandbox import Limits, Mode
from atoll.spec.wire import Wire

_CROWD = 4  # ranks that a device is shared by at most


class Device(Document):
    kind: Literal["cpu", "cuda"] = "cpu"
    flops: PositiveFloat = 1e10  # sustained float32 operations a second
    memory_bytes: PositiveInt = 1 << 30


class Node(Document):
    name: str = "node"
    devices: tuple[Device, ...] = (Device(),)


class Dataset(Document):
    """What a site tells about a dataset: its shape and terms, never a value out of it."""

    name: Name
    rows: NonNegativeInt
    bytes: NonNegativeInt = 0
    columns: dict[str, str] = {}  # column -> Arrow type
    fingerprint: Digest  # over the file's bytes
    purposes: tuple[str, ...] = ()  # what the owner grants it for
    until: dict[str, AwareDatetime] = {}  # when the grant for a purpose ends; the others have no end
    min_group: NonNegativeInt = 10  # groups of fewer rows are suppressed in query results
    wire: Wire = ()  # what each update made of it must pass through before it leaves, whatever its job says
    regions: tuple[str, ...] = ()  # where what is learned from it may go; none: anywhere
    budget: Budget | None = None  # what training on it may use of its privacy; none: runs need promise nothing

    def granted(self, at: float) -> tuple[str, ...]:
        """Return the purposes it is granted for at this time, in seconds since the epoch."""
        ended = self.ended(at)
        return tuple(purpose for purpose in self.purposes if purpose not in ended)

    def ended(self, at: float) -> tuple[str, ...]:
        """Return the purposes whose grants have ended by then."""
        return tuple(purpose for purpose, end in self.until.items() if end.timestamp() <= at)

    @model_validator(mode="after")
    def _what_ends_was_granted(self) -> Self:
        for purpose in self.until:
            if purpose not in self.purposes:
                raise ValueError(f"until: {purpose!r} is none of its purposes; grant it too, or remove it from until")
        return self


class Site(Document):
    """One owner's trust domain."""

    name: Name
    owner: str = "me"
    region: str = "here"
    nodes: tuple[Node, ...] = (Node(),)
    datasets: tuple[Dataset, ...] = ()

    @field_validator("name")
    @classmethod
    def _is_not_the_hub(cls, name: str) -> str:
        if name == "hub":  # whose rules a decision is by is told by this name
            raise ValueError("is the hub's own name; choose another")
        return name

    def dataset(self, name: str) -> Dataset | None:
        return next((dataset for dataset in self.datasets if dataset.name == name), None)

    @property
    def most_ranks(self) -> int:
        """How many ranks a layout may have here. Whoever pins one writes any number, and each rank is a process."""
        return _CROWD * sum(len(node.devices) for node in self.nodes)


class Executor(Document):
    """What starts a site's ranks: processes of its machine, or Ray actors on a cluster of its owner."""

    kind: Literal["local", "ray"] = Field(default="local", examples=["ray"])
    # HOST:PORT of Ray's head; local: one that the site starts
    address: str = Field(default="local", pattern=r"^(local|[^/\s]+:\d{1,5})$", examples=["10.0.0.7:6379"])
    cpus: PositiveFloat = 1.0  # that a rank takes of a Ray node
    gpus: NonNegativeFloat = 0.0
    labels: dict[str, Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$")]] = {}  # of its nodes
    silence: PositiveFloat = Field(default=2.0, le=600)  # seconds without a sign of life that make a rank a lost one
    sandbox: Mode = Field(default="on", examples=["off"])  # of ranks that are processes here; what Ray starts has none
    limits: Limits = Field(default=Limits(), examples=[{}])

    @model_validator(mode="after")
    def _only_ray_has_settings(self) -> Self:
        here = {"sandbox", "limits"}
        if self.kind == "local" and self.model_fields_set - {"kind", "silence", *here}:
            raise ValueError("address, cpus, gpus and labels are Ray's; add kind: ray, or remove them")
        if self.kind == "ray" and self.model_fields_set & here and (self.sandbox, self.limits) != ("off", Limits()):
            raise ValueError(
                "sandbox and limits: Ray's own processes start its ranks, and none of them is in a sandbox; remove "
                "kind: ray, or these"
            )
        return self


class SiteFile(Site):
    """A site's own document. How it starts its ranks is told to nobody."""

    executor: Executor = Executor()

    @model_validator(mode="after")
    def _several_nodes_have_ray(self) -> Self:
        if self.executor.kind == "local" and len(self.nodes) > 1:
            raise ValueError("nodes: ranks on several nodes are started by Ray; set executor: {kind: ray}, or name one")
        return self

    @property
    def told(self) -> Site:
        return Site.model_validate(self.model_dump(exclude={"executor"}, exclude_unset=True))


class Link(Document):
    """Measured between a site and the hub."""

    site: Name
    bandwidth: PositiveFloat = 1e9  # bytes per second
    latency: NonNegativeFloat = 1e-3  # seconds, one round trip


Degree = Literal["tensor", "pipeline", "context", "expert"]  # of a layout, that asks something of a model


class ModelShape(Document):
    """What of a model its layouts must divide and their prices hang on; 0 where it does not tell."""

    axes: Annotated[tuple[Degree, ...], Field(max_length=4)] = ()  # that the model carries a plan for
    layers: int = Field(default=0, ge=0, le=1 << 20)  # its blocks: members of its lists of modules
    heads: int = Field(default=0, ge=0, le=1 << 20)
    experts: int = Field(default=0, ge=0, le=1 << 20)
    positions: int = Field(default=0, ge=0, le=1 << 32)  # of an example, between two blocks
    width: int = Field(default=0, ge=0, le=1 << 32)  # numbers of each position there
    activation_bytes: int = Field(default=0, ge=0, le=1 << 50)  # that an example leaves for its gradient, in float32
    block_parameters: int = Field(default=0, ge=0, le=1 << 42)  # of all blocks
    tensor_parameters: int = Field(default=0, ge=0, le=1 << 42)  # that its tensor plan cuts
    expert_parameters: int = Field(default=0, ge=0, le=1 << 42)  # that its experts have


class Profile(Document):
    """What a site measured of a task before planning: a worker built the model and timed its training step."""

    parameters: int = Field(ge=0, le=1 << 42)
    step_seconds: float = Field(gt=0, le=1e6)  # one inner step at the job's batch size, under `layout`
    memory_bytes: int = Field(default=0, ge=0, le=1 << 50)  # the most that a worker held then; 0: it took no step
    gradients: bool = True  # False: an `ArraysTask`, which steps by itself in one process
    layout: Layout = Layout()
    shape: ModelShape = ModelShape()


class Reach(Document):
    """Where sites reach the hub: the address its port is bound to, and the names or addresses by which they dial it."""

    host: str = Field(default="127.0.0.1", examples=["127.0.0.1"])
    port: int = Field(default=0, ge=0, le=65535)  # 0: the one of last time, or a free one
    names: tuple[str, ...] = ()
    region: str = "here"  # where the hub is, as it tells its sites

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, host: str) -> str:
        try:
            return str(ip_address(host))
        except ValueError:
            raise ValueError("must be an address of this machine; set host: 0.0.0.0 and give names to dial") from None


class Fleet(Document):
    sites: tuple[Site, ...] = Field(default=())
    links: tuple[Link, ...] = ()

    def site(self, name: str) -> Site | None:
        return next((site for site in self.sites if site.name == name), None)

    def link(self, site: str) -> Link:
        return next((link for link in self.links if link.site == site), Link(site=site))

    def holding(self, dataset: str) -> tuple[Site, ...]:
        """Return the sites that have a dataset of this name."""
        return tuple(site for site in self.sites if site.dataset(dataset) is not None)
