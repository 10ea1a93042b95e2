"""The process that answers: one model behind HTTP on a loopback port.

    python -m atoll.serving.replica DOOR_FD

Its door is a socket that the hub has bound, for it may live where there is no network to take a port of. It reads one
`Placement` as a JSON line on stdin, and writes one `Ready` as a JSON line on stdout. It ends when its stdin ends,
because then the hub that started it is gone, and on SIGTERM; either way requests in flight are answered, unless it
lives in a sandbox, which is gone with the hub.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

import uvicorn

from atoll.errors import AtollError, Unavailable
from atoll.serving.batcher import Batcher
from atoll.serving.http import application
from atoll.serving.placement import Placement, Ready, no_port
from atoll.serving.punctual import CONNECTIONS, punctual
from atoll.spec.document import parse_json

if TYPE_CHECKING:
    from atoll.serving.engine import Engine

_DRAIN = 5  # seconds for requests in flight when the replica is told to end


def main() -> int:
    """Answer until told to end; return the exit code."""
    # Set before torch loads: torch.set_num_threads in one thread does not bind another.
    os.environ["OMP_NUM_THREADS"] = "1"
    voice = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the user's code prints belongs in the log, not in front of the ready line
    try:
        placement = parse_json(Placement, sys.stdin.buffer.readline(), "placement")
        door = socket.socket(fileno=int(sys.argv[1]))
        # ONE thread for all torch work, the loading too: it owns torch's thread settings.
        thread = ThreadPoolExecutor(1, thread_name_prefix="torch")
        engine = thread.submit(_load, placement).result()
    except AtollError as error:
        traceback.print_exc()
        _say(voice, Ready(failed=str(error)))
        return 1
    asyncio.run(_answer(placement, engine, thread, door, voice))
    thread.shutdown()
    return 0


def _load(placement: Placement) -> "Engine":
    from atoll.serving import engine  # torch comes in here, in its own thread, after the environment is set

    try:
        weights = Path(placement.weights).read_bytes()
    except OSError as error:
        raise Unavailable(f"weights of {placement.model.reference}: {error.strerror}; restore the blob") from error
    return engine.load(Path(placement.bundle), placement.model, weights, placement.columns, placement.pretrained)


async def _answer(
    placement: Placement, engine: "Engine", thread: ThreadPoolExecutor, door: socket.socket, voice: IO[str]
) -> None:
    deployment = placement.deployment
    batcher = Batcher(engine.predict, thread, deployment.max_batch, deployment.queue)

    @contextlib.asynccontextmanager
    async def life(_: object) -> AsyncIterator[None]:
        batches = asyncio.create_task(batcher.run())
        try:
            yield
        finally:
            batches.cancel()
            await asyncio.gather(batches, return_exceptions=True)

    try:
        door.listen(2048)  # from here on connections queue, so it is true to say that it answers
    except OSError as error:
        _say(voice, Ready(failed=no_port(deployment.port, error)))
        raise SystemExit(1) from error
    app = application(placement.model, engine.columns.check, batcher, life)
    config = uvicorn.Config(
        app,
        http=punctual(),
        limit_concurrency=CONNECTIONS,
        access_log=False,
        log_level="warning",
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=_DRAIN,
    )
    server = uvicorn.Server(config)

    def end(*_: object) -> None:
        server.should_exit = True

    # uvicorn catches SIGTERM itself while it serves, then raises it again for whoever caught it before: that is us.
    signal.signal(signal.SIGTERM, end)
    orphaned = asyncio.create_task(_stdin_ends())
    orphaned.add_done_callback(end)
    _say(voice, Ready())
    await server.serve(sockets=[door])
    orphaned.cancel()


async def _stdin_ends() -> None:
    stream = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), sys.stdin)
    while await stream.read(4096):
        pass


def _say(voice: IO[str], ready: Ready) -> None:
    voice.write(json.dumps(ready.model_dump()) + "\n")
    voice.flush()


if __name__ == "__main__":
    sys.exit(main())
