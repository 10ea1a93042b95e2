"""kill -9 of hub, site and worker at every transition of a run, and at random instants.

The law: whatever died wherever, once it is started again the same run ends as it does undisturbed, with the same bits
after each round; one model is registered, or none where the run fails; every journal is intact, and no file of the run
is left. Each process is real; see `tests.system.lives`.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.boundary.gate import enrol
from atoll.boundary.identity import Ticket
from atoll.boundary.keyring import Keyring
from atoll.data.catalogue import Catalogue
from atoll.journal import Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.faults import POINTS
from atoll.runtime.hub import Hub
from atoll.spec.fleet import Site
from tests.system.faults import LINES
from tests.system.lives import NAMES, STEPS, Nursery
from tests.undeployed import NothingDeployed

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[2]
WAIT = 40.0  # seconds after which something that should happen has not
SEED = int(os.environ.get("KILL_SEED", "2027"))
INSTANTS = 20

SYNC = {
    "preset": "fedavg",
    "period": STEPS,
    "keep_optimiser": True,
    "outer": {"momentum": 0.9},
    "wire": [{"kind": "int8"}],
}
ARRAYS = {"preset": "fedavg", "period": STEPS, "outer": {"momentum": 0.9}, "wire": [{"kind": "int8"}]}
DOWN = {**SYNC, "down": [{"kind": "int8"}]}
LATE = {**SYNC, "wait": {"kind": "quorum", "count": 2, "deadline": 0.3}}
SYNCS = {
    "workers": ARRAYS,
    "expired": LATE,
    **dict.fromkeys(("plain", "first", "restarted", "lost", "cancelled"), DOWN),
}
SWEEP = {
    "parameters": {"optimiser.rate": {"choice": [0.1, 10.0]}},
    "trials": 3,
    "concurrent": 1,  # so that what a suggestion rests on does not hang on who is first
    "sampler": "random",
    "seed": 12,  # good, bad, good
}
FAILING = {"barred": "failed", "refused": "failed", "broken": "failed", "cancelled": "cancelled"}
ENDS = {"run.published", "run.pruned", "run.outdone", "run.swept"}


class World:
    """One run over a hub and two sites; ``kind`` is what goes on in it."""

    def __init__(self, nursery, template: Path, path: Path, kind: str):
        self.nursery, self.path, self.kind = nursery, path, kind
        shutil.copytree(template, path)
        self.port_file, self.over_file = path / "hub" / "site-port", path / "over.json"
        self.alive = {}

    def hub(self, fault="", again=False):
        cancel = self.kind == "cancelled" and not again
        log = self.path / "hub.log"
        sync = SYNCS.get(self.kind, SYNC)
        asked = {"home": str(self.path), "sync": sync, "cancel": cancel}
        asked["sweep"] = SWEEP if self.kind == "swept" else None
        self.alive["hub"] = self.nursery.begin(log, fault, "hub", **asked)

    def site(self, name, fault=""):
        until(self.port_file.exists)
        folder, how = self.path / "sites" / name, self.kind if self.kind == "workers" or name == "bob" else ""
        port = until(self.port_file.read_text)
        arguments = {"home": str(folder), "address": f"tls://127.0.0.1:{port}", "how": how}
        self.alive[name] = self.nursery.begin(self.path / f"{name}.log", fault, "site", **arguments)

    def start(self, **faults):
        self.hub(faults.pop("hub", ""))
        for name in NAMES:
            self.site(name, faults.pop(name, ""))
        assert not faults

    def dies(self, who):
        """Wait until a process has killed itself."""
        how, end = None, time.monotonic() + WAIT
        while how is None and not self.over_file.exists() and time.monotonic() < end:
            how = self.nursery.reap(self.alive[who], 0.05)
        if how is None:
            how = self.nursery.reap(self.alive[who], 1.0)  # it may come after the run's end
        assert how == -signal.SIGKILL, f"{who}: the point was not reached: {how}\n{self.told()}"
        assert ": reached" in (self.path / f"{who}.log").read_text()
        del self.alive[who]

    def again(self, who):
        """Begin another life of it."""
        if who == "hub":
            self.over_file.unlink(missing_ok=True)
            self.hub(again=True)
        else:
            self.site(who)

    def kill(self, who):
        os.kill(self.alive[who], signal.SIGKILL)
        assert self.nursery.reap(self.alive.pop(who), WAIT) == -signal.SIGKILL

    def ended(self):
        """Return what came of the run, once it is over and nobody keeps anything of it."""
        assert until(self.over_file.exists), self.told()
        assert until(lambda: not self.left()), (self.left(), self.told())
        over = json.loads(self.over_file.read_text())
        for who in list(self.alive):
            self.kill(who)
        entries = []
        for party, folder in [("hub", self.path / "hub"), *((name, self.path / "sites" / name) for name in NAMES)]:
            with Journal(folder / "journal.db", party, read_only=True) as journal:
                assert journal.verify().intact
                entries += journal.entries() if party == "hub" else ()
        events = [entry.event for entry in entries]
        merged = [event for event in events if event.kind == "run.merged"]
        tried = [event for event in events if getattr(event, "trial", None)]
        numbers = {event.run: event.trial.number for event in tried}  # a trial's name is drawn, another one each time
        assert len(numbers) == len(tried)
        called = lambda event: numbers.get(event.run, event.run)  # noqa: E731
        over["weights"] = {(called(event), event.position): (event.weights, event.outer) for event in merged}
        assert len(over["weights"]) == len(merged)
        over["trials"] = [(event.trial.number, event.trial.parameters) for event in tried]
        over["ends"] = [(event.kind, called(event)) for event in events if event.kind in ENDS]
        for name, number in numbers.items():
            over["words"] = over["words"].replace(name, f"trial {number}")
        over["models"] = [event.model.weights for event in events if event.kind == "run.published"]
        return over

    def submitted(self):
        """Tell whether the run is there."""
        with Journal(self.path / "hub" / "journal.db", "hub", read_only=True) as journal:
            return any(journal.entries(kinds=("run.submitted",)))

    def left(self):
        folders = [self.path / "hub" / "runs", *(self.path / "sites" / name / "runs" for name in NAMES)]
        return [str(path) for folder in folders for path in folder.glob("*")]

    def told(self):
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(self.path.glob("*.log")))

    def close(self):
        for who in list(self.alive):
            self.kill(who)


def until(holds):
    """Return what it returns, once that is true; "" of a file that is not written yet is not."""
    end = time.monotonic() + WAIT
    while not (found := holds()) and time.monotonic() < end:
        time.sleep(0.003)
    return found


@pytest.fixture(scope="module")
def nursery():
    made = Nursery(ROOT)
    yield made
    made.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A home whose two sites have joined its hub."""
    home = tmp_path_factory.mktemp("template") / "home"
    hub = Hub(home, NothingDeployed())
    for number, name in enumerate(NAMES):
        folder = home / "sites" / name
        sites.create(folder, Site(name=name, owner=name), SITE_POLICY)
        pq.write_table(pa.table({"age": [float(row % 7 + number) for row in range(50)]}), folder / "rows.parquet")
        Catalogue(folder).add("rows", folder / "rows.parquet", purposes=("care",))
        ticket = Ticket.read(hub.invite(name))
        Keyring(folder, name).join(ticket, lambda identity, asked, at=ticket.address: enrol(at, identity, asked))
    hub.close()
    (home / "hub" / "site-port").unlink()
    return home


