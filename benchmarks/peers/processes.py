"""What the peers' scripts share: processes that are ended, a free port, and how much memory a tree of them had."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 600.0  # seconds for one measurement
# Who is told to end ends what it has started, too.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a group of its own, of which nothing is left afterwards."""
    with log.open("ab") as out:
        given = {**os.environ, **environment}
        started = subprocess.Popen(command, stdout=out, stderr=out, env=given, start_new_session=True)
        try:
            yield started
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(started.pid, sign)
                    started.wait(10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
            started.wait()


def wait_for(true: Callable[[], bool], alive: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Wait until it is true; end with the log's last lines when a process has ended before, or after `PATIENCE`."""
    until = time.monotonic() + PATIENCE
    while not true():
        ended = [one.args for one in alive if one.poll() is not None]
        if ended or time.monotonic() > until:
            why = f"{ended[0]} ended" if ended else f"nothing came in {PATIENCE:g} s"
            raise SystemExit(f"{why}; the log ends with:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.2)


def peak_mb(root: int, without: str = "") -> float:
    """Return the peaks of resident memory of a process and all below it that are there now, added up; of those whose
    command line has the word ``without`` neither they nor what is below them count."""
    parents: dict[int, list[int]] = {}
    peaks: dict[int, float] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(row.split(":", 1) for row in status.read_text().splitlines() if ":" in row)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if without and without.encode() in _command(status.parent):
            continue
        parents.setdefault(int(fields["PPid"]), []).append(int(status.parent.name))
        peaks[int(status.parent.name)] = int(fields.get("VmHWM", "0 kB").split()[0]) / 1024
    total, waiting = 0.0, [root]
    while waiting:
        one = waiting.pop()
        total += peaks.get(one, 0.0)
        waiting += parents.get(one, [])
    return total


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
