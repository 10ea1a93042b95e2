"""How a site or a relay stays with its hub: it dials, has a session, and dials again when that is lost."""

import logging
import random
import threading
from collections.abc import Callable

from atoll.boundary.gate import Uplink
from atoll.boundary.identity import Identity
from atoll.errors import LinkLost

_BACKOFF = (0.1, 5.0)  # seconds between two attempts to dial: from, up to
log = logging.getLogger(__name__)


def keep_dialling(
    gate: Uplink,
    address: str,
    proof: Callable[[], Identity | str],
    session: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Have one ``session()`` after another with whoever is at ``address``, until ``stop`` is set.

    ``proof`` gives, for each dial, the identity of who joined or the secret of one that the hub started. Raises
    `Denied` when the hub does not admit it.
    """
    wait = _BACKOFF[0]
    while not stop.is_set():
        try:
            gate.dial(address, proof())
            wait = _BACKOFF[0]
            session()
        except LinkLost as error:
            log.info("%s; dialling again in %.1f s", error, wait)
            stop.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 - spreads them, guards nothing
            wait = min(2 * wait, _BACKOFF[1])
