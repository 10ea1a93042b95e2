"""The process that holds a site's connection to Ray: a driver that seats ranks in placement groups.

    python -m atoll.runtime.ray SOCKET_FD      serves an agent at the other end of the socket
    python -m atoll.runtime.ray knock ADDRESS  tells whether a cluster lets one in without a token

It is apart from the agent because Ray ends the process of a driver whose cluster goes away, and because what Ray hands
its driver is unpickled there: the agent has the site's keys and journal. When the socket closes, the agent is gone:
this process ends its ranks and the Ray that it started, if it did. What it started dies with its main thread anyway.
"""

import contextlib
import itertools
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - of a compiled module
from ray.exceptions import (
    AuthenticationError,
    RayActorError,
    RayError,
)
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    PlacementGroupSchedulingStrategy,
)

from atoll.errors import AtollError, Unavailable
from atoll.runtime.seat import Berth, Seat
from atoll.spec.fleet import Device, Executor, Node

_PLACED = 120.0  # seconds that a cluster has to find room for a group, and to bring nodes where it can
_STEP = 0.5  # seconds between two looks at whether a group that waits for room is still wanted
_END = 8.0  # seconds that the ranks and Ray have to end once the agent is gone
_STORE = 80 << 20  # bytes of Ray's object store, nearly the least it takes: no tensor passes through it
_PIECE = 1 << 16
_WORDS = 2000  # bytes of a sentence: a pipe takes it whole
_NODES = 64  # that are told: enough to plan with
_KNOCK = 20.0  # seconds a cluster has to answer
_OPEN, _SHUT = 10, 11  # what `knock` ends with
Said = tuple[dict[str, Any], tuple[int, ...]]


class Group:
    """The ranks of one layout, with three pipes to each, whose other ends the agent has.

    Whoever reads or writes a pipe closes it: its number can be another file's at once.
    """

    def __init__(self, asked: dict[str, Any], choice: Executor, pipes: list[tuple[int, ...]]) -> None:
        """``pipes`` are, for each rank, where orders come from, where replies go, and where it is told how it ended."""
        self._asked, self._choice, self._pipes = asked, choice, pipes
        self._over, self._saying = threading.Event(), threading.Lock()
        self._seats: list[Any] = []
        self._room: Any = None
        self.thread = _thread(self._live)

    def end(self) -> None:
        """Let it end; returns at once."""
        self._over.set()

    def _live(self) -> None:
        seated = False
        try:
            self._place()
            seated = True
            self._work()
        except (AtollError, RayError) as error:
            for number in range(len(self._pipes)):
                self._say(number, _sentence(error))
        finally:
            self._leave(seated)

    def _leave(self, seated: bool) -> None:
        """Give the room back. The last pipes that close tell the agent that nothing is left."""
        for orders, replies, _ in self._pipes if not seated else ():
            os.close(orders)
            os.close(replies)
        for seat in self._seats:
            with contextlib.suppress(RayError):
                ray.kill(seat)
        if self._room is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(self._room)
        with self._saying:
            for *_, words in self._pipes:
                os.close(words)
            self._pipes = []

    def _work(self) -> None:
        answers = [_thread(self._answer, number) for number in range(len(self._seats))]
        for number in range(len(self._seats)):
            _thread(self._order, number)
        self._over.wait()
        with contextlib.suppress(RayError):  # of an actor that is gone nothing is left to end
            ray.wait([seat.end.remote() for seat in self._seats], num_returns=len(self._seats), timeout=_END)
        for answer in answers:
            answer.join(_END)

    def _place(self) -> None:
        """Get room for all ranks at once, or none, and start them. Raises `Unavailable` and Ray's errors."""
        ranks, choice = len(self._pipes), self._choice
        need = {"CPU": choice.cpus, **({"GPU": choice.gpus} if choice.gpus else {})}
        labels: dict[str, Any] = {"bundle_label_selector": [choice.labels] * ranks} if choice.labels else {}
        self._room = placement_group([need] * ranks, strategy="PACK", **labels)
        self._wait_for_room(need)
        at = placement_group_table(self._room)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        many = len(set(at.values())) > 1
        takes: dict[str, Any] = {"num_cpus": choice.cpus, "num_gpus": choice.gpus, "max_concurrency": 4}
        actor: Any = ray.remote(**takes)(Seat)
        started: list[Any] = []
        for rank in range(ranks):
            strategy = PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=rank)
            seat = actor.options(scheduling_strategy=strategy).remote()
            berth = Berth(**self._asked["berth"], rank=rank, address=addresses[at[rank]] if many else "")
            started.append(seat.start.remote(berth, self._asked["fault"] if rank == 0 else {}))
            self._seats.append(seat)
        ray.get(started, timeout=_PLACED)

    def _wait_for_room(self, need: dict[str, float]) -> None:
        deadline = time.monotonic() + _PLACED
        while not self._room.wait(_STEP):
            if self._over.is_set():
                raise Unavailable("its group was ended before the Ray cluster had room for it")
            if time.monotonic() > deadline:
                takes = ", ".join(f"{amount:g} {name}" for name, amount in need.items())
                on = f" on nodes labelled {json.dumps(self._choice.labels)}" if self._choice.labels else ""
                raise Unavailable(
                    f"the Ray cluster had no room in {_PLACED:g} s for {len(self._pipes)} ranks with {takes} each{on}; "
                    "add nodes, or ask for less in the job's layout or the site's executor"
                )

    def _order(self, number: int) -> None:
        """Carry what the agent writes to a rank, until it closes the pipe: then the group is of no more use."""
        seat, orders = self._seats[number], self._pipes[number][0]
        try:
            while data := os.read(orders, _PIECE):
                ray.get(seat.write.remote(data))
        except RayActorError:
            return  # `_answer` meets it, too, and tells it; the agent then ends the group
        except RayError as error:
            self._say(number, _sentence(error))
        finally:
            os.close(orders)
        self._over.set()

    def _answer(self, number: int) -> None:
        """Carry what a rank says to the agent; when it has ended, say how."""
        seat, (_, replies, _) = self._seats[number], self._pipes[number]
        try:
            while data := cast("bytes", ray.get(seat.read.remote())):
                _write(replies, data)
            self._say(number, f"a rank ended {ray.get(seat.how.remote())}; its log is in the site's folder")
        except RayError as error:
            self._say(number, _sentence(error))
        except BrokenPipeError:
            self._over.set()  # the agent does not listen any more
        finally:
            os.close(replies)

    def _say(self, number: int, words: str) -> None:
        with self._saying, contextlib.suppress(BrokenPipeError, IndexError):  # nobody listens, or all is over
            _write(self._pipes[number][2], " ".join(words.split()).encode(errors="replace")[:_WORDS] + b"\n")


