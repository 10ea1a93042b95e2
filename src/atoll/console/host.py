"""Where the API is served: finds the hub that runs for a home, or starts one inside this process."""

import json
import logging
import os
import re
import resource
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atoll import private
from atoll.console import login
from atoll.console.logs import trim_home
from atoll.console.proofs import proof
from atoll.errors import Unavailable

if TYPE_CHECKING:
    import uvicorn

    from atoll.runtime.hub import Hub

START_SECONDS = 40.0  # how long another process may take from locking a home to answering for it, sites and all
CLOSE_SECONDS = 5.0
_FILES = 16384  # open at once: a hub's 2048 connections several times over, and its files
_LOOPBACK = re.compile(r"http://127\.0\.0\.1:[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a hub answers and what opens it; ``close`` ends a hub of this process and does nothing to another's."""

    url: str
    token: str
    embedded: bool
    close: Callable[[], None]


class Server:
    """The API of one hub in a thread of this process, on loopback only."""

    def __init__(self, server: "uvicorn.Server", listener: socket.socket, closing: threading.Event) -> None:
        self._server, self._listener, self._closing = server, listener, closing
        host, port = listener.getsockname()
        self.url = f"http://{host}:{port}"
        self._thread = threading.Thread(target=server.run, args=([listener],), name="atoll-api", daemon=True)

    def start(self) -> None:
        """Serve; returns when requests are answered. Raises `Unavailable` when the server does not come up."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise Unavailable(f"api: the server at {self.url} did not start; run again with --debug")
            time.sleep(0.005)

    def close(self) -> None:
        """Stop serving; open streams end within about a second."""
        self._closing.set()
        self._server.should_exit = True
        self._thread.join(CLOSE_SECONDS)
        self._listener.close()


def serve(hub: "Hub", token: str, port: int = 0) -> Server:
    """Serve the API of ``hub`` on 127.0.0.1; port 0 takes a free one. Raises `Unavailable` when the port is taken."""
    import uvicorn

    from atoll.console.api import create_app
    from atoll.serving.punctual import CONNECTIONS, punctual

    # With the protocol named, asyncio turns Nagle's delay off; without it each answer may wait 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise Unavailable(f"port {port}: cannot be used ({error.strerror}); choose another with --port") from None
    app = create_app(hub, token)
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())  # heard under --debug, silent otherwise
    config = uvicorn.Config(
        app,
        http=punctual(),
        limit_concurrency=CONNECTIONS,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    server = Server(uvicorn.Server(config), listener, app.state.streams.closing)
    server.start()
    return server


def attach(home: Path, sites: bool, port: int = 0, site_port: int = 0, token: str | None = None) -> Address:
    """Return the address of the home's hub: of the process that runs it, else of one started here. With a user's
    ``token``, or where `atoll login` was run in this home, none is started.

    ``sites`` also starts the home's own sites when the hub is started here; other sites dial ``site_port``. One hub
    per home: when two commands start at once, the one that comes second waits for the first. Raises `Unavailable`.
    """
    found = find(home, token)
    if found is None and token is not None:
        raise Unavailable(f"{home}: no hub runs there for this token; `atoll login --hub URL` says where one runs")
    return found or _start(home, sites, port, site_port)


def find(home: Path, token: str | None = None) -> Address | None:
    """Return the running hub that this home is logged in at, or the home's own, if one answers and proves to be it;
    for a user by a ``token``. Raises `Unavailable` where the home is logged in and nobody answers."""
    kept = login.read(home)
    if kept is not None:
        if not login.LOOPBACK.fullmatch(kept.url) or login.proven(kept.url) != kept.key:
            raise Unavailable(
                f"{kept.url}: the hub that this home is logged in at does not answer; or run atoll logout"
            )
        return Address(kept.url, token or kept.token, embedded=False, close=_nothing)
    known = _read(home)
    if known is None:
        return None
    url, own = known
    return Address(url, token or own, embedded=False, close=_nothing) if _answers(url, own) else None


def _start(home: Path, sites: bool, port: int, site_port: int) -> Address:
    from atoll.runtime.cells import Cells
    from atoll.runtime.hub import Hub, take
    from atoll.serving.deployments import Deployments

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            lock = take(home)
            break
        except Unavailable:  # another process holds the home: it is starting, or ending
            found = find(home)
            if found is not None:
                return found
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    token = secrets.token_urlsafe(32)
    allow_files(_FILES)
    try:
        trim_home(home)
        hub = Hub(home, Deployments(home / "hub" / "logs", cells=Cells.of(home)), site_port, lock)
    except BaseException:
        lock.close()
        raise
    try:
        server = serve(hub, token, port)
    except BaseException:
        hub.close()
        raise

    def close() -> None:
        _address_file(home).unlink(missing_ok=True)  # first, so that no command finds a hub on its way out
        server.close()
        hub.close()

    try:
        private.write(_token_file(home), token.encode())
        if sites:
            hub.start_sites()
        # Last: a command that finds this hub would otherwise find it without its sites.
        private.write(_address_file(home), json.dumps({"pid": os.getpid(), "url": server.url}).encode())
    except BaseException:
        close()
        raise
    return Address(server.url, token, embedded=True, close=close)


def allow_files(count: int) -> int:
    """Let this process have so many open files, or as many as the system grants it; return how many it may have.

    Shells give a process about a thousand by default, and a hub has several connections with each of its sites.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def _answers(url: str, token: str) -> bool:
    """Ask for a proof before any token is sent: the port may belong to a stranger by now."""
    challenge = secrets.token_urlsafe(16)
    given = login.health(url, challenge).get("proof")
    return isinstance(given, str) and secrets.compare_digest(given.encode(), proof(token, challenge).encode())


def _read(home: Path) -> tuple[str, str] | None:
    """Return (url, token) as last written, if both are there and the url is a loopback one."""
    try:
        url = json.loads(_address_file(home).read_text(encoding="utf-8"))["url"]
        token = _token_file(home).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise Unavailable(f"{home}: its hub's address cannot be read ({error.strerror}); check who owns it") from None
    return (url, token) if isinstance(url, str) and _LOOPBACK.fullmatch(url) and token else None


def _address_file(home: Path) -> Path:
    return home / "hub" / "address.json"


def _token_file(home: Path) -> Path:
    return home / "hub" / "token"


def _nothing() -> None:
    """A hub of another process is not ours to end."""
