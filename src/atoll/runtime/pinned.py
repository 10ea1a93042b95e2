"""Which version of a model a job is about: fixed when it is submitted, so that what was agreed to is what runs."""

from typing import Protocol

from atoll.errors import Invalid
from atoll.spec.job import EvaluateJob, Job, PredictJob
from atoll.spec.model import Model


class Registry(Protocol):
    """What this module asks of the registry."""

    def get(self, reference: str) -> Model: ...


def pinned(job: Job, models: Registry) -> Job:
    """Return the job about the version that its model's name or alias means now; jobs about no model as they are.

    Raises `NotFound`.
    """
    if isinstance(job, EvaluateJob | PredictJob):
        return job.model_copy(update={"model": models.get(job.model).reference})
    return job


def check(job: Job, models: Registry) -> None:
    """Raise `Invalid` where a job is about whatever version there is when somebody looks, as older hubs kept them."""
    if isinstance(job, EvaluateJob | PredictJob) and job.model != (found := models.get(job.model).reference):
        raise Invalid(f"model: {job.model!r} names no version, as {found!r} does; reject this and ask for it again")


def same(job: Job, begun: Job) -> bool:
    """Tell whether a job is the one that ``begun`` was made of when it was submitted.

    A name or an alias may mean another version by now, so of those only the model's name counts.
    """
    if isinstance(job, EvaluateJob | PredictJob) and isinstance(begun, EvaluateJob | PredictJob):
        name, _, which = job.model.partition("@")
        if name == begun.model.partition("@")[0] and not which.isdecimal():
            job = job.model_copy(update={"model": begun.model})
    return job == begun
