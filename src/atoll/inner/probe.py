"""What a site measures of a task before a plan: the model described, and a few steps timed where they fit."""

import itertools
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from atoll.errors import TaskFailed
from atoll.inner import optimiser
from atoll.inner.alike import digest
from atoll.inner.arrays import ArraysLearner
from atoll.inner.made import make_model, tensors
from atoll.inner.mesh import Mesh
from atoll.inner.parallelize import parallelize
from atoll.inner.shape import describe
from atoll.inner.steps import Start, training_steps
from atoll.inner.task import hands_arrays
from atoll.inner.vector import signature_of
from atoll.spec.compute import Compute
from atoll.spec.fleet import Profile
from atoll.spec.footprint import step_bytes
from atoll.spec.model import elements
from atoll.spec.order import Probe
from atoll.spec.task import Arrays, ArraysTask, Task

STEPS = 3  # that are timed; the fastest counts
_BACKWARD = 3  # times the forward pass, with it
_LEAST = 1e-6  # seconds


def measure(
    task: Task | ArraysTask,
    order: Probe,
    mesh: Mesh,
    compute: Compute,
    examples: Arrays,
    batches: Iterable[Arrays],
    memory: int | None = None,
) -> Profile:
    """Build the model, describe it, and take a step for each of ``batches``, this rank's shares of `STEPS`.

    No step is taken where it would not fit into a device of so many bytes: then its seconds are worked out from a
    forward pass of two examples. Raises `TaskFailed` for a model whose weights alone do not fit, before all of them are
    there, and for all that a step can.
    """
    if hands_arrays(task):
        learner = ArraysLearner(task, order.seed, mesh)
        seconds = _fastest(learner.trial(order, examples, batches))
        size = elements(learner.signature)
        return Profile(parameters=size, step_seconds=seconds, memory_bytes=_most(), gradients=False)
    task, batches = cast("Task", task), iter(batches)
    first = next(batches)
    with _within(memory):
        model = make_model(task, order.seed)
    found = describe(task, model, tensors(first), order.seed)
    share = len(next(iter(first.values())))
    profile = Profile(
        parameters=elements(signature_of(model)),
        step_seconds=max(_BACKWARD * found.seconds * share, _LEAST),
        layout=mesh.layout,
        shape=found.shape,
    )
    needed = step_bytes(profile, mesh.layout, order.optimiser, compute, order.batch)
    too_big = memory is not None and found.seconds > 0 and needed > memory
    if any(row[0] for row in mesh.gather([float(too_big)])):  # or some would wait for the others in the first step
        return profile
    spread = parallelize(model, mesh, compute, getattr(task, "parallelize", None))
    made = optimiser.make(order.optimiser, spread.model)
    given = map(tensors, itertools.chain([first], batches))
    at = Start(order.seed, examples=digest(examples)) if mesh.ranks > 1 else Start(order.seed)
    at = replace(at, finite=not order.private)  # else that a profile is missing would tell of a row
    seconds = _fastest(training_steps(task, spread, made, given, at))
    return profile.model_copy(update={"step_seconds": seconds, "memory_bytes": _most()})


def _fastest(steps: Iterable[object]) -> float:
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in steps]
    return max(min(after - before for before, after in itertools.pairwise(times)), _LEAST)


def _most() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _within(most: int | None) -> Iterator[None]:
    """Stop the building of a model once its weights take more than so many bytes: the machine would go down with it."""
    sizes: dict[tuple[int, str], int] = {}
    total = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal total
        if is_lazy(parameter):
            return  # without a size yet; `make_model` refuses it
        total += parameter.nbytes - sizes.get((id(module), name), 0)
        sizes[id(module), name] = parameter.nbytes
        if most is not None and total > most:
            raise TaskFailed(
                f"model() has more than {most / 1e9:.3g} GB of weights, the memory of a device here, and each rank "
                "builds the whole model; use a smaller one, or devices with more memory"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
