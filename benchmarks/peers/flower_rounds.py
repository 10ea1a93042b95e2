"""Null rounds of Flower, deployed: a SuperLink and SuperNodes as processes of this machine, without TLS.

    PYTHON benchmarks/peers/flower_rounds.py BYTES SITES ROUNDS FOLDER

To be run with the Python of a virtual environment that has Flower (1.41 was tried) and not Atoll. Ends with one line of
JSON: the version, each round's seconds, their median, and the server's peak of resident memory in MB.
"""

import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from processes import free_port, peak_mb, running, wait_for

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "rounds"
version = "1.0.0"
description = "Null rounds"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
[tool.flwr.app.config]
elements = 1
sites = 1
rounds = 1
told = ""
"""
APP = """\
import json, time
import numpy as np
from pathlib import Path
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    merged = []

    def aggregate_train(self, server_round, replies):
        made = super().aggregate_train(server_round, replies)
        self.merged.append(time.monotonic())
        return made


@server.main()
def main(grid, context):
    asked = context.run_config
    sites = int(asked["sites"])
    strategy = Timed(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites,
        min_evaluate_nodes=0,
    )
    first = ArrayRecord([np.zeros(int(asked["elements"]), np.float32)])
    strategy.start(grid=grid, initial_arrays=first, num_rounds=int(asked["rounds"]) + 1)
    told = Path(asked["told"])
    told.with_suffix(".part").write_text(json.dumps(strategy.merged))
    told.with_suffix(".part").rename(told)
"""


def measure(size: int, sites: int, rounds: int, folder: Path) -> dict[str, object]:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "app").mkdir(parents=True)
    (folder / "flwr").mkdir()
    told, log, port = folder / "told.json", folder / "log", free_port()
    (folder / "app" / "pyproject.toml").write_text(PROJECT)
    (folder / "app" / "app.py").write_text(APP)
    link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (folder / "flwr" / "config.toml").write_text(link)
    tools, home = Path(sys.executable).parent, {"FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0"}
    home["PATH"] = f"{tools}:{os.environ['PATH']}"
    with ExitStack() as all_of_it:

        def begin(name: str, *arguments: str) -> subprocess.Popen[bytes]:
            return all_of_it.enter_context(running([str(tools / name), *arguments], log, **home))

        at = ["--host", "127.0.0.1", "--port"]
        server = begin("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", *at, str(port))
        wait_for(lambda: _listens(port), [server], log)
        nodes = [
            begin("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", *at, str(free_port()))
            for _ in range(sites)
        ]
        config = f'elements={size // 4} sites={sites} rounds={rounds} told="{told}"'
        asked = begin("flwr", "run", str(folder / "app"), "here", "--run-config", config)
        peak = 0.0

        def done() -> bool:
            nonlocal peak
            peak = max(peak, peak_mb(server.pid))
            if asked.poll():
                raise SystemExit(f"flwr run failed; the log ends with:\n{log.read_text(errors='replace')[-2000:]}")
            return told.exists()

        wait_for(done, [server, *nodes], log)
    merged = json.loads(told.read_text())
    seconds = [after - before for before, after in itertools.pairwise(merged)]
    return {
        "version": version("flwr"),
        "rounds": [round(one, 3) for one in seconds],
        "seconds": round(statistics.median(seconds), 3),
        "hub_mb": round(peak),
    }


def _listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: flower_rounds.py BYTES SITES ROUNDS FOLDER")
    size, sites, rounds = map(int, sys.argv[1:4])
    print(json.dumps(measure(size, sites, rounds, Path(sys.argv[4]).absolute())))
