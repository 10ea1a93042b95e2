"""The job's code: the peers' very model, and notes of when each rank began each step and what checkpoints held it."""

import os
import time
from pathlib import Path

import gpt  # pyright: ignore[reportMissingImports] - beside this file in the bundle
import numpy as np
import torch

from atoll.inner.round import Round
from atoll.inner.saved import Writer


class Windows:
    """A GPT on windows of bytes. Each process notes in ``notes`` when its loss was asked for, and for which rows.

    With ``held`` also for how long the round's own thread was kept from its steps by what mirrors and saves them.
    """

    def __init__(self, notes: str, shape: dict[str, int], reference: bool = False, held: bool = False) -> None:
        self._notes, self._shape, self._reference = Path(notes), shape, reference
        self._file = -1
        if held:
            self._time(Round, "_keep")  # after a step
            self._time(Writer, "copied")  # before what the next one computed is put in its place

    def model(self) -> torch.nn.Module:
        if not self._reference:
            return gpt.GPT(**self._shape)
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

    def _time(self, owner: type, name: str) -> None:
        """Note the seconds of each call of a method."""
        called = getattr(owner, name)

        def timed(*arguments: object) -> object:
            began = time.monotonic()
            try:
                return called(*arguments)
            finally:
                self._note(f"{name.lstrip('_')} {time.monotonic() - began}")

        setattr(owner, name, timed)

    def _note(self, words: str) -> None:
        if self._file < 0:
            self._file = os.open(self._notes / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # At once: this process may be killed in the next moment.
        os.write(self._file, f"{time.monotonic()} {words}\n".encode())
