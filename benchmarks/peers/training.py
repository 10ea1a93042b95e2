"""What the training peers share: the job as a JSON document, the model, and the loop of a bare script."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt import GPT, loss_of
from torch.nn.parallel import DistributedDataParallel


def optimiser_of(job: dict[str, Any], model: torch.nn.Module) -> torch.optim.AdamW:
    # The fused one is the fastest that torch has on a CPU, too: a quarter of the plain loop's seconds.
    return torch.optim.AdamW(model.parameters(), lr=job["rate"], weight_decay=job["weight_decay"], fused=True)


def train(job: dict[str, Any], rank: int, ranks: int) -> None:
    """Take the job's steps on this rank's share; rank 0 then writes, as one line of JSON, when each was done.

    ``windows`` is a file of uint8 ``(rows, length + 1)``, ``order`` one of the rows in the order in which they are
    taken, ``batch`` of them a step. Instants are of the monotonic clock, which all processes of a machine share.
    """
    torch.set_num_threads(1)
    windows, order = torch.from_numpy(np.load(job["windows"])), torch.from_numpy(np.load(job["order"]))
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT(**job["shape"]), gradient_as_bucket_view=True)
    optimiser = optimiser_of(job, model)
    size, done, losses = job["batch"], [], []
    for step in range(job["steps"]):
        rows = order[step * size + rank * size // ranks : step * size + (rank + 1) * size // ranks]
        loss = loss_of(model, windows[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        done.append(time.monotonic())
    if rank == 0:
        Path(job["output"]).write_text(json.dumps({"done": done, "losses": losses}), encoding="utf-8")
