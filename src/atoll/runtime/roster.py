"""Which sites were seen, and what is deployed: a view folded from the journal."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from atoll.journal import Entry
from atoll.runtime.desk import Desk
from atoll.spec.event import Connected, Disconnected
from atoll.spec.fleet import Link, Site
from atoll.spec.model import Deployed, Deployment, Undeployed
from atoll.spec.run import SiteView


class Roster:
    """Fed every journal entry in order."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteView] = {}
        self.deployments: dict[str, Deployment] = {}

    def seen(self, entry: Entry) -> None:
        match entry.event:
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


def listed(roster: Roster, desk: Desk, away: Callable[[str], str]) -> list[SiteView]:
    """Return every site ever known; ``away`` says of a site of this home why it is not started again, or ""."""
    fleets = (desk.presence.fleet(), desk.presence.relays())
    here = [roster.view(site, fleet.link(site.name)) for fleet in fleets for site in fleet.sites]
    names = {view.name for view in here}
    gone = [view for name, view in sorted(roster.sites.items()) if name not in names]
    gone = [view.model_copy(update={"words": away(view.name) or view.words}) for view in gone]
    return [_placed(view, desk) for view in (*here, *gone)]


def _placed(view: SiteView, desk: Desk) -> SiteView:
    """Say of a site whether it is in quarantine, and where it is among relays."""
    place = {"relay": desk.tree.is_relay(view.name), "behind": desk.tree.behind(view.name) or ""}
    return view.model_copy(update={"quarantine": desk.quarantine.words(view.name), **place})
