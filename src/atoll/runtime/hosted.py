"""A site of the hub's own home while it runs: a process of its own, or a thread of the hub on a laptop."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from atoll.boundary.channel import Desk
from atoll.runtime import faults
from atoll.runtime import site as sites

_TAIL = 4096  # bytes of a log that are looked through for a site's last words
log = logging.getLogger(__name__)


class Hosted(Protocol):
    """One life of a site, from its start to its end."""

    def ended(self) -> str | None:
        """Tell how it ended, in words that follow the site's name; None while it runs."""
        ...

    def end(self) -> None:
        """Let it end; returns at once."""
        ...

    def wait(self, deadline: float) -> None:
        """Return when it is gone: of itself until ``deadline`` (`time.monotonic`), by force after it."""
        ...


class SiteProcess:
    """A process that ends with the hub: it watches its stdin, which only the hub holds open."""

    def __init__(self, home: Path, address: str, secret: str, sharers: int) -> None:
        """Start it. Raises `OSError` when there is no room for a process."""
        self._log = home / "agent.log"
        with self._log.open("ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "atoll.runtime.site", str(home)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **faults.handed_on("site", "worker")},
                start_new_session=True,  # Ctrl-C is the hub's to handle, and a site's processes can be ended as one
            )
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        with suppress(OSError):  # it has ended already, and `ended` tells how
            self._stdin.write(json.dumps({"address": address, "secret": secret, "sharers": sharers}).encode() + b"\n")
            self._stdin.flush()

    def ended(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        self.end()
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}: {self._last_words()}"

    def _last_words(self) -> str:
        """Return the last line that this very process wrote to the site's log."""
        try:
            with self._log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._start, end - _TAIL))
                lines = file.read().decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        with suppress(OSError):
            self._stdin.close()

    def wait(self, deadline: float) -> None:
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("the site in %s did not end by itself", self._log.parent)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class SiteThread:
    """A thread that serves the hub over memory."""

    def __init__(self, home: Path, desk: Desk) -> None:
        """Start it. Raises as `site.agent` does for a folder in which no site can live."""
        self._agent = sites.agent(home)
        self._how = "ended"
        self._thread = threading.Thread(target=self._serve, args=(desk, home.name), name="site-local", daemon=True)
        self._thread.start()

    def _serve(self, desk: Desk, name: str) -> None:
        try:
            self._agent.serve_desk(desk)
        except Exception as error:
            # What would have ended a process of its own must not end the hub's site for good; the log has it all.
            log.exception("site %s", name)
            self._how = f"ended: {error}"

    def ended(self) -> str | None:
        return None if self._thread.is_alive() else self._how

    def end(self) -> None:
        self._agent.stop()

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
