"""The executor of a site with a Ray cluster: each rank is a Ray actor there. Ray itself is in a process of its own."""

import contextlib
import importlib.util
import json
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import atoll
from atoll.errors import Corrupt, Unavailable
from atoll.runtime import faults
from atoll.runtime.bundle import found_in
from atoll.runtime.local import PASSED
from atoll.runtime.member import GRACE
from atoll.runtime.piped import PipedGroup
from atoll.runtime.sandbox import Grant
from atoll.runtime.seat import Code
from atoll.spec.document import canonical, sha256
from atoll.spec.fleet import Executor, Node
from atoll.spec.order import Open, Order
from atoll.spec.plan import Layout

_READY = 60.0  # seconds that Ray has to start, or to let this site join
_SLACK = 10.0  # seconds beyond a rank's grace that its actor has to end
_WORDS = 4096  # bytes of a sentence
_DUMB = 10.0  # seconds without an answer after which a node is taken to hang; Ray's own time is up to a minute
# What Ray's own settings and the owner's token are in, besides what any Python needs. An address is the document's.
_ALSO, _NEVER = ("PYTHONPATH", "SSL_CERT_FILE"), ("RAY_ADDRESS", "RAY_NAMESPACE")


class Driver:
    """One life of the process that holds the connection to Ray."""

    def __init__(self, choice: Executor, devices: int, folder: Path) -> None:
        """Start it; it is `ready` seconds later. Raises `Unavailable` when there is no room for a process."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "ray.log"
        # Not in `folder` or TMPDIR: a socket's path is at most 107 bytes, and Ray appends 60 of its own.
        self._scratch = Path(tempfile.mkdtemp(prefix="atoll-ray-", dir="/tmp"))
        environment = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        environment |= {name: os.environ[name] for name in (*PASSED, *_ALSO) if name in os.environ}
        # Of a Ray that starts here: it would run the ranks at niceness 15, behind everything else of the machine.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        if choice.address == "local":  # nobody else is to have it, and a file of it could be read by others
            environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        self.environment = {name: value for name, value in environment.items() if name not in _NEVER}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_SLACK), 0))
        self._turn, self._told = threading.Lock(), {}
        try:
            with theirs, self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "atoll.runtime.ray", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(theirs.fileno(),),
                    env=self.environment,
                    start_new_session=True,  # Ctrl-C is the agent's to handle, and all of it can be ended as one
                )
        except OSError as error:
            self._control.close()
            raise Unavailable(f"executor: Ray cannot be started ({error}); free memory or processes") from None
        hello = {
            "executor": choice.model_dump(mode="json", exclude_unset=True),
            "devices": devices,
            "scratch": str(self._scratch),
        }
        self._control.send(json.dumps(hello).encode())

    def ready(self) -> dict[str, Any]:
        """Return its address and nodes once it is connected. Raises `Unavailable` when it cannot be."""
        with self._turn:
            if not self._told:
                self._told = self._heard(_READY)
        if "failed" in self._told:
            raise Unavailable(self._told["failed"])
        return self._told

    def _heard(self, seconds: float) -> dict[str, Any]:
        if not select.select([self._control], [], [], seconds)[0]:
            return {"failed": f"executor: Ray did not answer in {seconds:g} s; look at {self._log}"}
        try:
            said = self._control.recv(1 << 20)
        except OSError:
            said = b""
        return json.loads(said) if said else {"failed": f"executor: Ray's process ended; look at {self._log}"}

    def failed(self) -> str:
        """Return why it ended without connecting, if it did; "" when it is at work."""
        with self._turn:
            if not self._told and self._control.fileno() >= 0 and select.select([self._control], [], [], 0)[0]:
                self._told = self._heard(GRACE)
            return self._told.get("failed", "")

    def gone(self) -> bool:
        return self._process.poll() is not None

    def say(self, words: dict[str, Any], pipes: tuple[int, ...] = ()) -> None:
        """Raises `Unavailable` when it has ended, or takes nothing any more."""
        try:
            socket.send_fds(self._control, [json.dumps(words).encode()], pipes)
        except OSError:
            raise Unavailable(self.failed() or f"executor: Ray's process ended; look at {self._log}") from None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """End it, its ranks and the Ray that it started; returns when they are gone."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SLACK + GRACE)
        self.kill()  # all of its processes but the actors, which end with their raylet
        self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)


