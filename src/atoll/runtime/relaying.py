"""The process of a relay: joins a hub like a site, has its port certified, and serves those behind it."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from atoll.boundary.gate import enrol, listen
from atoll.boundary.identity import Identity, Ticket
from atoll.boundary.keyring import Keyring
from atoll.errors import AtollError, LinkLost
from atoll.runtime.porter import Porter
from atoll.runtime.relay import Relay
from atoll.runtime.site import read

_AGAIN = 2.0  # seconds between two tries to have the port certified, while the hub is away
log = logging.getLogger(__name__)


def relay(home: Path, token: str, host: str, port: int) -> None:
    """Serve the relay in ``home`` for the hub that made ``token``, until interrupted, as `atoll.runtime.site.join`.

    ``token`` may itself be of a place behind another relay. Raises `Invalid` for a token that is none or another
    site's, `Denied` when the hub refuses it or did not invite a relay, `Unavailable` when the port is taken.
    """
    ticket = Ticket.read(token)
    site = read(home)
    keys = Keyring(home, site.name)

    def proof() -> Identity:
        return keys.join(ticket, lambda identity, request: enrol(ticket.address, identity, request))

    proof()
    porter = _certified(ticket.address, proof)
    made = Relay(site, home, porter.told, porter.turn_away)
    door = listen(made, porter, host, port)
    porter.changed = door.recheck

    def calm() -> None:
        try:
            if keys.due():
                keys.renew(lambda request: enrol(ticket.address, keys.identity, request))
            porter.renew()
        except AtollError as error:  # both are good for a while yet, and this is tried again
            log.warning("a certificate of this relay could not be renewed: %s", error)

    try:
        made.serve(ticket.address, proof, calm)
    finally:
        made.close()
        door.close()


def _certified(address: str, proof: Callable[[], Identity]) -> Porter:
    """Return who keeps the port, once the hub has certified its key; while the hub is away nobody needs a relay."""
    while True:
        try:
            return Porter(address, proof)
        except LinkLost as error:
            log.info("%s; trying again in %g s", error, _AGAIN)
            time.sleep(_AGAIN)
