"""Pipeline parallelism: a model's layers in stages over ranks, and micro-batches under way in all of them at once.

Torch's schedules do the work. The user's loss stays as it is: what it calls the model with goes into the first stage,
and at the last one it is given an answer that is there already.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from atoll.errors import TaskFailed
from atoll.inner.mesh import Mesh
from atoll.inner.plans import check_stages, plan_of
from atoll.inner.stages import answer_of
from atoll.spec.compute import Compute

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[nn.Module, Batch], torch.Tensor]
_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
_ONE = "layout.pipeline: loss must call model(x) with one tensor, whose first dimension is the batch's"
_STAGES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 2}  # of each rank


@dataclass(frozen=True, slots=True)
class Stages:
    """This rank's stages of a model by number, and of all of it where each tensor is."""

    here: dict[int, nn.Module]
    places: dict[str, int]  # of each tensor, on the axis


def split(model: nn.Module, mesh: Mesh, compute: Compute) -> Stages:
    """Cut the model into stages, which take turns over the axis."""
    ranks, each = mesh.layout.pipeline, _STAGES[compute.schedule]
    check_stages(model, ranks, each)
    stages: list[nn.Module] = plan_of(model, "pipeline_split")(ranks * each)
    places: dict[str, int] = {}
    for number, stage in enumerate(stages):
        names = [*stage.state_dict(), *dict(stage.named_parameters()), *dict(stage.named_buffers())]
        places |= dict.fromkeys(names, number % ranks)
    here = {number: stages[number] for number in range(mesh.place("pipeline"), ranks * each, ranks)}
    return Stages(here, places)