class Actor:
    """One rank as the agent sees it; ``words`` is a pipe that tells how it is, and closes when nothing is left."""

    def __init__(self, driver: Driver, asked: dict[str, Any]) -> None:
        """Ask the driver for it. Raises `Unavailable`."""
        self._driver = driver
        self._me = {"group": asked["group"], "life": asked["life"]}
        self.rest = b""
        self.hopeless = False  # whether it ended because no node had room for it
        self._part = b""
        self._ended = ""
        self._computed: float | None = None
        self._asked = 0.0  # when that was asked for, 0 while the answer is here
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += os.pipe()
        except OSError as error:
            for pipe in pipes:
                os.close(pipe)
            raise Unavailable(f"worker: cannot be started ({error}); raise the limit of open files") from None
        orders, self.orders, self.replies, replies, self._words, words = pipes
        try:
            driver.say(asked, (orders, replies, words))
        except Unavailable:
            for pipe in (self.orders, self.replies, self._words):
                os.close(pipe)
            raise
        finally:
            for pipe in (orders, replies, words):
                os.close(pipe)
        os.set_blocking(self.orders, False)

    def computed(self) -> float | None:
        """Return what its node told last, and ask anew; None while it is waited for.

        What a node tells that hangs does not change any more, and so the rank is lost.
        """
        self._hear(0.0)
        if self._asked:
            return None if time.monotonic() - self._asked < _DUMB else self._computed or 0.0
        self._asked = time.monotonic()
        self._tell("computed")
        return self._computed

    def kill(self) -> None:
        self._tell("kill")

    def ended(self) -> bool:
        return False  # its seat closes the replies, whoever holds the worker's own pipe

    def died(self) -> Unavailable:
        deadline = time.monotonic() + GRACE
        while not self._ended and self._hear(deadline - time.monotonic()):
            pass
        words = self._ended or self._driver.failed()
        return Unavailable(f"worker: {words or 'its rank ended with the process of Ray; look at ray.log'}")

    def _hear(self, seconds: float) -> bool:
        """Take what the driver tells of it, if that comes in time; return whether it came."""
        if not select.select([self._words], [], [], max(0.0, seconds))[0]:
            return False
        data = os.read(self._words, _WORDS)
        *lines, self._part = (self._part + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            if "computed" in told:
                self._computed, self._asked = told["computed"], 0.0
            self._ended = self._ended or told.get("ended", "")
            self.hopeless = self.hopeless or told.get("hopeless", False)
        return bool(data)

    def _tell(self, what: str) -> None:
        with contextlib.suppress(Unavailable):  # the driver has ended, and its pipes tell so
            self._driver.say({**self._me, "what": what})

    def end(self, deadline: float) -> None:
        self._tell("end")
        while self._words >= 0:
            left = deadline + _SLACK - time.monotonic()
            if left < 0 or not select.select([self._words], [], [], left)[0]:
                self._driver.kill()  # Ray hangs, and the others of this site are no better off
                deadline = time.monotonic() + _SLACK
            elif not os.read(self._words, _WORDS):
                os.close(self._words)
                self._words = -1


class ActorGroup(PipedGroup):
    """Before they open a dataset the ranks are given the job's code, for the nodes that they are on."""

    def __init__(self, driver: Driver, number: int, folder: Path, silence: float) -> None:
        name = uuid.uuid4().hex
        self._actors: list[Actor] = []
        super().__init__(self._actors, folder / f"meeting-{name}", silence, self._taking)
        self._driver, self._number, self._folder = driver, number, folder
        self._mark = folder / f"group-{name}"
        self._mark.touch()
        self._last: dict[int, Actor] = {}  # place -> who was started for it last
        self._lives = 0
        self._sent = ""

    def begin(self, ranks: int) -> None:
        """Ask for all ranks at once. Raises `Unavailable`."""
        berth = {"folder": str(self._folder), "mark": self._mark.name, "version": atoll.__version__}
        fault = faults.handed_on("worker")
        for place in range(ranks):
            self._actors.append(self._asked_for(place, what="begin", ranks=ranks, berth=berth, fault=fault))

    def _taking(self, place: int) -> Actor:
        """Ask for a rank that takes another's place; where no node had room for one, there is no other."""
        if self._last[place].hopeless:
            raise self._last[place].died()
        self._sent = ""  # it may be on a node that has no code yet
        return self._asked_for(place, what="again", fault=faults.handed_on("worker"))

    def _asked_for(self, place: int, **more: Any) -> Actor:
        asked = {"group": self._number, "place": place, "life": self._lives, **more}
        self._lives += 1
        self._last[place] = Actor(self._driver, asked)
        return self._last[place]

    def lines(self, order: Order) -> bytes:
        line = super().lines(order)
        if not isinstance(order, Open) or order.bundle == self._sent:
            return line
        self._sent = order.bundle
        return _code(Path(order.bundle)).model_dump_json().encode() + b"\n" + line

    def rest(self) -> None:
        with contextlib.suppress(Unavailable):  # the driver has ended, and with it what they held
            self._driver.say({"group": self._number, "what": "rest"})

    def close(self) -> None:
        super().close()
        self._mark.unlink(missing_ok=True)


def _code(folder: Path) -> Code:
    try:
        bundle = found_in(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise Corrupt(f"code: {folder.name} cannot be read ({error}); submit the job again") from None
    return Code(path=str(folder), digest=sha256(canonical(bundle)), bundle=bundle)


class RayExecutor:
    """Starts groups of actors; ``devices`` is the room of the Ray that it starts itself. Its log is in ``folder``."""

    confined, refuses = False, ""  # Ray's own processes start them: a site that requires sandboxes has no such executor

    def __init__(self, choice: Executor, devices: int, folder: Path) -> None:
        """Begin to start Ray, or to join the cluster. Raises `Unavailable` when Ray is not installed."""
        if importlib.util.find_spec("ray") is None:
            raise Unavailable("executor.kind: ray: Ray is not installed here; install it by: pip install 'atoll[ray]'")
        self._choice, self._devices, self._folder = choice, devices, folder
        self._turn = threading.Lock()
        self._driver: Driver | None = None
        self._groups = 0
        self._running()

    def _running(self) -> Driver:
        """Return the driver, another one when the last has ended."""
        with self._turn:
            if self._driver is not None and self._driver.gone():
                self._driver.end()
                self._driver = None
            if self._driver is None:
                self._driver = Driver(self._choice, self._devices, self._folder)
            return self._driver

    def nodes(self) -> tuple[Node, ...]:
        """Return the cluster's nodes, once it is joined. Raises `Unavailable`."""
        told = self._running().ready()["nodes"]
        return tuple(Node.model_validate(node) for node in told)

    def warm(self) -> None:
        """Ray is on its way since this was made."""

    def start(self, layout: Layout, folder: Path, grant: Grant | None = None) -> ActorGroup:
        folder.mkdir(parents=True, exist_ok=True)
        driver = self._running()
        with self._turn:
            self._groups += 1
            number = self._groups
        group = ActorGroup(driver, number, folder, self._choice.silence)
        try:
            group.begin(layout.ranks)
        except Unavailable:
            group.close()
            raise
        return group

    def close(self) -> None:
        """End the Ray that it started, or leave the cluster."""
        with self._turn:
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.end()
