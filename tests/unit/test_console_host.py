"""Finding a hub: a file that names a stranger's port gets no token."""

import http.server
import json
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.console.host import allow_files, find
from atoll.console.proofs import proof

TOKEN = "t" * 43


class Health(http.server.BaseHTTPRequestHandler):
    """Answers /v1/health with a proof made from the server's own idea of the token, and keeps what it was sent."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Listener)
        server.heard.append(str(self.headers) + self.path)
        challenge = self.path.partition("challenge=")[2]
        body = json.dumps({"proof": proof(server.token, challenge)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Tests print nothing."""


class Listener(http.server.HTTPServer):
    token = TOKEN

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Health)
        self.heard: list[str] = []


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def write(home: Path, address: object, token: str = TOKEN) -> None:
    (home / "hub").mkdir()
    (home / "hub" / "address.json").write_text(address if isinstance(address, str) else json.dumps(address))
    (home / "hub" / "token").write_text(token)


def test_a_hub_that_proves_the_token_is_found(tmp_path: Path, listener: Listener):
    write(tmp_path, {"pid": 1, "url": f"http://127.0.0.1:{listener.server_port}"})
    found = find(tmp_path)
    assert found is not None
    assert (found.token, found.embedded) == (TOKEN, False)
    assert listener.heard
    assert TOKEN not in "".join(listener.heard), "the token is not sent before the proof"


def test_a_stranger_on_a_reused_port_is_no_hub(tmp_path: Path, listener: Listener):
    listener.token = "another"
    write(tmp_path, {"pid": 1, "url": f"http://127.0.0.1:{listener.server_port}"})
    assert find(tmp_path) is None
    assert TOKEN not in "".join(listener.heard)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "{",
        "[]",
        {"pid": 1},
        {"url": 3},
        {"url": "http://203.0.113.5:80"},
        {"url": "http://127.0.0.1:80@203.0.113.5/"},
    ],
)
def test_an_address_that_is_none_is_no_hub(tmp_path: Path, address: object):
    write(tmp_path, address)
    assert find(tmp_path) is None


def test_nobody_at_the_port_is_no_hub(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert find(tmp_path / "nowhere") is None
    write(tmp_path, {"pid": 1, "url": f"http://127.0.0.1:{port}"})
    assert find(tmp_path) is None


def test_a_hub_may_have_more_open_files_than_a_shell_gives_and_no_more_than_the_system_grants():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 10, hard))
        assert allow_files(soft - 5) == soft - 5 == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert allow_files(soft - 8) == soft - 5, "what there is already stays"
        if hard != resource.RLIM_INFINITY:
            assert allow_files(hard + 1) == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
