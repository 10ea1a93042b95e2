"""Claim: a round costs about what the wire costs, and the hub's memory does not grow with the number of sites.

Null-training rounds: a hub process and K site processes, real but for their workers, which write a fixed update instead
of training. Each round S bytes go down to every site, are verified and stored there, S bytes come up, are spooled,
summed with weights in fixed point, and the next version is written down. The limit, in the same run, is a bare socket
that moves the same bytes to and from processes that throw them away (`benchmarks/bare`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bare
import numpy as np
import peers
import pyarrow as pa
import pyarrow.parquet as pq
from reporting import Figure, Options, Report, fresh, options

from atoll.data.catalogue import Catalogue
from atoll.journal import Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.agent import Agent
from atoll.runtime.hub import Hub
from atoll.runtime.sandbox import Grant
from atoll.runtime.site import create, read
from atoll.serving.deployments import Deployments
from atoll.spec.document import parse, sha256
from atoll.spec.event import Answered, Merged, Submitted
from atoll.spec.fleet import Profile, Site
from atoll.spec.job import TrainJob
from atoll.spec.model import Bundle, TensorSpec
from atoll.spec.order import Initialise, Order, Probe, Reply, Train
from atoll.spec.plan import Layout
from atoll.spec.user import LOCAL

MB = 1_000_000
SECRET = "s" * 43  # of the benchmark's own sites, on this machine
PATIENCE = 900.0  # seconds for one measurement


@dataclass(frozen=True, slots=True)
class Case:
    """K sites, S bytes each way before ``wire``, which is of both ways."""

    size: int
    sites: int
    tls: bool = True
    wire: str | None = None
    rounds: int = 5

    def __str__(self) -> str:
        how = "mTLS" if self.tls else "plaintext"
        return f"{self.size / MB:g} MB x {self.sites}, {how}{', ' + self.wire if self.wire else ''}"


@dataclass(frozen=True, slots=True)
class Found:
    """Seconds a round (median), until the first one is merged, and the hub's peak of resident memory."""

    seconds: float
    first: float
    memory_mb: float


def main() -> int:
    if sys.argv[1:2] == ["--hub"]:
        return serve_hub(Path(sys.argv[2]), json.loads(sys.argv[3]))
    if sys.argv[1:2] == ["--site"]:
        return serve_site(Path(sys.argv[2]), int(sys.argv[3]))
    asked = options("Rounds without training, beside a bare socket.")
    report = Report("rounds", "Rounds that cost what the wire costs", asked)
    report.finish(measure(report, asked))
    return 0


def measure(report: Report, asked: Options) -> dict[str, Figure]:
    home = fresh("rounds")
    size, sites, rounds = (25 * MB, 4, 3) if asked.quick else (100 * MB, 8, 5)
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Figure] = {}

    def one(case: Case) -> Found:
        found = run(home, case)
        rows.append((str(case), f"{found.seconds:.3f}", "", "", f"{found.memory_mb:.0f}"))
        report.say(f"{case}: {found.seconds:.3f} s a round, hub {found.memory_mb:.0f} MB")
        return found

    def beside(case: Case) -> tuple[Found, float]:
        """Measure before and after what it is compared with, for this machine's speed swings."""
        folder = home / "ca" if case.tls else None
        before = bare.measure(case.sites, case.size, case.rounds, folder)
        found = run(home, case)
        after = bare.measure(case.sites, case.size, case.rounds, folder)
        limit = float(np.median([*before.rounds, *after.rounds]))
        ratio = found.seconds / limit
        rows.append((str(case), f"{found.seconds:.3f}", f"{limit:.3f}", f"{ratio:.2f}", f"{found.memory_mb:.0f}"))
        report.say(f"{case}: {found.seconds:.3f} s a round, bare {limit:.3f} s, {ratio:.2f} times it")
        return found, ratio

    small = one(Case(MB, 2, rounds=20))
    figures |= {"round_1mb_2_tls_s": round(small.seconds, 4), "first_round_s": round(small.first, 3)}
    middle = 5 * MB if asked.quick else 25 * MB
    for tls in (False, True):
        how = "tls" if tls else "plain"
        figures[f"ratio_25mb_8_{how}"] = round(beside(Case(middle, sites, tls, rounds=rounds))[1], 2)
        large, ratio = beside(Case(size, sites, tls, rounds=rounds))
        figures[f"ratio_100mb_8_{how}"] = round(ratio, 2)
    packed = one(Case(size, sites, wire="int8", rounds=rounds))
    figures["ratio_int8_vs_float32_tls"] = round(packed.seconds / large.seconds, 2)
    figures["hub_mb_100mb_8"] = round(large.memory_mb)
    few, many = (one(Case(size, count, rounds=2)) for count in ((2, 4) if asked.quick else (4, 16)))
    figures["hub_mb_16_over_4_sites"] = round(many.memory_mb / few.memory_mb, 3)
    big = Case(100 * MB, 3, rounds=2) if asked.quick else Case(1000 * MB, 3, rounds=2)
    copies = one(big).memory_mb * MB / big.size
    figures["big_model_copies"] = round(copies, 2)
    report.table(("round", ">seconds", ">bare", ">ratio", ">hub MB"), rows)
    report.say(f"The big model is scaled to {big.size / MB:g} MB x {big.sites} from 3,400 MB x 6, for disk and memory.")
    figures["peers"] = beside_peers(report, home, asked.quick)
    return figures


