"""What a train job's promise about single rows means at one site: how its steps are taken, and what they cost."""

from functools import lru_cache

from atoll.errors import Invalid
from atoll.policy.accounting import guarantee, multiplier
from atoll.spec.budget import Guarantee, Mechanism
from atoll.spec.job import TrainJob
from atoll.spec.privacy import Privacy, PrivateSteps


def private_steps(job: TrainJob, rows: int) -> tuple[PrivateSteps, Guarantee] | None:
    """Return how a site that trains on so many rows takes the job's steps, and what all of them cost; None for a job
    that promises nothing of rows.

    Raises `Invalid` for too few rows or a promise that no noise keeps, `Unavailable` without the extra `privacy`.
    """
    if job.privacy is None:
        return None
    return _found(job.privacy, job.steps, job.batch, rows)  # pyright: ignore[reportArgumentType] - frozen, so it has a hash


@lru_cache(maxsize=64)  # to find the noise takes a second or more, and each round of a run asks
def _found(asked: Privacy, steps: int, batch: int, rows: int) -> tuple[PrivateSteps, Guarantee]:
    if rows < 1 or asked.delta >= 1 / rows:
        raise Invalid(f"privacy.delta: {asked.delta:g}: must be below one over the {rows} rows here; set a smaller one")
    sampling = min(1.0, batch / rows)
    size = asked.noise or multiplier(asked.epsilon or 0.0, asked.delta, steps, sampling, asked.accountant)
    mechanism = Mechanism(multiplier=size, steps=steps, sampling=sampling)
    taken = PrivateSteps(clip=asked.clip, multiplier=size, sampling=sampling, rows=rows)
    return taken, guarantee("record", mechanism, asked.delta, asked.accountant)