class Pipeline(nn.Module):
    """A model in stages. Called, it answers at every rank; what trains it is `step`.

    Its tensors bear the names that they have in the whole model; those of other ranks' stages are `elsewhere`.
    """

    def __init__(self, stages: Stages, mesh: Mesh, compute: Compute) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(number): stage for number, stage in stages.here.items()})
        self._mesh, self._compute = mesh, compute
        self._count = mesh.layout.pipeline * _STAGES[compute.schedule]
        self._widths: tuple[int, int] = plan_of(next(iter(stages.here.values())), "pipeline_widths")
        self._group = mesh.axis("pipeline").get_group()
        self._places, here = stages.places, mesh.place("pipeline")
        # A table of positions, which is computed, may be in several stages.
        own = {*self.state_dict(), *dict(self.named_parameters()), *dict(self.named_buffers())}
        self.elsewhere = frozenset(name for name, place in stages.places.items() if place != here) - own
        self._known: dict[tuple[int, ...], _Schedule] = {}

    def step(self, loss: Loss, batch: Batch, weight: float) -> float:
        """Leave ``weight`` times the gradient of the mean loss in the parameters; return that loss, where it is known.

        Elsewhere, at the ranks without the last stage, it is 0. Raises `TaskFailed` for a share of a batch that makes
        no equal micro-batches, or not enough of them.
        """
        asked = asked_of(loss, self, batch)
        schedule = self._known.get(tuple(asked.shape))
        if schedule is None:
            schedule = self._known[tuple(asked.shape)] = _Schedule(self, asked)
        return schedule.run(loss, batch, asked, weight)

    def forward(self, *given: Any, **named: Any) -> Any:
        """Return the answer, at every rank, without a gradient: each stage's result goes to all."""
        x = _tensor_of((*given, *named.values()))
        positions, ranks = x.shape[:2], self._mesh.layout.pipeline
        for number in range(self._count):
            width = self._widths[number == self._count - 1]
            if str(number) in self.stages:
                with torch.no_grad():
                    x = self.stages[str(number)](x).float().contiguous()
            else:
                x = torch.empty((*positions, width))
            dist.broadcast(x, group=self._group, group_src=number % ranks)
        return answer_of(next(iter(self.stages.values())), x)

    def tell(self, name: str, value: torch.Tensor) -> None:
        """Give a tensor's value to all ranks from the one that has it, in place."""
        dist.broadcast(value, group=self._group, group_src=self._places[name])

    def listed(self, mine: Sequence[list[Any]]) -> list[list[Any]]:
        """Return what all stages say of their tensors, in JSON values and the order of the stages. No pickle."""
        words = json.dumps(mine).encode()
        return [entry for place in range(self._mesh.layout.pipeline) for entry in json.loads(self._told(words, place))]

    def _told(self, words: bytes, place: int) -> bytes:
        """Return the words of the rank at a place."""
        size = torch.tensor([len(words)])
        dist.broadcast(size, group=self._group, group_src=place)
        own = place == self._mesh.place("pipeline")
        letters = (
            torch.frombuffer(bytearray(words), dtype=torch.uint8) if own else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(letters, group=self._group, group_src=place)
        return letters.numpy().tobytes()

    def named_parameters(self, *given: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for stage in self.stages.values():
            yield from stage.named_parameters(*given, **named)

    def named_buffers(self, *given: Any, **named: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for stage in self.stages.values():
            yield from stage.named_buffers(*given, **named)

    def state_dict(self, *given: Any, **named: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for stage in self.stages.values():
            found |= stage.state_dict(*given, **named)
        return found

    def made(self, asked: torch.Tensor) -> tuple[list[PipelineStage], int]:
        """Return torch's stages for input of this shape, and how many micro-batches it makes."""
        pieces = _pieces(len(asked), self._compute.microbatches, self._mesh.layout.pipeline)
        stretch = asked.shape[1] // self._mesh.layout.context  # as `context` splits it
        narrow = torch.bfloat16 if self._compute.precision == "bfloat16" and not self._wrapped else torch.float32
        piece = asked[: len(asked) // pieces].to("meta")
        between = torch.empty((len(piece), stretch, self._widths[0]), device="meta", requires_grad=True)
        out = torch.empty((*piece.shape[:2], self._widths[1]), device="meta", requires_grad=True, dtype=narrow)
        last = self._count - 1
        stages = [
            PipelineStage(
                stage,
                int(number),
                self._count,
                asked.device,
                input_args=piece if number == "0" else between,
                output_args=out if int(number) == last else between,
                group=self._group,
            )
            for number, stage in self.stages.items()
        ]
        return stages, pieces

    @property
    def compute(self) -> Compute:
        return self._compute

    @property
    def _wrapped(self) -> bool:
        return self._mesh.has("data") or self._mesh.has("shard")


class _Schedule:
    """Torch's schedule for input of one shape, and what of a batch its loss is made of."""

    def __init__(self, pipeline: Pipeline, asked: torch.Tensor) -> None:
        self._pipeline = pipeline
        stages, pieces = pipeline.made(asked)
        self._first = any(stage.is_first for stage in stages)
        self._last = any(stage.is_last for stage in stages)
        made = _SCHEDULES[pipeline.compute.schedule]
        self._torchs = made(
            stages if len(stages) > 1 else stages[0],
            n_microbatches=pieces,
            loss_fn=self._loss_of,
            scale_grads=False,
        )
        self._loss: Loss = lambda model, batch: torch.zeros(())
        self._batch: Batch = {}
        self._weight, self._sum = 0.0, 0.0

    def run(self, loss: Loss, batch: Batch, asked: torch.Tensor, weight: float) -> float:
        self._loss, self._batch, self._weight, self._sum = loss, batch, weight / len(asked), 0.0
        target = torch.arange(len(asked)) if self._last else None
        self._torchs.step(*([asked] if self._first else []), target=target, return_outputs=False)
        self._loss, self._batch = lambda model, batch: torch.zeros(()), {}
        return self._sum / len(asked)

    def _loss_of(self, made: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        piece = {name: values[rows] for name, values in self._batch.items()}
        loss = self._loss(_Answer(self._pipeline, made), piece)
        self._sum += float(loss.detach()) * len(rows)
        return loss * (len(rows) * self._weight)


def _pieces(share: int, wanted: int, least: int) -> int:
    """Return how many equal micro-batches a share makes: as many as are wanted, else the nearest fewer that divide."""
    wanted = max(wanted, least)
    found = next((n for n in range(min(wanted, share), 0, -1) if share % n == 0), 0)
    if found < least:
        raise TaskFailed(
            f"batch: a share of {share} examples makes no {least} or more equal micro-batches, which as many stages "
            f"need to be busy; make each rank's share a multiple of {least}"
        )
    return found


class _Called(BaseException):
    """The loss has called the model; no error, so nothing that a loss catches."""

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()
        self.given = given


class _Stand(nn.Module):
    """What the loss is given for the model; whatever else it asks of it is the first stage's here."""

    def __init__(self, of: Pipeline) -> None:
        super().__init__()
        self.__dict__["_of"] = next(iter(of.stages.values()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)


class _Ask(_Stand):
    def forward(self, *given: Any, **named: Any) -> None:
        raise _Called([*given, *named.values()])


class _Answer(_Stand):
    def __init__(self, of: Pipeline, answer: torch.Tensor) -> None:
        super().__init__(of)
        self.__dict__["_answer"] = answer

    def forward(self, *given: Any, **named: Any) -> Any:
        return answer_of(self.__dict__["_of"], self.__dict__["_answer"])


def asked_of(loss: Loss, pipeline: Pipeline, batch: Batch) -> torch.Tensor:
    """Return the tensor that the loss calls the model with. Raises `TaskFailed` when there is none, or more."""
    try:
        loss(_Ask(pipeline), batch)
    except _Called as called:
        asked = _tensor_of(called.given)
        if len(asked) != len(next(iter(batch.values()))):
            raise TaskFailed(_ONE) from None
        return asked
    raise TaskFailed("loss does not call model(...), which a pipeline's first stage would begin with; call it")


def _tensor_of(given: Sequence[Any]) -> torch.Tensor:
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    if len(tensors) != 1 or tensors[0].ndim < 2:
        raise TaskFailed(_ONE) from None
    return tensors[0]