def beside_peers(report: Report, home: Path, quick: bool) -> dict[str, Figure]:
    """Measure the peers that are there (`benchmarks/peers/README.md`) in plaintext, beside Atoll's own rounds."""
    cases = [Case(MB, 2, tls=False, rounds=3)] + ([] if quick else [Case(25 * MB, 8, tls=False, rounds=3)])
    rows: list[tuple[str, ...]] = []
    told: dict[str, Figure] = {}
    for name, called in peers.PEERS.items():
        for case in cases:
            found = peers.measure(called, case.size, case.sites, case.rounds, home)
            if found is None:
                rows.append((name, "not installed", "", "", ""))
                told[called] = "not installed"
                break
            ours = run(home, case)
            seconds, memory = f"{found['seconds']:.3f}", f"{found['hub_mb']:.0f}"
            rows.append((f"{name} {found['version']}", str(case), seconds, f"{ours.seconds:.3f}", memory))
            told[f"{called}_{case.size // MB}mb_{case.sites}_s"] = float(seconds)
    report.table(("peer", "round", ">seconds", ">Atoll's", ">hub MB"), rows)
    return told


# --- one measurement ------------------------------------------------------------------------------------------------


def run(home: Path, case: Case) -> Found:
    """Run a job of null rounds over fresh processes; return what its journal and the hub's process tell."""
    folder = home / "case"
    shutil.rmtree(folder, ignore_errors=True)
    names = [f"s{number:02}" for number in range(case.sites)]
    for name in names:
        settle(folder / "sites" / name, name)
    asked = {"tls": case.tls, "sites": names, "job": job(case).model_dump(mode="json")}
    with process("--hub", folder, json.dumps(asked)) as hub:
        tickets = [json.loads(line(hub)) for _ in names]
        sites = [start("--site", folder / "sites" / name, str(case.size // 4)) for name in names]
        try:
            for site, ticket in zip(sites, tickets, strict=True):
                assert site.stdin is not None
                site.stdin.write(json.dumps(ticket).encode() + b"\n")
                site.stdin.flush()
            told = json.loads(line(hub))
        finally:
            for site in sites:
                end(site)
    found = timed(folder / "hub" / "journal.db", told["memory_mb"])
    shutil.rmtree(folder, ignore_errors=True)
    return found


def job(case: Case) -> TrainJob:
    # What is rounded on the way down needs no feedback: every site and the hub go on from what it made.
    up, down = ([{"kind": case.wire, "feedback": feedback}] if case.wire else [] for feedback in (True, False))
    if case.wire in ("clip", "mask"):  # of sites' updates alone
        up, down = [{"kind": "clip", "value": 1e6}, {"kind": "mask"}][: 1 + (case.wire == "mask")], []
    sync = {"period": 1, "wire": up, "down": down}
    return parse(
        TrainJob,
        {
            "kind": "train",
            "name": "null",
            "purpose": "benchmark",
            "task": {"file": "task.py", "name": "Null"},
            "data": {"dataset": "nothing", "holdout": 0.0, "evaluate": []},
            "steps": case.rounds + 1,
            "batch": 1,
            "sync": sync,
        },
        "benchmark",
    )


def settle(home: Path, name: str) -> None:
    create(home, Site(name=name), SITE_POLICY)
    pq.write_table(pa.table({"x": list(range(20))}), home / "nothing.parquet")
    Catalogue(home).add("nothing", home / "nothing.parquet", purposes=("benchmark",))


def timed(journal: Path, memory_mb: float) -> Found:
    """Read from the hub's journal when each round was merged."""
    merged: list[float] = []
    submitted = 0.0
    with Journal(journal, "hub", read_only=True) as entries:
        updates = False
        for entry in entries.entries():
            match entry.event:
                case Submitted():
                    submitted = entry.time
                case Answered() as event:
                    updates = event.answer.examples > 0
                case Merged() if updates:
                    merged.append(entry.time)
                case _:
                    pass
    seconds = np.diff(merged)
    return Found(float(np.median(seconds)), merged[0] - submitted, memory_mb)


# --- the processes --------------------------------------------------------------------------------------------------


def serve_hub(home: Path, asked: dict[str, object]) -> int:
    """A hub with everything that `atoll hub start` loads; ends when its job does, and tells its peak of memory."""
    import atoll.console.api  # noqa: F401 - its memory is the hub's memory too

    hub = Hub(home, Deployments(home / "hub" / "logs"))
    sites = [str(name) for name in asked["sites"]]  # type: ignore[attr-defined]
    address = hub.address if asked["tls"] else hub.address.replace("tls://", "tcp://")
    for name in sites:
        if not asked["tls"]:  # as the hub does with the sites of its own home
            hub._desk.presence.trust(name, sha256(SECRET.encode()))
        print(json.dumps({"token": hub.invite(name)} if asked["tls"] else {"address": address}), flush=True)
    until(lambda: len(hub.fleet().sites) == len(sites))
    bundle = Bundle(files={"task.py": "# the executor of this benchmark runs no task\n"})
    submitted = hub.submit(parse(TrainJob, asked["job"], "benchmark"), bundle, LOCAL)
    news = threading.Event()
    with hub.watch(submitted, news.set):  # to look often would take the processor from what is measured
        while not (view := hub.run(submitted)).over:
            if not news.wait(PATIENCE):
                raise SystemExit(f"nothing happened in {PATIENCE:g} s")
            time.sleep(0.2)
            news.clear()
    if view.state != "finished":
        raise SystemExit(f"the run {view.state}: {view.words}")
    peak = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    assert "torch" not in sys.modules, "a hub has no torch"
    print(json.dumps({"memory_mb": int(peak.split()[1]) / 1024}), flush=True)
    hub.close()
    return 0


def serve_site(home: Path, elements: int) -> int:
    from atoll.boundary.gate import enrol
    from atoll.boundary.identity import Ticket
    from atoll.boundary.keyring import Keyring

    given = json.loads(sys.stdin.readline())
    site = read(home)
    agent = Agent(site, home, NullExecutor(elements))
    signal.signal(signal.SIGTERM, lambda *_: agent.stop())
    if "token" not in given:
        agent.serve(given["address"], lambda: SECRET)
        return 0
    ticket = Ticket.read(given["token"])
    identity = Keyring(home, site.name).join(ticket, lambda mine, asked: enrol(ticket.address, mine, asked))
    agent.serve(ticket.address, lambda: identity)
    return 0


class NullExecutor:
    """Starts nothing. Its updates lie ready and are handed over as files are: by name."""

    confined, refuses = False, ""

    def __init__(self, elements: int) -> None:
        self._elements = elements

    def warm(self) -> None:
        pass

    def start(self, layout: Layout, folder: Path, grant: Grant | None = None) -> "NullGroup":
        folder.mkdir(parents=True, exist_ok=True)
        ready = folder / "update.f32"
        if not ready.exists():
            values = np.random.default_rng(0).standard_normal(1 << 18, dtype=np.float32) * np.float32(1e-3)
            with ready.open("wb") as file:
                for start in range(0, self._elements, values.size):
                    values[: self._elements - start].tofile(file)
        return NullGroup(self._elements, ready)

    def close(self) -> None:
        pass


class NullGroup:
    whole = True

    def __init__(self, elements: int, ready: Path) -> None:
        self._elements, self._ready = elements, ready

    def order(self, order: Order, timeout: float, on_step: Callable[[int], None] | None = None) -> Reply:
        match order:
            case Probe():
                return Reply(profile=Profile(parameters=self._elements, step_seconds=1e-3))
            case Initialise():
                np.zeros(self._elements, np.float32).tofile(order.output)
                return Reply(signature=(TensorSpec(name="weights", shape=(self._elements,)),))
            case Train():
                Path(order.output).unlink(missing_ok=True)
                os.link(self._ready, order.output)
                return Reply(examples=order.steps * order.batch, loss=0.5)
            case _:
                return Reply(rows=20)

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    started = start(*arguments)
    try:
        yield started
    finally:
        end(started)


def end(started: subprocess.Popen[bytes]) -> None:
    started.terminate()
    try:
        started.wait(20)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()
    for pipe in (started.stdin, started.stdout):
        if pipe is not None:
            pipe.close()


def line(started: subprocess.Popen[bytes]) -> bytes:
    assert started.stdout is not None
    found = started.stdout.readline()
    if not found:
        raise SystemExit(f"a process of this benchmark ended early, with exit code {started.wait(20)}")
    return found


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened in {PATIENCE:g} s")
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
