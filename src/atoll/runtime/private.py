"""What a site does about a promise of rows or of itself: how its steps are taken, and what it does not say of them."""

from atoll.data.batches import held_out
from atoll.policy.private import private_steps
from atoll.spec.job import TrainJob
from atoll.spec.message import Assign
from atoll.spec.privacy import PrivateSteps
from atoll.spec.wire import noised


def steps_at(job: TrainJob, rows: int) -> PrivateSteps | None:
    """Return how the workers at a dataset of so many rows take a job's steps; None where it promises nothing of rows.

    Rows that are held out are in no step, and count for nothing. It is found once in this process: that takes seconds.
    Raises as `private_steps` does.
    """
    found = private_steps(job, rows - held_out(rows, job.data.holdout))
    return found[0] if found is not None else None


def silent(a: Assign) -> bool:
    """Tell whether noise hides the data in a round's update, on the wire or in each step. Then the loss of its steps
    and their pace, which has the loss in it, stay at the site: there is no noise on them."""
    return noised(a.sync.wire) > 0 or (isinstance(a.job, TrainJob) and a.job.privacy is not None)
