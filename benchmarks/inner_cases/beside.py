"""The peers' side: each a script in `benchmarks/peers`, started as a process of its own and ended with all below it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers.processes import free_port, running

from inner_cases import PATIENCE, SETTLE, Absent, Bench, Ran
from inner_cases.site import OPTIMISER, Site

_PEERS = Path(__file__).parents[1] / "peers"
RANKS = 2


def torchrun(bench: Bench, site: Site, steps: int) -> Ran:
    """Run the bare DDP script. Its agents' rendezvous is the static one, which is up half a second sooner."""
    folder = bench.folder("torchrun")
    job = _job(folder, site, steps)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    asked = time.monotonic()
    _run([*launcher, *meeting, str(_PEERS / "ddp_torchrun.py"), str(job)], folder)
    return _ran(asked, folder)


def ray_train(bench: Bench, site: Site, steps: int) -> Ran:
    """Run Ray Train's TorchTrainer; what is asked for counts from when its Ray is up."""
    if importlib.util.find_spec("ray") is None:
        raise Absent("Ray is not installed")
    folder = bench.folder("ray-train")
    said = _run([str(_PEERS / "ray_train.py"), str(_job(folder, site, steps)), str(folder)], folder)
    return _ran(said["asked"], folder)


def plain_saves(bench: Bench, site: Site, saves: int) -> dict[str, list[float]]:
    """Return the seconds of saves by each of torch's ways."""
    folder = bench.folder("plain")
    return _run([str(_PEERS / "plain_save.py"), str(_job(folder, site, 0, saves=saves)), str(folder)], folder)


def _job(folder: Path, site: Site, steps: int, **more: Any) -> Path:
    order = folder / "order.npy"
    np.save(order, site.order(site.size.batch))
    job = {
        "windows": str(site.windows),
        "order": str(order),
        "output": str(folder / "told.json"),
        "shape": site.size.shape,
        "rate": OPTIMISER.rate,
        "weight_decay": OPTIMISER.weight_decay,
        "batch": site.size.batch,
        "steps": steps,
        "ranks": RANKS,
        "settle": SETTLE,
    }
    path = folder / "job.json"
    path.write_text(json.dumps({**job, **more}), encoding="utf-8")
    return path


def _run(words: Sequence[str], folder: Path) -> Any:
    """Run a peer's script to its end and return the JSON of its last line, if that is any."""
    log = folder / "log"
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # everybody finds its modules compiled
    with running([sys.executable, *words], log, **environment) as process:
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
    said = log.read_text(encoding="utf-8", errors="replace")
    if code != 0:
        how = f"did not end in {PATIENCE:g} s" if code is None else f"ended with {code}"
        raise RuntimeError(f"{Path(words[-2]).name} {how}; its log ends with:\n{said[-2000:]}")
    last = said.rstrip().rpartition("\n")[2]
    return json.loads(last) if last.startswith("{") else None


def _ran(asked: float, folder: Path) -> Ran:
    told = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    return Ran(asked, tuple(told["done"]), float(np.mean(told["losses"])))
