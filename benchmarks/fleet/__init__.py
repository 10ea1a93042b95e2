"""A hub and its sites as processes of their own, joined by token over mutual TLS: on loopback, or over shaped links."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shaped import Carried, Links, Shape, links

from atoll.data.catalogue import Catalogue
from atoll.journal import Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.site import create
from atoll.spec.event import Answered, Crossed, Merged
from atoll.spec.fleet import Site
from atoll.spec.job import TrainJob
from atoll.spec.model import Bundle

_HUB = Path(__file__).with_name("hub.py")


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run of ``steps`` steps at each site came to, as journals have it.

    ``seconds`` from the first weights to the last merge, over all ``examples``; of both the ``first`` round, which
    waits until every site has the first weights. ``crossed``: bytes over all sites' borders, both ways and of all
    kinds, as their owners' journals have them; ``carried``: of the same run by its links, where it had some.
    """

    steps: int
    rounds: int
    examples: int
    seconds: float
    first: tuple[int, float]
    metrics: dict[str, float]
    crossed: int
    carried: Carried | None


class Fleet:
    """What is connected. Runs are carried out one at a time."""

    def __init__(self, home: Path, sites: Sequence[str], hub: "subprocess.Popen[str]", joined: Links | None) -> None:
        self.links = joined
        self._home, self._sites, self._hub = home, sites, hub

    def run(self, job: TrainJob, bundle: Bundle) -> Ran:
        """Submit a job and wait for its end. Raises `SystemExit` when it is not a good one."""
        before = self.links.carried() if self.links else None
        asked = {"job": job.model_dump(mode="json"), "bundle": bundle.model_dump(mode="json")}
        assert self._hub.stdin is not None
        self._hub.stdin.write(json.dumps(asked) + "\n")
        self._hub.stdin.flush()
        told = _hear(self._hub)
        carried = self.links.carried().since(before) if self.links and before else None
        merged = self._merged(told["run"])
        begun, (first_examples, first), (examples, last) = merged[0][1], merged[1], merged[-1]
        return Ran(
            steps=job.steps,
            rounds=len(merged) - 1,
            examples=examples,
            seconds=last - begun,
            first=(first_examples, first - begun),
            metrics=told["metrics"],
            crossed=self._crossed(told["run"]),
            carried=carried,
        )

    def _merged(self, run: str) -> list[tuple[int, float]]:
        """Return of each version of the weights, the first included, the examples behind it and when it was there."""
        merged: list[tuple[int, float]] = []
        examples = 0
        with Journal(self._home / "hub" / "journal.db", "hub", read_only=True) as journal:
            for entry in journal.entries(run=run):
                match entry.event:
                    case Answered(answer=answer) if answer.update:
                        examples += answer.examples
                    case Merged(weights=digest) if digest:
                        merged.append((examples, entry.time))
                    case _:
                        pass
        return merged

    def _crossed(self, run: str) -> int:
        total = 0
        for name in self._sites:
            with Journal(self._home / "sites" / name / "journal.db", name, read_only=True) as journal:
                for entry in journal.entries(kinds=("crossing",), run=run):
                    if isinstance(entry.event, Crossed) and entry.event.decision.allowed:
                        total += entry.event.crossing.bytes
        return total


@contextmanager
def fleet(
    home: Path, dataset: str, purpose: str, files: Mapping[str, Path], shape: Shape | None = None
) -> Iterator[Fleet]:
    """Start a hub and a site for each file, which it has as ``dataset``; end them all afterwards.

    Each site is behind a link of its own of this shape, or on loopback without one. Raises `CannotShape`.
    """
    with ExitStack() as stack:
        joined = stack.enter_context(links([shape] * len(files))) if shape else None
        for name, file in files.items():
            create(home / "sites" / name, Site(name=name), SITE_POLICY)
            Catalogue(home / "sites" / name).add(dataset, file, purposes=(purpose,))
        address = [joined.address] if joined else []
        hub = _start([sys.executable, str(_HUB), str(home), json.dumps(list(files)), *address], joined, None)
        stack.callback(_end, hub)
        for number, name in enumerate(files):
            token = _hear(hub)["token"]
            join = ["--home", str(home), "join", "-", "--site", name]
            site = _start([sys.executable, "-m", "atoll.console.cli", *join], joined, number)
            stack.callback(_end, site)
            assert site.stdin is not None
            site.stdin.write(token + "\n")
            site.stdin.close()
        assert _hear(hub) == {"connected": len(files)}
        yield Fleet(home, tuple(files), hub, joined)


def _start(command: list[str], joined: Links | None, site: int | None) -> "subprocess.Popen[str]":
    prefix = joined.inside(site) if joined else ["setpriv", "--pdeathsig", "TERM"]
    return subprocess.Popen([*prefix, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(started: "subprocess.Popen[str]") -> None:
    assert started.stdin is not None
    assert started.stdout is not None
    if started.stdin.closed:
        started.terminate()
    started.stdin.close()  # the hub takes no more jobs, and ends
    try:
        started.wait(20)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()
    started.stdout.close()


def _hear(hub: "subprocess.Popen[str]") -> dict[str, Any]:
    assert hub.stdout is not None
    line = hub.stdout.readline()
    if not line:
        raise SystemExit(f"the hub's process ended early, with exit code {hub.wait(20)}")
    return json.loads(line)
