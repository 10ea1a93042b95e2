"""The sites that live in a home, started with the hub: one process each, or a thread for a laptop that has none."""

import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from atoll.errors import Unavailable
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.runtime.desk import Desk
from atoll.spec.document import sha256

_READY = 30.0  # seconds a site's process has to connect
_GRACE = 8.0  # seconds it has to end its workers and itself
log = logging.getLogger(__name__)


class Embedded:
    """Site processes that end with the hub: each watches its stdin, which only the hub holds open."""

    def __init__(self, home: Path, desk: Desk) -> None:
        self._home, self._desk = home, desk
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._local: tuple[Agent, threading.Thread] | None = None

    def start(self, address: str) -> None:
        """Start every site of the home and wait until all are connected. Raises `Unavailable` for one that is not."""
        homes = sorted(path.parent for path in (self._home / "sites").glob("*/site.yaml"))
        if [home.name for home in homes] in ([], ["local"]):
            self._start_local(sites.laptop(self._home / "sites"))
            names = ["local"]
        else:
            names = [self._start_process(home, address, len(homes)) for home in homes]
        deadline = time.monotonic() + _READY
        for name in names:
            while not self._desk.here(name):
                self._look(name)
                if time.monotonic() > deadline:
                    raise Unavailable(f"site {name} did not connect in {_READY:g} s; look at its agent.log")
                time.sleep(0.01)

    def _start_local(self, home: Path) -> None:
        agent = sites.agent(home)
        thread = threading.Thread(target=agent.serve_desk, args=(self._desk,), name="site-local", daemon=True)
        self._local = (agent, thread)
        thread.start()

    def _start_process(self, home: Path, address: str, sharers: int) -> str:
        name = sites.read(home).name
        secret = secrets.token_urlsafe(32)
        self._desk.trust(name, sha256(secret.encode()))
        with (home / "agent.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "atoll.runtime.site", str(home)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is the hub's to handle, and a site's processes can be ended as one
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"address": address, "secret": secret, "sharers": sharers}).encode() + b"\n")
        process.stdin.flush()
        self._processes[name] = process
        return name

    def _look(self, name: str) -> None:
        process = self._processes.get(name)
        if process is not None and process.poll() is not None:
            path = self._home / "sites" / name / "agent.log"
            said = path.read_text(errors="replace").strip().splitlines()[-1:]
            raise Unavailable(f"site {name} ended while starting: {said[0] if said else 'it said nothing'}")

    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    def close(self) -> None:
        """End every site; whoever does not end by itself is killed with all it started."""
        if self._local is not None:
            agent, thread = self._local
            agent.stop()
            thread.join(_GRACE)
            self._local = None
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + _GRACE
        for name, process in self._processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("site %s did not end by itself", name)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()
