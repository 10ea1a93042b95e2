"""Which sites belong to the hub: its CA, the invitations it gave out, and its members, folded from the journal."""

import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from atoll.boundary.certificates import Authority
from atoll.boundary.register import Issued, Members, Registrar
from atoll.errors import Invalid, NotFound
from atoll.journal import Entry
from atoll.runtime.disk import appearing
from atoll.runtime.tree import Tree
from atoll.spec.document import parse, read_yaml, write_yaml
from atoll.spec.event import Certified, Event, Invited, Revoked
from atoll.spec.fleet import Reach
from atoll.spec.user import LOCAL

log = logging.getLogger(__name__)
_DIALLED = re.compile(r"[A-Za-z0-9.:\[\]-]{1,253}:[0-9]{1,5}")
Record = Callable[..., object]  # (*events, actor) -> once it returns they are durable and folded


def initialise(folder: Path, reach: Reach) -> None:
    """Make the CA of the hub in ``folder``, and write down where sites reach it. What is there already stays, but for
    `reach`: sites know the hub by its CA. Raises `Invalid`, before `reach` is written, for names that are none."""
    _authority(folder).identity(reach.names)
    with appearing(folder / "hub.yaml", durable=True) as file:
        file.write(write_yaml(reach).encode())


def _authority(folder: Path) -> Authority:
    """Return the CA of the hub in ``folder``, made where there is none yet."""
    if not (folder / "ca" / "root.pem").exists():
        Authority.create(folder / "ca")
    return Authority(folder / "ca")


class Membership:
    """Fed every journal entry in order. A hub that was never initialised is reached from this machine only."""

    def __init__(self, folder: Path, record: Record, tree: Tree) -> None:
        path = folder / "hub.yaml"
        self.reach = parse(Reach, read_yaml(path), str(path)) if path.exists() else Reach()
        self._record, self._tree = record, tree
        self._members = Members()
        self.registrar = Registrar(_authority(folder), self._members, self._issued, tree, self.reach.names)

    def seen(self, entry: Entry) -> None:
        match entry.event:
            case Invited() as event:
                self._members.invited(event.site, event.token, event.expires)
            case Certified() as event:
                self._members.issued(Issued(event.site, event.key, event.serial, event.expires, event.token))
            case Revoked() as event:
                self._members.revoked(event.site)
            case _:
                pass

    def invite(
        self, site: str, hours: float, port: int, relay: str = "", behind: str | None = None, user: str = LOCAL.name
    ) -> str:
        """Return a one-time token with which a site joins. Only its digest is kept.

        ``relay`` is the HOST:PORT at which others will dial it, for a site that is to be a relay; ``behind``, the relay
        that this one is to dial in the hub's place. Raises `Invalid`, and `NotFound` for a relay that is none.
        """
        if not 0 < hours <= 24 * 365:
            raise Invalid(f"hours: {hours:g}: an invitation is good for more than 0 hours and at most a year")
        if relay and not _DIALLED.fullmatch(relay):
            raise Invalid(f"relay: {relay[:100]!r} is not where sites can dial it; it reads host:port")
        address = self._address(port)
        if behind is not None:
            self._tree.check_behind(site, behind)
            address = self._tree.address(behind)
        ticket = self.registrar.invite(site, address)
        opens = f"tls://{site}@{relay}" if relay else ""
        expires = time.time() + hours * 3600
        invited = Invited(site=site, token=ticket.invitation, expires=expires, relay=opens, behind=behind)
        self._record(invited, actor=user)
        return ticket.token()

    def revoke(self, site: str, user: str) -> None:
        """Shut a site out for good, until it is invited anew. Raises `NotFound` for one that never was invited."""
        if not self._members.knows(site):
            raise NotFound(f"site: {site!r} was never invited here, or is revoked; `atoll sites` lists the others")
        self._record(Revoked(site=site, user=user), actor=user)

    def _address(self, port: int) -> str:
        host = self.reach.names[0] if self.reach.names else self.reach.host
        if host in ("0.0.0.0", "::"):  # noqa: S104 - it is what is not to be dialled
            host = socket.gethostname()
        return f"tls://[{host}]:{port}" if ":" in host else f"tls://{host}:{port}"

    def _issued(self, issued: Issued) -> None:
        event: Event = Certified(
            site=issued.site, key=issued.key, serial=issued.serial, expires=issued.expires, token=issued.token
        )
        self._record(event, actor=issued.site)
