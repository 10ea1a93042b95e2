"""Which sites are behind which relay: a fold of the journal's invitations and certificates, and no site's own word."""

from dataclasses import dataclass

from atoll.errors import Invalid, NotFound
from atoll.journal import Entry
from atoll.spec.document import Digest, Name
from atoll.spec.event import Certified, Invited, Revoked
from atoll.spec.message import Admitted


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a member is in the tree, or will be once it takes up its invitation."""

    token: Digest
    relay: str = ""  # where sites dial it, if it is one
    behind: Name | None = None


_NOWHERE = _Place("")


class Tree:
    """Fed every journal entry in order; may be asked from any thread. The hub itself is the root, and not in it.

    A member's place is that of the invitation it took up last; what becomes of an open one is asked for by `invited`.
    """

    def __init__(self) -> None:
        self._invited: dict[str, _Place] = {}
        self._places: dict[str, _Place] = {}
        self._keys: dict[str, Digest] = {}
        self._out: dict[str, dict[Digest, None]] = {}  # site -> its keys that open nothing any more

    def seen(self, entry: Entry) -> frozenset[str]:
        """Take an entry; return the relays that are to be told whom to admit."""
        match entry.event:
            case Invited() as event:
                self._invited[event.site] = _Place(event.token, event.relay, event.behind)
                return frozenset()
            case Certified() as event:
                return self._certified(event)
            case Revoked() as event:
                told = self._above(event.site)
                self._invited.pop(event.site, None)
                self._put_out(event.site)
                return told
            case _:
                return frozenset()

    def _certified(self, event: Certified) -> frozenset[str]:
        invited, before = self._invited.get(event.site, _NOWHERE), self._above(event.site)
        if self._keys.get(event.site) == event.key:  # renewed
            return frozenset()
        self._put_out(event.site)
        self._keys[event.site] = event.key
        self._places[event.site] = invited if event.token == invited.token else _NOWHERE
        return before | self._above(event.site)

    def _put_out(self, site: str) -> None:
        key = self._keys.pop(site, None)
        if key is not None:
            self._out.setdefault(site, {})[key] = None

    def _above(self, site: str) -> frozenset[str]:
        relay = self.behind(site)
        return frozenset() if relay is None else frozenset((relay,))

    # --- who is where

    def is_relay(self, site: str) -> bool:
        return site in self._keys and bool(self._places[site].relay)

    def behind(self, site: str) -> str | None:
        """Return the relay that a member is directly behind; None for one that dials the hub, and for who is none."""
        return self._places.get(site, _NOWHERE).behind if site in self._keys else None

    def way(self, site: str, invited: bool = False) -> tuple[str, ...]:
        """Return the relays between the hub and a site, the hub's next first; of an ``invited`` one, those to come."""
        above = self._invited.get(site, _NOWHERE).behind if invited else self.behind(site)
        way: list[str] = []
        while above is not None and above not in way:
            way.append(above)
            above = self.behind(above)
        return tuple(reversed(way))

    def admitted(self, relay: str) -> Admitted:
        """Return whom a relay is to let in at its own port."""
        below = [site for site, place in self._places.items() if place.behind == relay]
        sites = {site: self._keys[site] for site in below if site in self._keys}
        return Admitted(sites=sites, out=tuple(key for site in below for key in self._out.get(site, ())))

    # --- invitations

    def address(self, relay: str) -> str:
        """Return where sites dial a relay. Raises `NotFound` for a site that is none."""
        places = (self._places.get(relay, _NOWHERE), self._invited.get(relay, _NOWHERE))
        found = next((place.relay for place in places if place.relay), "")
        if not found:
            raise NotFound(
                f"behind: {relay!r} is no relay; make it one first: atoll site invite {relay} --relay HOST:PORT"
            )
        return found

    def check_behind(self, site: str, relay: str) -> None:
        """Raise `Invalid` for a place that would close a circle, as things are or once invitations are taken up."""
        above, found = [relay], set[str]()
        while above:
            name = above.pop()
            if name == site:
                raise Invalid(f"behind: {relay!r} is behind {site!r} itself; choose another relay")
            if name not in found:
                found.add(name)
                above += [one for one in (self.behind(name), self._invited.get(name, _NOWHERE).behind) if one]