@pytest.fixture
def make(nursery, template, tmp_path):
    made = []

    def world(kind):
        made.append(World(nursery, template, tmp_path / f"{len(made)}", kind))
        return made[-1]

    yield world
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def undisturbed(nursery, template, tmp_path_factory):
    """Return what comes of a run that nobody kills, by what goes on in it."""
    known = {}

    def ended(kind):
        kind = {"restarted": "plain", "lost": "plain", "first": "plain"}.get(kind, kind)
        if kind not in known:
            world = World(nursery, template, tmp_path_factory.mktemp("undisturbed") / "home", kind)
            began = time.monotonic()
            world.start()
            known[kind] = world.ended()
            known[kind]["seconds"] = time.monotonic() - began
            assert known[kind]["state"] == FAILING.get(kind, "finished"), known[kind]
        return known[kind]

    return ended


def marked(kind, often):
    """Return a case's marks: not all are for every change, and a search is where Optuna is."""
    here = kind != "swept" or importlib.util.find_spec("optuna") is not None
    missing = pytest.mark.skipif(not here, reason="Optuna is not installed: pip install 'atoll[sweep]'")
    return [missing, *(() if often else [pytest.mark.slow])]


CASES = [pytest.param(kind, line, id=line, marks=marked(kind, bool(often))) for kind, line, *often in LINES]


