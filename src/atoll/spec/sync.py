"""How sites agree, as a document: one point of the outer space, and which coordinates do not go together."""

from typing import Any, Literal, Self, cast

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from atoll.spec.document import Document, near_miss
from atoll.spec.model import Patterns
from atoll.spec.presets import PRESETS, overlay
from atoll.spec.secret import MOST, fewest
from atoll.spec.wire import Wire, noised


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


Rule = Literal["mean", "weighted_mean", "median", "trimmed_mean", "multi_krum", "geometric_median"]


class Bound(Document):
    """How long an update may be: the hub scales a longer one down to this L2 norm before it is merged.

    It clips and does not refuse, so that an honest site with a steep round still counts (Sun et al., 2019). A clip on
    the wire is done by the site, and a hostile site does none. norm: so much. times: so often the median norm of the
    round's updates (of an even number the lower of the middle two), which asks for no guess.
    """

    norm: PositiveFloat | None = None
    times: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.norm is None) == (self.times is None):
            raise ValueError("a bound is a norm or so many times the median norm; set norm: 1.0, or times: 1.0")
        return self


class Sync(Document):
    """How sites agree: one point of the outer space. The named algorithms are presets of this document."""

    preset: str | None = None  # the name it was made from, kept for the reader
    exchange: Literal["gradient", "delta"] = "delta"
    period: PositiveInt = 1  # inner steps between two exchanges of the whole model: a round, or `fragments` of them
    seconds: PositiveFloat | None = None  # a round ends after so many, with at least one step, before `period` steps
    wait: Wait = Wait()
    merge: Rule = "weighted_mean"
    trim: float = Field(default=0.1, ge=0, lt=0.5)  # trimmed_mean: the share cut off at each end
    hostile: NonNegativeInt | None = None  # multi_krum: how many of the sites may be
    bound: Bound | None = None  # of each update's norm, before all else
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
        return overlay(PRESETS[name], table)

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

    @property
    def robust(self) -> bool:
        """Whether the merge is one that some hostile sites cannot move far."""
        return self.merge not in ("mean", "weighted_mean")

    @property
    def compares(self) -> bool:
        """Whether what an update counts for depends on the others of its round."""
        return self.robust or (self.bound is not None and self.bound.times is not None)

    @property
    def singles(self) -> str | None:
        """Return why the hub must see each update by itself, and no sum on the way may stand for several; or None."""
        if self.masked:
            return "wire: mask is taken off the sum of all sites, and not of some"
        return _hidden_by_sums(self)

    @property
    def masked(self) -> bool:
        """Whether the hub sees the sum of the sites' updates, and no single one."""
        return any(step.kind == "mask" for step in self.wire)

    def unfit(self, sites: int) -> str | None:
        """Return what is wrong where a round may have the updates of so many sites, and the mend, or None.

        Of 2f + 3 updates f may be hostile (Blanchard et al., 2017); three are the first to have a middle.
        """
        least = 2 * (self.hostile or 0) + 3
        if self.masked and sites > MOST:
            return f"wire: mask: {sites} sites are too many for one sum, which {MOST} may share; ask fewer"
        if self.masked and sites < least:
            return f"wire: mask hides an update among 3 or more, and a round may have {sites}; remove it or ask more"
        if self.masked and self.wait.count is not None and self.wait.count < fewest(sites):
            return (
                f"wait.count: {self.wait.count} of {sites} sites: a sum that hides each one's update is of "
                f"{fewest(sites)} at least; raise it to {fewest(sites)}"
            )
        if not self.compares or sites >= least:
            return None
        mend = f"lower hostile to {(sites - 3) // 2}" if sites >= 3 else _UNCOMPARED[self.robust]
        return f"{_comparing(self)}: needs {least} updates to tell which are odd, and a round may have {sites}; {mend}"

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
        if found := next((step.kind for step in self.down if step.kind in ("clip", "noise", "mask")), None):
            raise ValueError(f"down: {found} is of a site's update, and this is the hub's step; remove it")
        return self

    @model_validator(mode="after")
    def _control_is_counted_once(self) -> Self:
        if self.control and (words := _beyond_control(self)):
            raise ValueError(words)
        return self

    @model_validator(mode="after")
    def _the_odd_one_can_be_told(self) -> Self:
        if words := _beyond_robust(self):
            raise ValueError(words)
        return self

    def parts(self, sites: int) -> int:
        """Return into how many parts the noise of a round of so many sites is cut: under masks, into as many as sites
        are in its sum at least."""
        return (self.wait.count or sites) if self.masked else 1

    @model_validator(mode="after")
    def _sums_hide_their_terms(self) -> Self:
        words = (self.masked and _beyond_mask(self)) or (noised(self.wire) and _beyond_noise(self))
        if words:
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


def _hidden_by_sums(sync: Sync) -> str | None:
    """Return which coordinate needs single updates, and the mend, or None."""
    if sync.robust:
        return f"merge: {sync.merge}: compares single updates, which a sum hides; use merge: mean"
    if sync.bound is not None:
        return "bound: is of single updates, which a sum hides; remove it, and clip on the wire"
    if sync.control:
        return "control: variates are counted one by one, which a sum hides; set control: false"
    return None


def _beyond_noise(sync: Sync) -> str | None:
    """Return which coordinate does not go with noise on the wire, and the mend."""
    if sync.merge == "weighted_mean":
        return "wire: noise is for sites that count alike, and merge: weighted_mean weighs them; use merge: mean"
    if sync.control:
        return "wire: noise: would part what hub and sites must count alike of control variates; set control: false"
    return None


def _beyond_mask(sync: Sync) -> str | None:
    """Return which coordinate does not go with masks on the wire, and the mend."""
    if sync.wait.kind == "buffer":
        return "wire: mask is of the sites of one round, and a buffer's are of several; use wait: quorum"
    return _hidden_by_sums(sync)


_UNCOMPARED = {True: "use merge: mean", False: "set bound.norm"}


def _comparing(sync: Sync) -> str:
    return f"merge: {sync.merge}" if sync.robust else "bound.times"


def _beyond_robust(sync: Sync) -> str | None:
    """Return which coordinate does not go with a robust merge or a bound, and the mend."""
    if sync.merge == "multi_krum" and sync.hostile is None:
        return "merge: multi_krum: needs to know how many sites may be hostile; set hostile: 1"
    if sync.merge != "multi_krum" and sync.hostile is not None:
        return f"hostile: {sync.hostile}: is of merge: multi_krum, and {sync.merge} takes none; remove it"
    if sync.bound is not None and sync.merge == "weighted_mean":
        return "bound: merge: weighted_mean weighs by what a site says of itself, which nothing bounds; use merge: mean"
    if sync.bound is not None and sync.control:
        return "bound: would cut off what hub and sites must count alike of control variates; remove one of them"
    if sync.compares and sync.wait.kind == "buffer":
        return f"{_comparing(sync)}: compares the updates of one round, and a buffer's are of several; use wait: quorum"
    return sync.unfit(sync.wait.count) if sync.wait.count is not None else None
