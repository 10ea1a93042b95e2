"""What was decided: an inner layout per site, one outer sync, its price, and why."""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from atoll.spec.document import Document, Name, near_miss
from atoll.spec.model import Patterns


class Layout(Document):
    """How one site computes: the degrees of its device mesh. Their product is the number of ranks.

    data: whole models, each with its share of a batch. shard: shares of a batch, too, but each rank keeps a part of
    every tensor only. tensor: matrices cut within a layer. pipeline: layers in stages. context: positions of a
    sequence. expert: a mixture's experts, which tokens travel to; here, too, each rank has its share of a batch.
    """

    data: PositiveInt = 1
    shard: PositiveInt = 1
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1

    @property
    def ranks(self) -> int:
        return self.shares * self.tensor * self.pipeline * self.context

    @property
    def shares(self) -> int:
        """Into how many shares a batch is cut: the ranks of a share see the same examples."""
        return self.data * self.shard * self.expert

    @property
    def plain(self) -> bool:
        """Whether each rank holds the whole model, which is all that data parallelism asks of one."""
        return self.ranks == self.data

    @property
    def fewer(self) -> "Layout | None":
        """The next smaller layout, for a site that has not as many ranks any more; None of one rank.

        It cuts nothing that this one leaves whole, and what it cuts divides what it is cut from, as this one does.
        """
        for axis in ("data", "shard"):  # any number of these will do
            if (degree := getattr(self, axis)) > 1:
                return self.model_copy(update={axis: degree - 1})
        for axis in ("expert", "context", "tensor", "pipeline"):
            if (degree := getattr(self, axis)) > 1:
                prime = next(number for number in range(2, degree + 1) if degree % number == 0)
                return self.model_copy(update={axis: degree // prime})
        return None


class Outer(Document):
    """The optimiser that turns the merged update into the next version.

    sgd: Nesterov or heavy-ball momentum as in torch.optim.SGD. adam, yogi, adagrad: FedOpt (Reddi et al., 2021),
    with bias correction so that exchanged gradients with `adam` are exactly centralised Adam.
    """

    kind: Literal["sgd", "adam", "yogi", "adagrad"] = "sgd"
    rate: PositiveFloat = 1.0
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0; set momentum: 0.9")
        return self


class Transform(Document):
    """One step of what the agent does to an update before it leaves, in the order of `ORDER`; all but clip once.

    clip: scale the whole update to an L2 norm of at most `value`.
    topk: of each chunk, keep the `share` of elements that are largest in magnitude; the others are sent as nothing.
    bfloat16, int8, int4: round each number: to 8 significant bits, to 127 steps a side per block of 1024, to 7 steps
    a side per block of 64. The stated errors are in `atoll.outer.formats`.
    zstd: compress without loss, at `level` (1 when left out).

    `feedback`, of what loses something: the site adds what was lost to its next update (Seide et al., 2014).
    """

    kind: Literal["clip", "topk", "bfloat16", "int8", "int4", "zstd"]
    value: PositiveFloat | None = None
    share: float | None = Field(default=None, gt=0, lt=1)
    level: int | None = Field(default=None, ge=1, le=19)
    feedback: bool = True

    @property
    def lossy(self) -> bool:
        return self.kind in ("topk", "bfloat16", "int8", "int4")

    @model_validator(mode="after")
    def _fields_of_its_kind(self) -> Self:
        if self.kind == "clip" and self.value is None:
            raise ValueError("clip needs a bound; set value: 1.0")
        if self.kind == "topk" and self.share is None:
            raise ValueError("topk needs the share to keep; set share: 0.01")
        for field, owner in (("value", "clip"), ("share", "topk"), ("level", "zstd")):
            if self.kind != owner and getattr(self, field) is not None:
                raise ValueError(f"{self.kind} takes no {field}; remove it")
        if not self.feedback and not self.lossy:
            raise ValueError(f"{self.kind} has nothing to feed back; remove feedback")
        return self


ORDER = (("clip",), ("topk",), ("bfloat16", "int8", "int4"), ("zstd",))  # of the wire: at most one of each, and clips


def disorder(wire: tuple[Transform, ...]) -> str | None:
    """Return what is wrong with the order of transforms, and the mend; None for an order that can be carried out."""
    rank = {kind: place for place, kinds in enumerate(ORDER) for kind in kinds}
    for before, after in pairwise(step.kind for step in wire):
        if rank[before] > rank[after]:
            return f"{after} cannot follow {before}; put {after} before {before}"
        if rank[before] == rank[after] and before != "clip":
            return f"{after} follows {before}, and a wire takes one of {', '.join(ORDER[rank[after]])}; remove one"
    return None


def _in_order(wire: tuple[Transform, ...]) -> tuple[Transform, ...]:
    if words := disorder(wire):
        raise ValueError(words)
    return wire


Wire = Annotated[tuple[Transform, ...], AfterValidator(_in_order)]


class Wait(Document):
    """Whom a round waits for.

    all: every site of the run. quorum: once `deadline` seconds have passed, `count` sites are enough.
    buffer: `count` updates, from whoever sends them first (asynchronous, FedBuff); an update that is s versions
    old weighs 1/(1+s)**`staleness`. A round that `patience` seconds could not settle fails the run.
    Under quorum and buffer the stages around the rounds go on after `deadline`, too: statistics with `count` sites, the
    first weights with another site's, metrics with one site; the result names who did not answer. A site whose task
    fails sits the stage out, and the run fails once fewer than `count` are left.
    """

    kind: Literal["all", "quorum", "buffer"] = "all"
    count: PositiveInt | None = None
    deadline: PositiveFloat = 30.0
    patience: PositiveFloat = 600.0
    staleness: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _count_where_needed(self) -> Self:
        if self.kind != "all" and self.count is None:
            raise ValueError(f"{self.kind} needs a count of sites; set count: 2")
        if self.kind == "all" and self.count is not None:
            raise ValueError("all waits for every site; remove count, or use kind: quorum")
        return self


class Sync(Document):
    """How sites agree: one point of the outer space. The named algorithms are presets of this document."""

    preset: str | None = None  # the name it was made from, kept for the reader
    exchange: Literal["gradient", "delta"] = "delta"
    period: PositiveInt = 1  # inner steps between two exchanges of the whole model: a round, or `fragments` of them
    seconds: PositiveFloat | None = None  # a round ends after so many, with at least one step, before `period` steps
    wait: Wait = Wait()
    merge: Literal["mean", "weighted_mean", "median", "trimmed_mean"] = "weighted_mean"
    trim: float = Field(default=0.1, ge=0, lt=0.5)  # trimmed_mean: the share cut off at each end
    outer: Outer = Outer()
    wire: Wire = ()  # of an update on its way up
    down: Wire = ()  # of the hub's step on its way down, which then is the step that is taken everywhere
    fragments: PositiveInt = 1  # contiguous parts of the model, exchanged in turn, one every `period / fragments` steps
    delay: NonNegativeInt = 0  # inner steps that a site goes on with while an exchange is under way
    blend: float = Field(default=0.0, ge=0, lt=1)  # the share of a site's own weights that stay when a part comes in
    proximal: float = Field(default=0.0, ge=0)  # FedProx mu: pulls each site's steps towards the round's start
    keep_optimiser: bool = False  # keep the inner optimiser's state from round to round (DiLoCo does)
    control: bool = False  # SCAFFOLD's control variates, exchanged beside the weights (Karimireddy et al., 2020)
    keep_local: Patterns = ()  # tensors of these names never leave their site; each trains its own (FedPer, FedBN)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"preset": data}
        if not isinstance(data, dict):
            return data
        table = cast("dict[str, Any]", data)
        name = table.get("preset")
        if name is None:
            return table
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}{near_miss(str(name), list(PRESETS))}")
        return _overlay(PRESETS[name], table)

    @property
    def streaming(self) -> bool:
        """Whether a site's own weights live on from round to round, with only the merged part mixed into them."""
        return self.fragments > 1 or self.delay > 0 or self.blend > 0

    @property
    def stride(self) -> int:
        """Inner steps of a round: between two exchanges, of whatever part of the model."""
        return self.period // self.fragments

    def span(self, size: int, version: int) -> tuple[int, int]:
        """Return which elements of a model of ``size``, from and up to, the round from ``version`` exchanges."""
        part = version % self.fragments
        return part * size // self.fragments, (part + 1) * size // self.fragments

    @model_validator(mode="after")
    def _parts_take_turns(self) -> Self:
        if self.period % self.fragments:
            raise ValueError(
                f"period: {self.period}: must be a multiple of fragments ({self.fragments}), which take turns in it; "
                f"set period: {self.fragments * (self.period // self.fragments + 1)}"
            )
        if self.delay >= self.stride:
            raise ValueError(f"delay: {self.delay}: must be below the {self.stride} steps between two exchanges")
        if self.streaming and self.wait.kind == "buffer":
            raise ValueError(
                "wait: buffer: merges updates of several rounds, which here are of other parts; use quorum"
            )
        if self.streaming and self.exchange == "gradient":
            raise ValueError("exchange: gradient: steps outside only, so nothing can go on meanwhile; use delta")
        if self.streaming and not self.keep_optimiser:
            raise ValueError(
                "fragments, delay, blend: a site's weights go on from round to round, and so must its optimiser's "
                "state; set keep_optimiser: true"
            )
        if self.streaming and self.proximal:
            raise ValueError(
                f"proximal: {self.proximal:g}: pulls to the round's start, which is not there yet when a site goes on; "
                "set it to 0, or fragments to 1, delay and blend to 0"
            )
        if any(step.kind == "clip" for step in self.down):
            raise ValueError("down: clip bounds a site's update, and this is the hub's step; remove it")
        return self

    @model_validator(mode="after")
    def _control_is_counted_once(self) -> Self:
        if self.control and (words := _beyond_control(self)):
            raise ValueError(words)
        return self

    @model_validator(mode="after")
    def _time_ends_within_patience(self) -> Self:
        if self.seconds is not None and self.seconds >= self.wait.patience:
            raise ValueError(
                f"seconds: {self.seconds:g}: a round fails after wait.patience ({self.wait.patience:g}); raise that one"
            )
        if self.seconds is not None and self.streaming:
            raise ValueError("seconds: fragments take turns by steps; set fragments to 1, delay and blend to 0")
        return self

    @model_validator(mode="after")
    def _what_stays_steps_inside(self) -> Self:
        if self.keep_local and self.exchange == "gradient":
            raise ValueError("keep_local: exchange: gradient steps outside only, and so never what stays; use delta")
        if self.keep_local and self.streaming:
            raise ValueError("keep_local: goes with whole rounds only; set fragments to 1, delay and blend to 0")
        return self

    @model_validator(mode="after")
    def _gradients_step_outside(self) -> Self:
        if self.exchange == "gradient" and self.proximal:
            raise ValueError("proximal pulls local steps, and exchange: gradient takes none; use exchange: delta")
        return self


def _beyond_control(sync: Sync) -> str | None:
    """Return which other coordinate control variates cannot go with, and the mend: the hub's is the mean of the sites'
    as long as each of their changes is added in whole, once, and to the version that it was made from."""
    if sync.exchange == "gradient":
        return "control bends local steps, and exchange: gradient takes none; use exchange: delta"
    if sync.wait.kind == "buffer":
        return "control needs each site's last change to be counted before its next, and a buffer may not; use quorum"
    if sync.streaming:
        return "control belongs to the weights of a whole round; set fragments to 1, delay and blend to 0"
    if sync.merge != "mean":
        return f"control: the hub's is the mean of the sites', where merge: {sync.merge} has another; use merge: mean"
    if any(step.kind == "clip" for step in sync.wire):
        return "control: clip cuts off what hub and sites must count alike; remove it from the wire"
    if any(step.lossy and not step.feedback for step in (*sync.wire, *sync.down)):
        return "control: without feedback what the wire loses would part hub and sites for good; remove feedback: false"
    return None


def _overlay(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _overlay(cast("dict[str, Any]", below), cast("dict[str, Any]", value)) if both else value
    return merged


_FEDOPT = {"rate": 0.03, "beta2": 0.99, "epsilon": 1e-3}

# Famous names for points of the space: each line is all there is to it.
PRESETS: dict[str, dict[str, Any]] = {
    "data_parallel": {"exchange": "gradient", "period": 1, "outer": {"rate": 0.1}},
    "parameter_server": {
        "exchange": "gradient",
        "period": 1,
        "wait": {"kind": "buffer", "count": 1},
        "outer": {"rate": 0.1},
    },
    "fedavg": {"period": 10},  # McMahan et al., 2017
    "fedavgm": {"period": 10, "outer": {"momentum": 0.9}},  # Hsu et al., 2019
    "fedprox": {"period": 10, "proximal": 0.01},  # Li et al., 2020
    "fedadam": {
        "period": 10,
        "outer": {"kind": "adam", **_FEDOPT},
    },  # Reddi et al., 2021
    "fedyogi": {
        "period": 10,
        "outer": {"kind": "yogi", **_FEDOPT},
    },  # Reddi et al., 2021
    "fedbuff": {"period": 10, "wait": {"kind": "buffer", "count": 2}},  # Nguyen et al., 2022
    "scaffold": {"period": 10, "merge": "mean", "control": True},  # Karimireddy et al., 2020
    "diloco": {  # Douillard et al., 2023
        "period": 50,
        "merge": "mean",
        "outer": {"rate": 0.7, "momentum": 0.9, "nesterov": True},
        "keep_optimiser": True,
    },
    "streaming_diloco": {  # Douillard et al., 2025
        "period": 48,
        "fragments": 4,
        "delay": 5,
        "blend": 0.5,
        "merge": "mean",
        "outer": {"rate": 0.7, "momentum": 0.9, "nesterov": True},
        "keep_optimiser": True,
    },
}


class Price(Document):
    """What a candidate is predicted to cost, by the stated model in `atoll.planner.price`."""

    seconds: float
    compute_seconds: float
    transfer_seconds: float
    bytes: int  # over all links and rounds, both ways
    memory_bytes: int  # of the largest rank


class Reason(Document):
    """Why a candidate was chosen or rejected: by whom or what, and in words."""

    by: str  # "policy of zurich (rule hospital.no-rows)", "price", "the job", "capability"
    words: str


class Candidate(Document):
    """One point that was considered."""

    name: str  # "gather the data", "exchange every step", "fedavg, period 20"
    sync: Sync | None = None  # None: rows would move to one place
    layouts: dict[Name, Layout] = {}
    price: Price | None = None
    rejected: tuple[Reason, ...] = ()


class Plan(Document):
    """How a run will be carried out. `sites` train in this order; `evaluators` hold examples to evaluate on."""

    sites: tuple[Name, ...]
    evaluators: tuple[Name, ...] = ()
    initialiser: Name | None = None  # the site that builds the first weights; the first of `sites` when left out
    layouts: dict[Name, Layout]
    sync: Sync
    rounds: int = Field(ge=0)
    price: Price | None = None
    reasons: tuple[Reason, ...] = ()
    considered: tuple[Candidate, ...] = ()
