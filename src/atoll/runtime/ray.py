"""The process that holds a site's connection to Ray: the driver that its groups' ranks are seated by (`seating`).

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
from typing import Any

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - of a compiled module
from ray.exceptions import AuthenticationError, RayError

from atoll.errors import Unavailable
from atoll.runtime.seating import END, Group, thread
from atoll.spec.fleet import Device, Executor, Node

_STORE = 80 << 20  # bytes of Ray's object store, nearly the least it takes: no tensor passes through it
_PIECE = 1 << 16
_NODES = 64  # that are told: enough to plan with
_KNOCK = 20.0  # seconds a cluster has to answer
_OPEN, _SHUT = 10, 11  # what `knock` ends with
Said = tuple[dict[str, Any], tuple[int, ...]]


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
    thread(_hear, control, heard, ready)
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
        if asked["what"] == "begin":
            coming.setdefault(number, []).append(pipes)
            if len(coming[number]) == asked["ranks"]:
                groups[number] = Group(asked, choice, coming.pop(number))
        elif number in groups and asked["what"] == "end":
            groups.pop(number).end()
        elif number in groups:
            _change(groups[number], asked, pipes)
        else:
            for pipe in itertools.chain(pipes, *coming.pop(number, [])):
                os.close(pipe)
    for group in groups.values():
        group.end()
    deadline = time.monotonic() + END
    for group in groups.values():
        group.thread.join(max(0.0, deadline - time.monotonic()))
    ray.shutdown()
    shutil.rmtree(hello["scratch"], ignore_errors=True)


def _change(group: Group, asked: dict[str, Any], pipes: tuple[int, ...]) -> None:
    if asked["what"] == "again":
        group.again(asked, pipes)
    elif asked["what"] == "computed":
        group.computed(asked["life"])
    elif asked["what"] == "kill":
        group.kill(asked["life"])
    else:
        group.rest()


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
        time.sleep(2 * END)
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