def _thread(work: Callable[..., None], *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


def _write(pipe: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _sentence(error: Exception) -> str:
    """Say what happened in one sentence, also for one of Ray's errors, which quote whole tracebacks."""
    cause = getattr(error, "cause", error)  # of one that was raised in an actor
    if isinstance(cause, AtollError):
        return str(cause)
    if isinstance(error, RayActorError):
        return "a rank ended with its Ray actor, which was killed or whose node went away"
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"Ray: {first[:300]}; the site's ray.log has all of it"


# --- the cluster ------------------------------------------------------------------------------------------------------


def connect(choice: Executor, devices: int, scratch: str) -> None:
    """Start a Ray for the site alone, or join the one that its owner named. Raises `Unavailable`.

    Never the one that happens to run on this machine: ``ray.init()`` without an address would join that.
    """
    quiet = {"log_to_driver": False, "configure_logging": False, "namespace": "atoll"}
    if choice.address == "local":
        own = {"num_cpus": devices, "include_dashboard": False, "object_store_memory": _STORE, "_temp_dir": scratch}
        ray.init(address="local", **own, **quiet)
        return
    _refuse_an_open_one(choice.address)
    _refuse_another_version(choice.address)
    try:
        ray.init(address=choice.address, **quiet)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no reason told")
        raise Unavailable(
            f"executor.address: the Ray cluster at {choice.address} cannot be joined ({first[:200]}); a site is "
            "on one of its nodes: start one here by `ray start`, or mend the address"
        ) from None


def _refuse_an_open_one(address: str) -> None:
    """Raise `Unavailable` unless the cluster turns away who brings no token: anybody could run code on its nodes."""
    silent = Unavailable(f"executor.address: no Ray answers at {address}; start one by `ray start`, or mend it")
    command = [sys.executable, "-P", "-m", "atoll.runtime.ray", "knock", address]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK).close()  # Ray would try for a minute
        done = subprocess.run(command, env={**environment, "RAY_AUTH_MODE": "disabled"}, timeout=_KNOCK, check=False)
    except (OSError, subprocess.TimeoutExpired):
        raise silent from None
    if done.returncode == _OPEN:
        raise Unavailable(
            f"executor.address: the Ray cluster at {address} lets in whoever asks, and runs their code; start it "
            "with RAY_AUTH_MODE=token on every node"
        )
    if done.returncode != _SHUT:
        raise silent


def _refuse_another_version(address: str) -> None:
    """Raise `Unavailable` for a cluster that does not take the token, or with which Ray would not work."""
    try:
        told = json.loads(_asked(address) or b"{}")
    except AuthenticationError:
        raise Unavailable(
            f"executor.address: the Ray cluster at {address} does not take this site's token; put its token in "
            "RAY_AUTH_TOKEN, or in a file that RAY_AUTH_TOKEN_PATH names"
        ) from None
    here, there = (ray.__version__, sys.version.split()[0]), (told.get("ray_version"), told.get("python_version"))
    if here != there:
        raise Unavailable(
            f"executor.address: the cluster at {address} has Ray {there[0]} and Python {there[1]}, and this site Ray "
            f"{here[0]} and Python {here[1]}; install the same"
        )


def knock(address: str) -> int:
    """Ask as who has no token: this process has none."""
    try:
        _asked(address)
    except AuthenticationError:
        return _SHUT
    return _OPEN


def _asked(address: str) -> bytes | None:
    """Ask for what every driver asks first: which versions a cluster has. Raises Ray's errors."""
    return GcsClient(address=address).internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster", timeout=_KNOCK)


def nodes(choice: Executor) -> tuple[Node, ...]:
    """Return the nodes that ranks may be on, with a device for each rank that there is room for."""
    found: list[Node] = []
    for node in ray.nodes():
        has, labels = node["Resources"], node["Labels"]
        if not node["Alive"] or any(labels.get(name) != value for name, value in choice.labels.items()):
            continue
        room = [has.get("CPU", 0) / choice.cpus]
        room += [has.get("GPU", 0) / choice.gpus] if choice.gpus else []
        count = int(min(room))
        memory = int(has.get("memory", 0)) // max(count, 1)
        device = Device(kind="cuda" if choice.gpus else "cpu", memory_bytes=memory or 1 << 30)
        if count:
            found.append(Node(name=node["NodeManagerHostname"], devices=(device,) * count))
    return tuple(found)


# --- the process ------------------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> None:
    """Do what the agent says, until it closes the socket."""
    hello = json.loads(control.recv(_PIECE))
    choice = Executor.model_validate(hello["executor"])
    heard: queue.SimpleQueue[Said | None] = queue.SimpleQueue()
    ready = threading.Event()
    _thread(_hear, control, heard, ready)
    # In the main thread: what Ray starts here is killed when the thread that started it ends (PR_SET_PDEATHSIG).
    try:
        connect(choice, hello["devices"], hello["scratch"])
    except Unavailable as error:
        control.send(json.dumps({"failed": str(error)}).encode())
        return
    ready.set()
    told = [node.model_dump(mode="json") for node in nodes(choice)]
    control.send(json.dumps({"address": ray.get_runtime_context().gcs_address, "nodes": told[:_NODES]}).encode())
    groups: dict[int, Group] = {}
    coming: dict[int, list[tuple[int, ...]]] = {}  # the pipes of a group whose other ranks are not told yet
    while (said := heard.get()) is not None:
        asked, pipes = said
        number = asked["group"]
        if "berth" in asked:
            coming.setdefault(number, []).append(pipes)
            if len(coming[number]) == asked["ranks"]:
                groups[number] = Group(asked, choice, coming.pop(number))
        elif number in groups:
            groups.pop(number).end()
        else:
            for pipe in itertools.chain(*coming.pop(number, [])):
                os.close(pipe)
    for group in groups.values():
        group.end()
    deadline = time.monotonic() + _END
    for group in groups.values():
        group.thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()
    shutil.rmtree(hello["scratch"], ignore_errors=True)


def _hear(control: socket.socket, heard: "queue.SimpleQueue[Said | None]", ready: threading.Event) -> None:
    """Put what the agent says into the queue; see to it that this process ends once the agent is gone."""
    with contextlib.suppress(ConnectionError):  # it left without having read all that it was told
        while True:
            data, pipes, _, _ = socket.recv_fds(control, _PIECE, 3)
            if not data:
                break
            heard.put((json.loads(data), tuple(pipes)))
    heard.put(None)
    if ready.wait(0.0):
        time.sleep(2 * _END)
    os._exit(1)  # it hangs in Ray; what it started ends with it


def main() -> int:
    first, *rest = sys.argv[1:]
    if first == "knock":
        return knock(rest[0])
    with socket.socket(fileno=int(first)) as control:
        control.set_inheritable(False)
        serve(control)
    return 0


if __name__ == "__main__":
    sys.exit(main())
