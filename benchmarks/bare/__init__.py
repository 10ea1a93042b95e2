"""The limit: K processes and one server that move the same bytes over a bare socket, with TLS or without, and add."""

import multiprocessing as mp
import resource
import socket
import threading
import time
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

from atoll.boundary.certificates import Authority
from atoll.boundary.identity import Identity, new_key, pem_of
from atoll.boundary.secure import client_context, server_context

_PIECE = 4 << 20  # bytes asked of the socket at a time
_CONTEXT = mp.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Bare:
    """Seconds of each round but the first, and the server's peak of resident memory in MB."""

    rounds: tuple[float, ...]
    memory_mb: float

    @property
    def median(self) -> float:
        return float(np.median(self.rounds))


def measure(clients: int, size: int, rounds: int, folder: Path | None = None) -> Bare:
    """Time ``rounds`` of ``size`` bytes down to each client, up from each, and added with a weight by the server.

    With ``folder`` each connection is mutual TLS 1.3 under a CA made there.
    """
    found: Queue[Bare] = _CONTEXT.Queue()
    server = _CONTEXT.Process(target=_serve, args=(clients, size, rounds, folder, found))
    server.start()
    try:
        return found.get(timeout=600)
    finally:
        server.join()


def _serve(clients: int, size: int, rounds: int, folder: Path | None, found: "Queue[Bare]") -> None:
    papers = _papers(folder, clients) if folder is not None else None
    listening = socket.create_server(("127.0.0.1", 0), backlog=clients)
    port = listening.getsockname()[1]
    processes = [
        _CONTEXT.Process(target=_client, args=(port, size, rounds, papers[1 + number] if papers else None))
        for number in range(clients)
    ]
    for process in processes:
        process.start()
    connections = [listening.accept()[0] for _ in processes]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if papers is not None:
        context = server_context(papers[0])
        connections = [context.wrap_socket(connection, server_side=True) for connection in connections]
    seconds = _rounds(connections, size, rounds)
    for process in processes:
        process.join()
    found.put(Bare(tuple(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _rounds(connections: list[socket.socket], size: int, rounds: int) -> list[float]:
    model, total = np.zeros(size // 4, np.float32), np.zeros(size // 4, np.float32)
    locks = [threading.Lock() for _ in range(-(-size // _PIECE))]
    weight = np.float32(1 / len(connections))
    seconds: list[float] = []

    def one(connection: socket.socket) -> None:
        connection.sendall(memoryview(model).cast("B"))
        received, scaled = np.empty(_PIECE // 4, np.float32), np.empty(_PIECE // 4, np.float32)
        for number, start in enumerate(range(0, model.size, _PIECE // 4)):
            length = min(_PIECE // 4, model.size - start)
            _fill(connection, memoryview(received[:length]).cast("B"))
            np.multiply(received[:length], weight, out=scaled[:length])
            with locks[number]:
                total[start : start + length] += scaled[:length]

    for _ in range(rounds + 1):
        began = time.perf_counter()
        total[:] = 0
        threads = [threading.Thread(target=one, args=(connection,)) for connection in connections]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        model, total = total, model
        seconds.append(time.perf_counter() - began)
    assert abs(float(model[-1]) - 1) < 1e-4, "the sum is wrong"
    return seconds


def _client(port: int, size: int, rounds: int, identity: Identity | None) -> None:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if identity is not None:
        connection = client_context(identity).wrap_socket(connection)
    received, update = np.empty(size, np.uint8), np.ones(size // 4, np.float32)
    for _ in range(rounds + 1):
        _fill(connection, memoryview(received))
        connection.sendall(memoryview(update).cast("B"))
    connection.close()


def _fill(connection: socket.socket, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        read = connection.recv_into(view[filled : filled + _PIECE])
        if not read:
            raise EOFError("the other end is gone")
        filled += read


def _papers(folder: Path, clients: int) -> list[Identity]:
    """Return the server's identity and one for each client."""
    if not (folder / "root.pem").exists():
        Authority.create(folder)
    authority = Authority(folder)
    hub = authority.identity()
    found = [hub]
    for number in range(clients):
        key = new_key()
        certificate = authority.certify(f"client-{number}", key.public_key())
        found.append(Identity(pem_of(key), certificate.pem, hub.root))
    return found
