"""The sites that live in a home: started with the hub all at once, started again when they die, and ended with it."""

import logging
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import AtollError, Invalid, Unavailable
from atoll.runtime import site as sites
from atoll.runtime.desk import Desk
from atoll.runtime.hosted import Hosted, SiteProcess, SiteThread
from atoll.spec.document import sha256

_READY = 30.0  # seconds a site has to connect when the hub starts
_GRACE = 8.0  # seconds it has to end its workers and itself
_LOOK = 0.1  # seconds between two looks at whether all are alive
_BACKOFF = (0.2, 10.0)  # seconds until a dead site is started again: at first, at most; doubled each time
_STEADY = 30.0  # seconds of life after which the next end counts as a first one
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Place:
    """A site's place in the home, and what is known of its lives so far."""

    home: Path
    name: str
    life: Hosted | None = None
    began: float = 0.0
    pause: float = _BACKOFF[0]
    due: float = 0.0  # when the next life begins, while there is none
    words: str = ""  # how the last one ended


class Embedded:
    """Owns one thread that looks after the sites from `start` to `close`. Times are of `time.monotonic`."""

    def __init__(self, home: Path, desk: Desk, address: str) -> None:
        self._folder, self._desk, self._address = home / "sites", desk, address
        self._places: dict[str, _Place] = {}
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="embedded", daemon=True)

    def start(self) -> None:
        """Start every site of the home and wait until all are connected. Raises `Unavailable` for one that is not."""
        for home in self._homes():
            place = _Place(home, sites.read(home).name)
            self._places[place.name] = place
        for place in self._places.values():
            try:
                self._begin(place)
            except OSError as error:
                raise Unavailable(f"site {place.name}: cannot be started ({error.strerror}); free memory") from None
        self._gather(time.monotonic() + _READY)
        self._watch.start()

    def words(self, site: str) -> str:
        """Return how a site of this home last ended and when it is tried again; "" while that is no trouble."""
        place = self._places.get(site)
        return place.words if place is not None else ""

    def close(self) -> None:
        """End every site; whoever does not end by itself is killed with all it started."""
        self._closing.set()
        if self._watch.is_alive():
            self._watch.join(_GRACE)
        lives = [place.life for place in self._places.values() if place.life is not None]
        for life in lives:
            life.end()
        deadline = time.monotonic() + _GRACE
        for life in lives:
            life.wait(deadline)
        self._places.clear()

    def _homes(self) -> list[Path]:
        homes = sorted(path.parent for path in self._folder.glob("*/site.yaml"))
        return homes or [sites.laptop(self._folder)]

    def _begin(self, place: _Place) -> None:
        """Begin a life of this site. Raises `AtollError` for a folder in which none can live, and `OSError`."""
        if sites.read(place.home).name != place.name:
            raise Invalid(f"{place.home / 'site.yaml'}: is not of site {place.name!r} any more; give it its name back")
        place.began = time.monotonic()
        if list(self._places) == ["local"]:
            place.life = SiteThread(place.home, self._desk)
        else:
            secret = secrets.token_urlsafe(32)  # another one for each life
            self._desk.presence.trust(place.name, sha256(secret.encode()))
            place.life = SiteProcess(place.home, self._address, secret, len(self._places))

    def _gather(self, deadline: float) -> None:
        while away := [place for place in self._places.values() if not self._desk.presence.here(place.name)]:
            for place in away:
                how = place.life.ended() if place.life is not None else None
                if how is not None:
                    raise Unavailable(f"site {place.name} {how}; look at its agent.log")
            if time.monotonic() > deadline:
                raise Unavailable(f"site {away[0].name} did not connect in {_READY:g} s; look at its agent.log")
            time.sleep(0.01)

    def _look_after(self) -> None:
        while not self._closing.wait(_LOOK):
            for place in self._places.values():
                self._look(place)

    def _look(self, place: _Place) -> None:
        """Notice an end, or begin the next life when it is due."""
        now = time.monotonic()
        if place.life is not None:
            how = place.life.ended()
            if how is not None:
                self._ended(place, how)
            elif place.words and now - place.began > _STEADY:
                place.pause, place.words = _BACKOFF[0], ""
        elif now >= place.due:
            try:
                self._begin(place)
            except (AtollError, OSError) as error:  # its owner may be mending it just now
                self._ended(place, f"cannot be started: {error}")

    def _ended(self, place: _Place, how: str) -> None:
        place.life = None
        place.due = time.monotonic() + place.pause
        place.words = f"{how} (started again after {place.pause:g} s)"
        log.warning("site %s %s", place.name, place.words)
        place.pause = min(2 * place.pause, _BACKOFF[1])
