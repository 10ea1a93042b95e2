"""The replicas that a hub keeps: a process each, started, watched and ended. A replica that dies is not restarted."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atoll.drain import Drain
from atoll.errors import AtollError, Invalid, NotFound, Unavailable
from atoll.serving.placement import Placement, Ready, no_port
from atoll.spec.document import near_miss, parse_json
from atoll.spec.model import Deployment, Model
from atoll.spec.pretrained import Pretrained
from atoll.spec.run import DeploymentView

_PASSED = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "HOME")
_READY_LIMIT = 64 * 1024  # bytes of the ready line
_TAKEN = 3.0  # seconds to wait for a port that an ending replica still holds
_REPLICA = "atoll.serving.replica"


class Cell(Protocol):
    """What one replica lives in, made by whoever knows how to hold a process that runs user code."""

    @property
    def confined(self) -> bool: ...  # whether the process sees less than its user does
    @property
    def fds(self) -> tuple[int, ...]: ...  # that its process inherits
    @property
    def environment(self) -> Mapping[str, str]: ...  # of what it has to know there
    def command(self, module: str) -> list[str]: ...
    def close(self) -> None: ...


class _Open:
    """No cell: the process sees what its user sees."""

    confined = False
    fds: tuple[int, ...] = ()
    environment: Mapping[str, str] = {}

    def command(self, module: str) -> list[str]:
        return [sys.executable, "-P", "-m", module]

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(slots=True)
class _Replica:
    deployment: Deployment
    process: subprocess.Popen[bytes] | None = None
    cell: Cell | None = None
    drain: Drain | None = None  # of what is printed in the cell
    url: str = ""
    ready: Ready | None = None

    def end(self, grace: float) -> None:
        """End its process, by SIGTERM first where it has a grace, and what is left in its cell.

        While it starts its pipes are let be: whoever starts it reads them, sees it end, and ends it for good.
        """
        if self.process is not None:
            _end(self.process, grace)
        if self.cell is not None:
            self.cell.close()
        if self.drain is not None:
            self.drain.close()
        if self.process is not None and self.ready is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def view(self) -> DeploymentView:
        ready = self.ready
        code = _code(self.process) if self.process else None
        words, state = "", "answering"
        if ready is None:
            state = "starting"
        elif ready.failed is not None:
            state, words = "failed", ready.failed
        elif code is not None:
            state, words = (
                "failed",
                f"deployment {self.deployment.name}: its process ended ({_ended(code)}); deploy it again",
            )
        url = self.url if state == "answering" else ""
        return DeploymentView(name=self.deployment.name, model=self.deployment.model, url=url, state=state, words=words)


class Deployments:
    """Starts, lists and ends replicas, from any thread. ``logs`` is the folder for what they write to stderr.

    `start` blocks until the replica answers or fails, for at most ``patience`` seconds; call it in a thread.
    ``cells`` makes what each lives in, of the paths that it has to read.
    """

    def __init__(
        self,
        logs: Path,
        patience: float = 60.0,
        grace: float = 8.0,
        cells: Callable[[Sequence[Path]], Cell] = lambda _: _Open(),
    ) -> None:
        self._logs = logs
        self._cells = cells
        self._patience = patience
        self._grace = grace
        self._replicas: dict[str, _Replica] = {}
        self._lock = threading.Lock()

    def start(
        self,
        deployment: Deployment,
        model: Model,
        bundle: Path,
        weights: Path,
        columns: Mapping[str, str],
        pretrained: Pretrained | None = None,
    ) -> DeploymentView:
        """Start a replica and return how it is: `answering`, or `failed` with its own words.

        Raises `Invalid` while a deployment of that name starts or answers. A failed one is replaced.
        """
        placement = Placement(
            deployment=deployment,
            model=model,
            bundle=str(bundle),
            weights=str(weights),
            columns=dict(columns),
            pretrained=pretrained,
        )
        with self._lock:
            before = self._replicas.get(deployment.name)
            if before is not None and before.view().state != "failed":
                raise Invalid(f"deployment: {deployment.name!r} is {before.view().state} already; stop it first")
            replica = self._replicas[deployment.name] = _Replica(deployment)
        if before is not None:
            before.end(0.0)
        ready = self._met(replica, placement)
        with self._lock:
            replica.ready = ready
            gone = self._replicas.get(deployment.name) is not replica  # somebody stopped it meanwhile
        if gone or ready.failed is not None:
            replica.end(0.0)
        return replica.view()

    def _met(self, replica: _Replica, placement: Placement) -> Ready:
        name = replica.deployment.name
        try:
            door = _bound(replica.deployment)
        except OSError as error:
            return Ready(failed=no_port(replica.deployment.port, error))
        host, port = door.getsockname()
        replica.url = f"http://{host}:{port}"  # whatever the code in it would have people ask
        try:
            with door:
                return self._started(replica, placement, door)
        except (AtollError, OSError, subprocess.SubprocessError) as error:
            # Of the system's own words some tell where the hub keeps its files, or a command line.
            words = error if isinstance(error, AtollError) else getattr(error, "strerror", None) or type(error).__name__
            return Ready(failed=f"deployment {name}: {words}; its log is {self._log(name)}")

    def _started(self, replica: _Replica, placement: Placement, door: socket.socket) -> Ready:
        """Start the process and return what it says; the door is its own from then on."""
        paths = [Path(placement.bundle), Path(placement.weights)]
        cell = self._cells(paths if placement.pretrained is None else [*paths, Path(placement.pretrained.path)])
        drain = None
        try:
            drain = self._drained(replica.deployment.name) if cell.confined else None
            process = self._spawn(replica.deployment.name, cell, door, drain)
        except (Unavailable, OSError):
            cell.close()
            if drain is not None:
                drain.close()
            raise
        door.close()
        if drain is not None:
            drain.shut()
        with self._lock:
            gone = self._replicas.get(replica.deployment.name) is not replica  # stopped before it had a process
            replica.process, replica.cell, replica.drain = process, cell, drain
        if gone:
            raise Unavailable("it was stopped before it began")
        return _meet(process, placement, self._patience)

    def stop(self, name: str) -> DeploymentView:
        """End the replica: SIGTERM, then SIGKILL once its grace is over. Raises `NotFound`."""
        with self._lock:
            replica = self._replicas.pop(name, None)
            known = list(self._replicas)
        if replica is None:
            mend = near_miss(name, known) or "; start one with `atoll deploy`"
            raise NotFound(f"deployment: there is no {name!r}{mend}")
        replica.end(self._grace)
        return DeploymentView(name=name, model=replica.deployment.model, url="", state="stopped")

    def views(self) -> tuple[DeploymentView, ...]:
        """How each deployment is now, by name."""
        with self._lock:
            return tuple(self._replicas[name].view() for name in sorted(self._replicas))

    def close(self) -> None:
        """End every replica at once; none is left when this returns."""
        with self._lock:
            replicas, self._replicas = list(self._replicas.values()), {}
        for replica in replicas:
            if replica.process is not None:
                _signal(replica.process, signal.SIGTERM)
        until = time.monotonic() + self._grace
        for replica in replicas:
            replica.end(max(0.0, until - time.monotonic()))

    def _drained(self, name: str) -> Drain:
        """Begin to fill the log from a pipe: who sees nothing else of this machine does not see what others wrote."""
        self._logs.mkdir(parents=True, exist_ok=True)
        return Drain(self._log(name))

    def _spawn(self, name: str, cell: Cell, door: socket.socket, drain: Drain | None) -> subprocess.Popen[bytes]:
        # The user's code runs there: it gets none of our secrets, and no module from the current folder (-P).
        environment = {key: os.environ[key] for key in _PASSED if key in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **cell.environment}
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            with self._log(name).open("ab") as log:
                return subprocess.Popen(
                    [*cell.command(_REPLICA), str(door.fileno())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log if drain is None else drain.pipe,
                    pass_fds=(door.fileno(), *cell.fds),
                    env=environment,
                    start_new_session=True,  # a group of its own: Ctrl-C is the hub's to handle
                )
        except OSError as error:
            raise Unavailable(f"its process cannot be started ({error.strerror}); look at {self._logs}") from error

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def _bound(deployment: Deployment) -> socket.socket:
    """Take the port before the slow loading begins; nobody is let in until the replica listens. Raises `OSError`."""
    until = time.monotonic() + _TAKEN
    while True:
        # With the protocol named: asyncio sets TCP_NODELAY only then, and without it an answer takes 40 ms more.
        door = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((deployment.host, deployment.port))
        except OSError:
            door.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return door


def _meet(process: subprocess.Popen[bytes], placement: Placement, patience: float) -> Ready:
    """Hand over the placement and wait for the ready line. Stdin stays open: its end tells the replica to end."""
    assert process.stdin is not None
    try:
        process.stdin.write(placement.model_dump_json().encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        raise Unavailable(f"its process ended at once ({_ended(_wait(process, 5.0))})") from None
    line = _line(process, time.monotonic() + patience)
    if line is None:
        raise Unavailable(f"not ready after {patience:g} seconds")
    if not line.endswith(b"\n"):
        raise Unavailable(f"its process ended before it was ready ({_ended(_wait(process, 5.0))})")
    return parse_json(Ready, line, "replica")


def _line(process: subprocess.Popen[bytes], until: float) -> bytes | None:
    """Return stdout up to its first line's end, what there was when it closed, or None when time is up."""
    assert process.stdout is not None
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not found.endswith(b"\n") and len(found) < _READY_LIMIT:
            if not selector.select(max(0.0, until - time.monotonic())):
                return None
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                break
            found += piece
    return found


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    if grace:
        _signal(process, signal.SIGTERM)
    if _wait(process, grace) is None:
        _signal(process, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while (code := _code(process)) is None and time.monotonic() < until:
        time.sleep(0.02)
    return code


def _code(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit code, None while the process lives.

    The user's code may have started others in the group. They are killed before the dead leader is reaped: from
    then on its number may be given to a stranger.
    """
    if process.returncode is None:
        try:
            dead = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # another thread reaped it just now
            return process.poll()
        if dead is None:
            return None
        _signal(process, signal.SIGKILL)
        process.wait()
    return process.returncode


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # another thread reaped it just now
            os.killpg(process.pid, number)


def _ended(code: int | None) -> str:
    if code is None:
        return "it will not end"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
