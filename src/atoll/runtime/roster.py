"""Who was invited, enrolled and seen, and what is deployed: a view folded from the journal."""

import hmac
import time
from contextlib import suppress
from pathlib import Path

from atoll.errors import Denied
from atoll.journal import Entry
from atoll.spec.document import sha256
from atoll.spec.event import Connected, Deployed, Disconnected, Enrolled, Invited, Undeployed
from atoll.spec.fleet import Link, Site
from atoll.spec.model import Deployment
from atoll.spec.run import SiteView


class Roster:
    """Fed every journal entry in order."""

    def __init__(self) -> None:
        self._invited: dict[str, Invited] = {}
        self.secrets: dict[str, str] = {}
        self.sites: dict[str, SiteView] = {}
        self.deployments: dict[str, Deployment] = {}

    def seen(self, entry: Entry) -> None:
        match entry.event:
            case Invited() as event:
                self._invited[event.site] = event
            case Enrolled() as event:
                self._invited.pop(event.site, None)  # a token is good once
                self.secrets[event.site] = event.secret
            case Connected() as event:
                view = self.view(event.site, event.link or Link(site=event.site.name))
                self.sites[event.site.name] = view.model_copy(update={"connected": False, "latency_ms": None})
            case Disconnected() as event if event.site in self.sites:
                known = self.sites[event.site]
                self.sites[event.site] = known.model_copy(update={"words": event.words})
            case Deployed() as event:
                self.deployments[event.deployment.name] = event.deployment
            case Undeployed() as event:
                self.deployments.pop(event.name, None)
            case _:
                pass

    def enrolment(self, site: str, token: str, secret: str) -> Enrolled:
        """Return the event that lets a site in, when its token is the one it was sent. Raises `Denied`."""
        invited = self._invited.get(site)
        if invited is None or not hmac.compare_digest(invited.token, sha256(token.encode())):
            raise Denied(f"site {site!r}: this token is unknown or was used; ask for another invitation")
        if invited.expires < time.time():
            raise Denied(f"site {site!r}: this token is out of date; ask for another invitation")
        return Enrolled(site=site, secret=secret)

    @staticmethod
    def view(site: Site, link: Link) -> SiteView:
        """Return a connected site as people see it."""
        return SiteView(
            name=site.name,
            owner=site.owner,
            region=site.region,
            connected=True,
            datasets=tuple(dataset.name for dataset in site.datasets),
            devices=sum(len(node.devices) for node in site.nodes),
            latency_ms=round(link.latency * 1000, 3),
        )

    @staticmethod
    def port(folder: Path) -> int:
        """Return the port that sites dialled last time, so that those out there find a restarted hub; 0 if none."""
        with suppress(OSError, ValueError):
            return int((folder / "site-port").read_text())
        return 0
