"""Worlds with relays: hub, relays and sites in one process, over the memory channel; all is real but the workers."""

import threading
import time

from atoll.boundary.channel import Desk
from atoll.runtime.relay import Relay
from atoll.spec.document import sha256
from atoll.spec.event import Certified, Invited
from atoll.spec.fleet import Site
from tests.scenarios.worlds import World, serve
from tests.unit.places import WAIT, eventually


class Branching(World):
    """``tree`` says for each relay what is behind it, relays too; a site that is behind none dials the hub."""

    def __init__(self, home, names, tree):
        super().__init__(home, names)
        self.tree, self.relays, self.lives = tree, {}, {}
        self.top = self.hub._desk  # whom those dial that are behind no relay
        self.above = {below: relay for relay, children in tree.items() for below in children}
        for relay in tree:
            self.invite(relay, relay="tls://here:1")
        for site in names:
            if site in self.above:
                self.invite(site)

    def invite(self, name, relay=""):
        """Have the hub believe that this member took up an invitation to its place."""
        token, key = sha256(f"token of {name}".encode()), sha256(f"key of {name}".encode())
        invited = Invited(site=name, token=token, expires=0.0, relay=relay, behind=self.above.get(name))
        certified = Certified(site=name, key=key, serial="1", expires=0.0, token=token)
        self.hub._conductor.record(invited, certified)

    def desk(self, name) -> Desk:
        """Return whom a site or a relay dials."""
        above = self.above.get(name)
        return self.relays[above] if above is not None else self.top

    def start(self, name, desk=None):
        super().start(name, desk)
        self.lives[name] = self.threads[-1]

    def begin_anew(self, *names):
        """End the agents of these sites, whose relay is gone, and begin other lives of them."""
        for name in names:
            self.agents[name].stop()
        for name in names:
            self.lives[name].join(WAIT)
            self.start(name, self.desk(name))

    def grow(self, *names, relays=None):
        """Begin the lives of all relays from the hub on, and then of the sites, in this order."""
        for relay in sorted(self.tree, key=self._depth):
            self.start_relay(relay, (relays or {}).get(relay, Relay))
        for name in names or self.names:
            self.start(name, self.desk(name))

    def start_relay(self, name, relay=Relay):
        home = self.home / "relays" / name
        home.mkdir(parents=True, exist_ok=True)
        self.relays[name] = made = relay(Site(name=name), home)
        self.threads.append(threading.Thread(target=serve, args=(made, self.desk(name)), daemon=True))
        self.threads[-1].start()
        assert eventually(lambda: self.hub._desk.presence.here(name))

    def _depth(self, name):
        return 0 if name not in self.above else 1 + self._depth(self.above[name])

    def lose_relay(self, name):
        """Let a relay be gone, with all sessions through it; what it had in memory is lost, and its folder stays."""
        self.relays[name].close()
        for site in self.names:
            if name in self.hub._desk.tree.way(site):
                until(lambda site=site: not self.hub._desk.presence.here(site))

    def close(self):
        for relay in sorted(self.relays, key=self._depth, reverse=True):
            self.relays[relay].stop()
        super().close()


def until(holds):
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)
