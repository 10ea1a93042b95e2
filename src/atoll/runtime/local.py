"""The executor of a laptop or an edge site: each rank is a process of this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import Unavailable
from atoll.runtime import faults
from atoll.runtime.piped import GRACE, PipedGroup
from atoll.spec.plan import Layout

# Nothing of the agent's environment reaches user code but what a Python process needs to run.
PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "HOME")


@dataclass(slots=True)
class Process:
    """A worker process, which reads orders from stdin and answers on a pipe of its own; its prints go to a log file."""

    process: subprocess.Popen[bytes]
    orders: int  # file descriptors
    replies: int
    rest: bytes = b""

    def ended(self) -> bool:
        return self.process.poll() is not None

    def how(self) -> str:
        """Return how it ended, once its pipe says that it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        code = self.process.returncode
        return f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"

    def died(self) -> Unavailable:
        return Unavailable(f"worker: a rank ended {self.how()}; its log is in the site's folder")

    def end(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what the user's code started and left behind


def start(rank: int, ranks: int, meeting: Path, log: Path, more: Mapping[str, str]) -> Process:
    """Start one rank's worker process here, with ``more`` in its environment. Raises `OSError`."""
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    # One thread a rank: ranks share the machine's cores, and torch would otherwise take all of them in each.
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1", **more}
    told, orders = os.pipe()
    replies, said = os.pipe()
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "atoll.runtime.worker", str(rank), str(ranks), str(meeting), str(said)],
                stdin=told,
                stdout=output,
                stderr=output,
                pass_fds=(said,),
                env=environment,
                start_new_session=True,  # Ctrl-C is the agent's to handle
            )
    except OSError:
        os.close(orders)
        os.close(replies)
        raise
    finally:
        os.close(told)
        os.close(said)
    os.set_blocking(orders, False)
    return Process(process, orders, replies)


class LocalExecutor:
    """Starts groups of processes on this machine."""

    def start(self, layout: Layout, folder: Path) -> PipedGroup:
        folder.mkdir(parents=True, exist_ok=True)
        meeting = folder / f"meeting-{uuid.uuid4().hex}"
        ranks: list[Process] = []
        group = PipedGroup(ranks, meeting)
        try:
            for rank in range(layout.ranks):
                log, more = folder / f"worker-{rank}.log", faults.handed_on("worker")
                ranks.append(start(rank, layout.ranks, meeting, log, more))
        except OSError as error:
            group.close()
            raise Unavailable(f"worker: cannot be started ({error}); free memory or processes") from None
        return group

    def close(self) -> None:
        """There is nothing but its groups."""
