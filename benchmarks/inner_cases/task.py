"""The job's code: the peers' very model, and notes of when each rank began each step and ended its backward pass."""

import os
import time
from pathlib import Path

import gpt  # pyright: ignore[reportMissingImports] - beside this file in the bundle
import numpy as np
import torch


class Windows:
    """A GPT on windows of bytes. Each process notes in ``notes`` when its loss was asked for, and for which rows.

    With ``backward`` also when the last gradient was there, but for its sum over ranks.
    """

    def __init__(self, notes: str, shape: dict[str, int], reference: bool = False, backward: bool = False) -> None:
        self._notes, self._shape, self._reference, self._backward = Path(notes), shape, reference, backward
        self._file = -1

    def model(self) -> torch.nn.Module:
        if not self._reference:
            made = gpt.GPT(**self._shape)
            if self._backward:  # what comes first in the model is last in its backward pass
                made.embed.token.weight.register_post_accumulate_grad_hook(lambda _: self._note("backward"))
            return made
        from atoll.tasks.gpt import GPT, Shape  # which tells how a pipeline cuts it

        return GPT(Shape(**self._shape))

    def examples(self, rows) -> dict[str, np.ndarray]:
        texts = rows.table["window"].to_pylist()
        return {"x": np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), -1), "row": np.arange(len(texts))}

    def loss(self, model, batch) -> torch.Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._note(f"step {time.process_time()} {rank} {len(batch['row'])} {int(batch['row'][0])}")
        return gpt.loss_of(model, batch["x"])

    def metrics(self, model, batch) -> dict[str, object]:
        return {}

    def _note(self, words: str) -> None:
        if self._file < 0:
            self._file = os.open(self._notes / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # At once: this process may be killed in the next moment.
        os.write(self._file, f"{time.monotonic()} {words}\n".encode())
