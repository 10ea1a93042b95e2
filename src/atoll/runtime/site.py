"""A site's folder, and the process that serves it.

    python -m atoll.runtime.site HOME

reads one JSON line on stdin, {"address", "secret", "sharers"?}: a secret belongs on no command line. The process ends
when its stdin does, so that sites which a hub started do not outlive it.
"""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from atoll.boundary.gate import enrol
from atoll.boundary.identity import Identity, Ticket
from atoll.boundary.keyring import Keyring
from atoll.errors import AtollError, Invalid, NotFound, Unavailable
from atoll.policy.defaults import SITE_POLICY
from atoll.policy.rules import Rules
from atoll.runtime import faults
from atoll.runtime.actors import RayExecutor
from atoll.runtime.agent import Agent
from atoll.runtime.local import LocalExecutor
from atoll.spec.document import parse, read_yaml, write_yaml
from atoll.spec.fleet import Device, Node, Site, SiteFile
from atoll.spec.policy import Policy

log = logging.getLogger(__name__)


def create(home: Path, site: Site, policy: str) -> None:
    """Make a site's folder with its document and its owner's rules. Raises `Invalid` when it exists or they err."""
    Rules(Policy(party=site.name, text=policy))
    if (home / "site.yaml").exists():
        raise Invalid(f"site {site.name!r} exists in {home}; choose another name or edit its policy.cedar")
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    (home / "policy.cedar").write_text(policy, encoding="utf-8")
    (home / "site.yaml").write_text(write_yaml(site), encoding="utf-8")


def laptop(sites: Path) -> Path:
    """Return the folder of the site `local` under ``sites``, made with the default rules when it is not there."""
    home = sites / "local"
    if not (home / "site.yaml").exists():
        create(home, Site(name="local"), SITE_POLICY)
    return home


def read(home: Path, sharers: int = 1) -> Site:
    """Return the site that lives in ``home``, with the machine it runs on unless its document names the nodes.

    ``sharers`` sites on one machine have a part of its processors each; a plan must not count them more than once.
    """
    site = _document(home)
    return _on(site, (this_machine(sharers),))


def _document(home: Path) -> SiteFile:
    path = home / "site.yaml"
    if not path.exists():
        raise NotFound(f"{home}: no site lives here; make one with: atoll site add NAME")
    return parse(SiteFile, read_yaml(path), str(path))


def _on(site: SiteFile, nodes: tuple[Node, ...]) -> Site:
    """Return what is told of a site with these nodes, unless its owner named others."""
    return site.told if "nodes" in site.model_fields_set else site.told.model_copy(update={"nodes": nodes})


def this_machine(sharers: int = 1) -> Node:
    """Describe this machine's processors; how fast they are at a task is measured by a probe, not guessed here."""
    count = max(1, len(os.sched_getaffinity(0)) // sharers)
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    device = Device(kind="cpu", memory_bytes=pages * size // (count * sharers))
    return Node(name=os.uname().nodename, devices=(device,) * count)


def agent(home: Path, sharers: int = 1) -> Agent:
    """Return an agent for the site in ``home``, ready to serve. Raises `Unavailable` when Ray cannot be had."""
    site, here = _document(home), (this_machine(sharers),)
    if site.executor.kind == "local":
        chosen = site.executor
        return Agent(_on(site, here), home, LocalExecutor(chosen.silence, chosen.sandbox, chosen.limits))
    devices = sum(len(node.devices) for node in _on(site, here).nodes)
    executor = RayExecutor(site.executor, devices, home / "workers")
    try:
        # Of a cluster that runs already its nodes are asked; Ray's own start is not waited for.
        nodes = here if site.executor.address == "local" else executor.nodes()
        return Agent(_on(site, nodes), home, executor)
    except BaseException:
        executor.close()
        raise


def join(home: Path, token: str) -> None:
    """Serve the site in ``home`` for the hub that made ``token``, until interrupted.

    The first time the token is exchanged for a certificate of a key that is made here and stays in ``home``; after that
    the token only says where the hub is. Raises `Invalid` for a token that is none or another site's, `Denied` when the
    hub refuses it.
    """
    faults.arm()
    ticket = Ticket.read(token)
    keys = Keyring(home, read(home).name)

    def proof() -> Identity:
        """Also for a site that was away for longer than its certificate lasts."""
        return keys.join(ticket, lambda identity, request: enrol(ticket.address, identity, request))

    def renew() -> None:
        if not keys.due():
            return
        try:
            keys.renew(lambda request: enrol(ticket.address, keys.identity, request))
        except AtollError as error:  # the certificate is good for a while yet, and this is tried again
            log.warning("the certificate of this site could not be renewed: %s", error)

    proof()  # before anything else, so that a token which is none says so at once
    agent(home).serve(ticket.address, proof, renew)


def main() -> int:
    home = Path(sys.argv[1])
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    asked = json.loads(sys.stdin.readline() or "{}")
    try:
        faults.arm()
        served = agent(home, int(asked.get("sharers", 1)))
    except AtollError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    def lifeline() -> None:
        sys.stdin.read()  # returns when whoever started us is gone
        served.stop()

    signal.signal(signal.SIGTERM, lambda *_: served.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started us; it closes our stdin
    threading.Thread(target=lifeline, daemon=True).start()
    try:
        address, secret = str(asked["address"]), str(asked["secret"])
        served.serve(address, lambda: secret)
    except KeyError as error:
        raise Unavailable(f"stdin: {error} is missing; start sites with: atoll join TOKEN") from None
    except AtollError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