def agrees(found, expected):
    assert (found["state"], found["words"]) == (expected["state"], expected["words"])
    assert found["weights"] == expected["weights"]
    assert (found["trials"], found["ends"]) == (expected["trials"], expected["ends"])
    assert found["models"] == expected["models"]
    assert len(found["models"]) == (found["state"] == "finished")


def test_every_point_and_every_event_of_a_run_has_its_line():
    known = {
        f"{party}:{point}:{what}" for party, points in POINTS.items() for point in points for what in points[point]
    }
    assert {line.rpartition(":")[0] for _, line, *_ in LINES} == known


def test_a_script_that_names_no_point_is_refused_at_start(make):
    world = make("plain")
    world.hub("hub:jounalled:run.merged:2")
    assert world.nursery.reap(world.alive.pop("hub"), WAIT) == 1
    said = (world.path / "hub.log").read_text()
    assert "ATOLL_FAULT: 'hub:jounalled:run.merged:2': names no point" in said
    assert "hub:journalled:run.submitted|run.planned" in said


@pytest.mark.parametrize(("kind", "line"), CASES)
def test_a_process_killed_at_a_point_costs_no_bit(make, undisturbed, kind, line):
    expected, world = undisturbed(kind), make(kind)
    victim = {"hub": "hub", "site": "bob", "worker": "bob"}[line.partition(":")[0]]
    if "initialise" in line and victim == "bob":
        victim = "alice"  # who makes the first weights
    if kind == "restarted":
        world.start(hub="hub:journalled:run.answered:4")
        world.dies("hub")
        world.hub(line, again=True)
    elif kind == "lost":
        world.start(hub=line, bob="site:marked:train:1")
        world.dies("bob")
    else:
        world.start(**{victim: line})
    if line.startswith("worker"):  # its agent begins another by itself
        found = world.ended()
        assert ": reached" in next((world.path / "sites" / victim / "workers").glob("*.log")).read_text()
    else:
        world.dies(victim)
        world.again(victim)
        if kind == "lost":
            world.again("bob")
        found = world.ended()
    if line == "hub:posted:run.cancelled:1":  # nobody was told that it is, and it is not
        expected = undisturbed("plain")
    agrees(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(INSTANTS))
def test_processes_killed_at_a_random_instant_cost_no_bit(make, undisturbed, number):
    chance, expected, world = random.Random(f"{SEED} {number}"), undisturbed("plain"), make("plain")
    world.start()
    for _ in range(chance.choice((1, 1, 2))):
        pause, victim = chance.uniform(0, 1.2 * expected["seconds"]), chance.choice(("hub", *NAMES))
        print(f"KILL_SEED={SEED}: {victim} after {pause:.3f} s")
        time.sleep(pause)
        assert victim == "hub" or until(world.submitted), world.told()  # who is away before is not one of its sites
        world.kill(victim)
        world.again(victim)
    agrees(world.ended(), expected)


@pytest.mark.slow
def test_of_the_sites_that_a_hub_starts_the_first_alone_is_given_the_script_and_it_is_started_again(home, monkeypatch):
    home.site("berlin", rows=60)
    home.site("oslo", rows=90)
    expected = home.weights(home.asked("run", home.job())["run"])
    monkeypatch.setenv("ATOLL_FAULT", "site:marked:train:2")
    run = home.asked("run", home.job())["run"]
    assert home.weights(run) == expected
    logs = {name: (home.path / "sites" / name / "agent.log").read_text() for name in ("berlin", "oslo")}
    assert [name for name, said in logs.items() if ": reached" in said] == ["berlin"]
    home.verify()
