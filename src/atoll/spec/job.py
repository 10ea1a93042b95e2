"""What is asked: the document a user submits."""

import secrets
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, JsonValue, PositiveFloat, PositiveInt, model_validator

from atoll.errors import Invalid
from atoll.spec.compute import Compute
from atoll.spec.document import Digest, Document, Name, near_miss, parse
from atoll.spec.plan import Layout
from atoll.spec.privacy import Privacy, beyond_private
from atoll.spec.sweep import Parameters, Sweep, placed
from atoll.spec.sync import Sync


class TaskRef(Document):
    """The user's Python: a file beside the job document and the class in it that follows `atoll.spec.task.Task`."""

    file: str
    name: str
    params: dict[str, JsonValue] = {}  # keyword arguments of the class
    pretrained: Digest | None = None  # a model's files that each site has: the class gets them as its `pretrained`


class Data(Document):
    """Which examples: a dataset by name, at every site that has it unless `sites` names some."""

    dataset: Name
    sites: tuple[Name, ...] | None = None
    holdout: float = Field(default=0.2, ge=0, lt=1)  # share of the rows kept for evaluation, drawn by `seed`
    statistics: tuple[str, ...] = ()  # numeric columns whose count, sum and sum of squares the sites pool first
    evaluate: tuple[Name, ...] | None = None  # sites that evaluate; by default each one that has the dataset


class Optimiser(Document):
    """The inner optimiser, as in torch.optim."""

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    rate: PositiveFloat = 0.1
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)


class _Asked(Document):
    name: Name
    purpose: str  # what the data are used for; owners grant datasets by purpose
    project: Name = "default"  # whose quotas its runs count against


class TrainJob(_Asked):
    """Train a task's model and register it under `model` (by default the job's name)."""

    kind: Literal["train"] = "train"
    task: TaskRef
    data: Data
    model: Name | None = None
    steps: PositiveInt = 100  # inner steps at each site
    batch: PositiveInt = 32  # examples of one inner step at one site, over all its ranks
    optimiser: Optimiser = Optimiser()
    seed: int = Field(default=0, ge=0)
    sync: Sync | None = None  # pins the outer sync; left out, the planner chooses
    layout: Layout | None = None  # pins the inner layout of every site
    compute: Compute = Compute()
    privacy: Privacy | None = None  # of each row: clipped and noised gradients, which the sites' owners account for
    sweep: Sweep | None = None  # searches for the best values of some of these fields

    @model_validator(mode="after")
    def _batch_has_its_shares(self) -> Self:
        shares = self.layout.shares if self.layout is not None else 1
        if self.batch < shares:
            raise ValueError(
                f"batch: {self.batch}: the layout's data x shard x expert make {shares} shares, and each needs an "
                f"example; set batch: {shares}"
            )
        return self

    @model_validator(mode="after")
    def _private_steps_can_be_taken(self) -> Self:
        if self.privacy is not None:
            words = beyond_private(self.sync or Sync(), self.layout or Layout(), self.compute)
            if words:
                raise ValueError(f"privacy: does not go with {words}")
        return self

    @model_validator(mode="after")
    def _each_trial_is_a_job(self) -> Self:
        for values in self.sweep.corners() if self.sweep is not None else ():
            self.trial(values)
        return self

    def trial(self, values: Parameters) -> "TrainJob":
        """Return the job of one trial of the sweep; raise `ValueError` where these values make none."""
        fields = self.model_dump(mode="json", exclude={"sweep"})
        try:
            return parse(TrainJob, placed(fields, values), "sweep.parameters")
        except Invalid as error:
            raise ValueError(str(error)) from None


class EvaluateJob(_Asked):
    """Evaluate a registered model on a dataset's held-out rows, at the sites."""

    kind: Literal["evaluate"] = "evaluate"
    model: str  # name@version; a name alone or name@alias means the version of then, to the end of the run
    data: Data
    seed: int = Field(default=0, ge=0)


class PredictJob(_Asked):
    """Run a registered model over a dataset where it lies; answers stay at the site as dataset `output`."""

    kind: Literal["predict"] = "predict"
    model: str
    data: Data
    output: Name = "predictions"


class QueryJob(_Asked):
    """Ask one aggregate of a dataset in SQL: answered at each site, merged at the hub."""

    kind: Literal["query"] = "query"
    sql: str
    dataset: Name
    sites: tuple[Name, ...] | None = None


Job = Annotated[TrainJob | EvaluateJob | PredictJob | QueryJob, Field(discriminator="kind")]
JOBS: dict[str, type[TrainJob | EvaluateJob | PredictJob | QueryJob]] = {
    "train": TrainJob,
    "evaluate": EvaluateJob,
    "predict": PredictJob,
    "query": QueryJob,
}


def parse_job(data: Any, source: str) -> Job:
    """Validate a job document; raise `Invalid` with the path, the value and the mend of each wrong field."""
    if not isinstance(data, dict):
        raise Invalid(f"{source}: a job is a table of fields; begin it with kind: train")
    kind = cast("dict[str, Any]", data).get("kind")
    if kind is None:
        raise Invalid(f"{source}: kind: required and missing; add kind: train")
    if not isinstance(kind, str) or kind not in JOBS:
        raise Invalid(f"{source}: kind: {kind!r}{near_miss(str(kind), list(JOBS))}")
    return parse(JOBS[kind], data, source)


def run_name(job: Job) -> str:
    """Return a new name for a run of this job."""
    return f"{job.name[:48]}-{secrets.token_hex(4)}"
