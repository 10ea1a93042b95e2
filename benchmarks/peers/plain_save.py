"""How long a training step is blocked by a save as the manuals write it: the model's and AdamW's state, by one process.

    python plain_save.py JOB.json FOLDER

Prints the seconds of each save by `torch.save`, by `torch.distributed.checkpoint.save`, and until `async_save` returns.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from gpt import GPT, loss_of
from torch.distributed.checkpoint.state_dict import get_state_dict
from training import optimiser_of


def main() -> None:
    job, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(**job["shape"])
    optimiser = optimiser_of(job, model)
    windows = torch.from_numpy(np.load(job["windows"]))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss_of(model, windows[: job["batch"]]).backward()
        optimiser.step()

    def plainly(path: Path) -> None:
        torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, path)

    def state() -> dict[str, Any]:
        of_model, of_optimiser = get_state_dict(model, optimiser)
        return {"model": of_model, "optimiser": of_optimiser}

    def spread(path: Path) -> None:
        dcp.save(state(), checkpoint_id=path)

    def behind(path: Path) -> Callable[[], object]:
        return dcp.async_save(state(), checkpoint_id=path).result

    told: dict[str, list[float]] = {"torch_save": [], "dcp_save": [], "dcp_async_save": []}
    for number in range(job["saves"] + 1):
        for name, save in zip(told, (plainly, spread, behind), strict=True):
            step()
            path = folder / f"{name}-{number}"
            began = time.monotonic()
            finish = save(path)
            told[name].append(time.monotonic() - began)
            if finish is not None:
                finish()
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # What the first save of each kind imports and sets up is not of a save.
    print(json.dumps({name: seconds[1:] for name, seconds in told.items()}), flush=True)


if __name__ == "__main__":
    main()
