"""Null rounds of NVFLARE by its own simulator: a server and a process for each site, over its channels on this machine.

    PYTHON benchmarks/peers/nvflare_rounds.py BYTES SITES ROUNDS FOLDER

To be run with the Python of a virtual environment that has NVFLARE (2.9 was tried) and not Atoll. Ends with one line of
JSON: the version, each round's seconds as the first site sees them, their median, and the peak of resident memory in MB
of all its processes but the sites'.
"""

import itertools
import json
import os
import shutil
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from processes import peak_mb, running, wait_for

SITE = """\
import sys, time
import numpy as np
import nvflare.client as flare

elements, told = int(sys.argv[1]), sys.argv[2]
flare.init()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if flare.get_site_name() == "site-1":
        with open(told, "a") as file:
            file.write(f"{time.monotonic()}\\n")
    [(name, weights)] = model.params.items()
    update = weights if weights.size == elements else np.zeros(elements, np.float32)  # at first there is one number
    flare.send(flare.FLModel(params={name: update}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
"""
JOB = """\
import sys
from nvflare.app_common.np.recipes import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv

script, elements, told, sites, rounds, folder = sys.argv[1:]
recipe = NumpyFedAvgRecipe(
    name="rounds", model=[0.0], min_clients=int(sites), num_rounds=int(rounds) + 2, train_script=script,
    train_args=f"{elements} {told}",
)
recipe.execute(SimEnv(num_clients=int(sites), num_threads=int(sites), workspace_root=folder))
"""


def measure(size: int, sites: int, rounds: int, folder: Path) -> dict[str, object]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script, job, told, log = (folder / name for name in ("site.py", "job.py", "told", "log"))
    script.write_text(SITE)
    job.write_text(JOB)
    command = [sys.executable, str(job), str(script), str(size // 4), str(told), str(sites), str(rounds), str(folder)]
    peak = 0.0
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with running(command, log, PATH=path) as started:

        def done() -> bool:
            nonlocal peak
            peak = max(peak, peak_mb(started.pid, without="client"))
            return told.exists() and len(told.read_text().splitlines()) >= rounds + 2

        wait_for(done, [started], log)
    received = [float(one) for one in told.read_text().splitlines()]
    seconds = [after - before for before, after in itertools.pairwise(received[1:])]  # the first round has one number
    return {
        "version": version("nvflare"),
        "rounds": [round(one, 3) for one in seconds],
        "seconds": round(statistics.median(seconds), 3),
        "hub_mb": round(peak),
    }


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: nvflare_rounds.py BYTES SITES ROUNDS FOLDER")
    size, sites, rounds = map(int, sys.argv[1:4])
    print(json.dumps(measure(size, sites, rounds, Path(sys.argv[4]).absolute())))
