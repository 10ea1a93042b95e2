"""A hub in a process of its own: prints a token for each site, and when all are here; then takes one job a line.

    python hub.py HOME '["east", "west"]' [ADDRESS]

Without ADDRESS it is reached from this machine only. It tells in a line what became of a job, and ends with its
standard input.
"""

import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from atoll.runtime.hub import Hub
from atoll.runtime.membership import initialise
from atoll.serving.deployments import Deployments
from atoll.spec.document import parse
from atoll.spec.fleet import Reach
from atoll.spec.job import TrainJob
from atoll.spec.model import Bundle
from atoll.spec.user import LOCAL

PATIENCE = 900.0  # seconds in which something must happen


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this, and closes our standard input
    home, sites = Path(sys.argv[1]), json.loads(sys.argv[2])
    if address := sys.argv[3:]:
        initialise(home / "hub", Reach(host="0.0.0.0", names=(address[0],)))
    hub = Hub(home, Deployments(home / "hub" / "logs"))
    try:
        for name in sites:
            say({"token": hub.invite(name)})
        until = time.monotonic() + PATIENCE
        while len(hub.fleet().sites) < len(sites):
            if time.monotonic() > until:
                raise SystemExit(f"the sites did not connect in {PATIENCE:g} s")
            time.sleep(0.05)
        say({"connected": len(sites)})
        for line in sys.stdin:
            say(carry_out(hub, json.loads(line)))
    finally:
        hub.close()
    return 0


def carry_out(hub: Hub, asked: dict[str, Any]) -> dict[str, object]:
    job, bundle = parse(TrainJob, asked["job"], "benchmark"), parse(Bundle, asked["bundle"], "benchmark")
    run, news = hub.submit(job, bundle, LOCAL), threading.Event()
    with hub.watch(run, news.set):
        while not (view := hub.run(run)).over:
            if not news.wait(PATIENCE):
                raise SystemExit(f"nothing happened in {PATIENCE:g} s")
            time.sleep(0.2)  # to look often would take the processor from what is measured
            news.clear()
    if view.state != "finished" or view.result is None:
        raise SystemExit(f"the run {view.state}: {view.words}")
    return {"run": run, "metrics": view.result.metrics}


def say(words: object) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    sys.exit(main())
