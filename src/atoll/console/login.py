"""Who speaks to a hub from here: the hub's own account by its folder, or a user by a token.

A token comes from the environment (ATOLL_TOKEN), from a file, or from the login that `atoll login` keeps in the home;
never from a command line, which every user of a machine can read.
"""

import os
import re
import secrets
from pathlib import Path
from typing import Any, cast

from atoll import private
from atoll.console.proofs import fingerprint, signed, signer
from atoll.errors import Denied, Invalid, NotFound, Unavailable
from atoll.spec.document import Document, parse_json

LOOPBACK = re.compile(r"http://(127\.0\.0\.1|localhost):[0-9]{1,5}")
_LONGEST = 16384  # characters


class Login(Document):
    """A hub elsewhere on this machine, or at the other end of a tunnel, and the key that proves that it is that one."""

    url: str
    token: str
    key: str  # its public key for tokens, in hexadecimal


def given_token(file: Path | None) -> str | None:
    """Return the token of a file, else of the environment, else None. Raises `NotFound`, `Denied`, `Invalid`."""
    if file is None:
        return os.environ.get("ATOLL_TOKEN", "").strip() or None
    data = private.read(file, "others can read this token; run chmod 600 on it, and ask for another token")
    if data is None:
        raise NotFound(f"{file}: there is no such file; check the path")
    text = data.decode(errors="ignore").strip()
    if not text or not text.isprintable() or len(text) > _LONGEST:
        raise Invalid(f"{file}: holds no token; it is one line, as `atoll user token` prints it")
    return text


def log_in(home: Path, url: str, token: str) -> None:
    """Keep a token for the hub at ``url``, once that has proved to be the one that made it.

    Raises `Invalid` for an address that is none, `Denied` for another hub, `Unavailable`.
    """
    url = url.rstrip("/")
    if not LOOPBACK.fullmatch(url):
        raise Invalid(f"--hub: {url!r} is not http://127.0.0.1:PORT; a hub elsewhere is reached through a tunnel")
    key = proven(url)
    if key is None:
        raise Unavailable(f"{url}: no hub answers there; `atoll hub start --port PORT` names its port")
    made = signer(token)
    # What another party signed, as an identity provider does, is for the hub to judge: it is believed this first time.
    if made and made != fingerprint(bytes.fromhex(key)):
        raise Denied(f"{url}: this hub did not make the token; check the address")
    private.write(home / "login.json", Login(url=url, token=token, key=key).model_dump_json().encode())


def log_out(home: Path) -> bool:
    """Forget the login of this home; False where there is none."""
    known = read(home) is not None
    (home / "login.json").unlink(missing_ok=True)
    return known


def read(home: Path) -> Login | None:
    """Return the login that this home keeps, if it keeps one. Raises `Invalid`, `Unavailable`."""
    path = home / "login.json"
    try:
        return parse_json(Login, path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Unavailable(f"{path}: cannot be read ({error.strerror}); check who owns it") from None


def proven(url: str) -> str | None:
    """Return the public key, in hexadecimal, that a hub at this address proved to have the private one of."""
    challenge = secrets.token_urlsafe(16)
    said = health(url, challenge)
    key, signature = said.get("key"), said.get("signature")
    if not (isinstance(key, str) and isinstance(signature, str)):
        return None
    try:
        good = signed(bytes.fromhex(key), challenge, bytes.fromhex(signature))
    except ValueError:
        return None
    return key if good else None


def health(url: str, challenge: str) -> dict[str, Any]:
    """Return what a hub at this address says of itself; nothing where none answers."""
    import httpx

    try:
        answer = httpx.get(f"{url}/v1/health", params={"challenge": challenge}, timeout=5.0, trust_env=False)
        said: Any = answer.json()
    except (httpx.HTTPError, ValueError):
        return {}
    return cast("dict[str, Any]", said) if isinstance(said, dict) else {}
