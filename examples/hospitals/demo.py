"""Four hospitals train one model, and it answers: the whole road in seven steps. `make demo` runs this file."""

import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from comparison import (
    COLUMNS,
    HOSPITALS,
    JOB,
    PURPOSE,
    SEEDS,
    Measured,
    Pooled,
    Trial,
    abroad,
    alone_everywhere,
    gains,
    goals,
    heldout,
    lay_out,
    mean,
    measured,
    percent,
    spread,
    table,
    together,
    train,
)
from rich.console import Console
from rich.live import Live

import atoll
from atoll.console import show
from atoll.console.client import Client
from atoll.console.document import load_job
from atoll.console.host import find
from atoll.console.terminal import console
from atoll.errors import AtollError, Unavailable
from atoll.planner.explain import duration, volume
from atoll.spec.job import TrainJob
from atoll.spec.model import Deployment
from atoll.spec.run import RunView

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".atoll" / "demo"
DOCTOR = "long-beach"  # the hospital that asks about one of its patients
RULE = 110  # characters of a step's line; a log has no width of its own


class Telling:
    """Where the demo's words go: numbered steps with the seconds since the beginning, in a terminal or a plain log."""

    def __init__(self, out: Console) -> None:
        self.out, self._began = out, time.monotonic()

    def step(self, number: int, words: str) -> None:
        self.out.print()
        self.out.print(f"{number}  {words}  [{self.seconds:.0f} s] ".ljust(RULE, "-"), style="bold")

    def say(self, words: object, style: str = "") -> None:
        self.out.print(words if not isinstance(words, str) else show.text(words, style))

    def table(self, columns: tuple[str, ...], rows: list[Any]) -> None:
        self.out.print(show.table("", columns, rows))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began


class Progress:
    """Shows a run as it goes: first what the statistics were, then a live frame, or a line for each round in a log."""

    def __init__(self, tell: Telling, hub: Client) -> None:
        self._tell, self._hub, self._round = tell, hub, 0
        self._live: Live | None = None

    def __call__(self, view: RunView) -> None:
        if self._live is None:
            if view.work in ("", "measure"):
                return
            statistics_crossed(self._tell, self._hub, view)
            steps = view.plan.sync.period if view.plan else 0
            self._tell.step(4, f"They train one model: {view.rounds} rounds of {steps} steps, each on its own patients")
            self._live = Live(console=self._tell.out, refresh_per_second=10)
            if self._tell.out.is_terminal:
                self._live.start()
        if self._tell.out.is_terminal:
            self._live.update(show.progress(view))
        elif view.round > self._round:
            self._round = view.round
            doing = "  ".join(f"{name} {site.state.split()[0]}" for name, site in sorted(view.sites.items()))
            moved = f"up {volume(view.bytes_up)}, down {volume(view.bytes_down)}"
            self._tell.out.print(
                f"round {view.round:>2}/{view.rounds}  loss {view.loss:.3f}  {moved}  {doing}", soft_wrap=True
            )

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


# --- the seven steps ------------------------------------------------------------------------------------------------


def begin(tell: Telling) -> tuple[Client, dict[str, int], dict[str, Any]]:
    """Lay the data out and start; return the hub, how many patients each keeps aside, and one of those patients."""
    tell.step(1, "A hub and four hospitals, each a process of its own")
    datasets = lay_out(HOME)
    aside = heldout(datasets, SEEDS[0])
    # The doctor's own patient, noted down while the files are laid out; after this only a site's processes open them.
    patient = pq.read_table(HOME / "patients" / DOCTOR / "heart.parquet").take(aside[DOCTOR][:1])
    hub = atoll.connect(HOME)
    seen = [
        (site.name, site.owner, datasets[site.name].rows, PURPOSE, f"{site.latency_ms or 0:.1f} ms")
        for site in hub.sites()
    ]
    tell.table(("site", "hospital", ">patients", "granted for", ">latency"), seen)
    tell.say("Each site dialled the hub (on loopback) and opened no port. Its owner's rules, which have")
    tell.say("the last word there, are examples/hospitals/policy.cedar. The hub never sees a row.")
    return hub, {site: len(rows) for site, rows in aside.items()}, patient.to_pylist()[0]


def plan(tell: Telling, hub: Client) -> None:
    tell.step(2, "The plan: what was considered, what it would cost, and what policy removed")
    job, bundle = load_job(JOB)
    assert isinstance(job, TrainJob)
    made = hub.plan(job, bundle)
    tell.say(show.plan(made))
    free = hub.plan(job.model_copy(update={"sync": None}), bundle)
    other = next(one for one in free.considered if not one.rejected)
    assert other.price is not None
    tell.say(f"Without `sync` in the job it would choose {other.name}: {duration(other.price.seconds)} predicted.")
    tell.say(
        "(Predicted times are those of rounds alone: the start of workers, statistics and evaluation come on top.)"
    )


def statistics_crossed(tell: Telling, hub: Client, view: RunView) -> None:
    tell.step(3, "Statistics to standardise features by: they cross as sums, never as rows")
    crossed = [item for item in hub.traffic(view.run) if item.kind == "query" and item.direction == "out"]
    rows = [(item.site, "out", item.kind, item.count, volume(item.bytes)) for item in crossed]
    tell.table(("site", "way", "kind", ">crossings", ">volume"), rows)
    tell.say("In each: count, sum and sum of squares of five columns over the hospital's training patients.")


def compare(tell: Telling, hub: Client, first: Measured, pooled: Pooled) -> list[Trial]:
    """Train alone and together with every seed; together with the first seed was step 4."""
    found: list[tuple[int, Measured, dict[str, Measured]]] = []
    tell.say("Accuracy on everyone's held-out patients, %:")
    with tell.out.status("") as status:  # shows nothing where the output is no terminal
        for seed in SEEDS:
            status.update(f"seed {seed}: all four together")
            joint = first if seed == SEEDS[0] else together(hub, seed)
            found.append((seed, joint, alone_everywhere(hub, seed, status.update)))
            scores = ", ".join(f"{name} {percent(found[-1][2][site])}" for site, name in HOSPITALS.items())
            tell.say(f"seed {seed}: together {percent(joint)}; alone: {scores}")
    return [
        Trial(seed, joint, models, mark) for (seed, joint, models), mark in zip(found, pooled.results(), strict=True)
    ]


def outcome(tell: Telling, trials: list[Trial], counts: dict[str, int]) -> None:
    tell.say("")
    tell.table(COLUMNS, table(trials, counts))
    tell.say(
        "* IMPOSSIBLE IN REAL LIFE and in this demo only: all patients in one place (examples/hospitals/pooled.py)."
    )
    tell.say("  Alone: a hospital's own model on its own patients; for all hospitals, the mean of the four models.")
    tell.say(f"  Mean ± standard deviation over {len(trials)} seeds, on the same held-out patients; gain in points.")
    tell.say(
        "  AUC of alone and together: from the sites' histograms of 64 bins (off by up to 0.01); of pooled: exact.\n"
    )
    own = {site: gains(trials, site) for site in HOSPITALS}
    small = all(abs(statistics.fmean(found)) <= statistics.stdev(found) for found in own.values())
    tell.say(f"What each hospital gains on its own patients, in points{' (all within the spread)' if small else ''}:")
    tell.say(", ".join(f"{HOSPITALS[site]} {spread(found, sign='+')}" for site, found in own.items()) + ".")
    away = ", ".join(f"{name} {100 * abroad(trials, site):.1f} %" for site, name in HOSPITALS.items())
    tell.say(
        "What it gains is a model that also fits patients unlike its own. Each hospital's own model on everyone's:"
    )
    tell.say(f"{away}; the one they trained together: {100 * mean(trials, 'together', 'accuracy'):.1f} %.")
    tell.say("(AUC within Switzerland says little: 8 of its 123 patients are healthy, one or two of those held out.)\n")
    for words, figure, met in goals(trials):
        tell.say(show.text(f"{'✓' if met else '✗'} {words}: {figure}", "green" if met else "red"))


def deploy(tell: Telling, hub: Client, patient: Mapping[str, Any]) -> None:
    tell.step(6, "The model is registered with where it came from; it is deployed and asked")
    model = hub.model("heart@1")
    sources = ", ".join(f"{one.site} {one.fingerprint[7:15]}" for one in model.lineage.sources)
    tell.say(f"{model.reference}  weights {model.weights[:19]}  run {model.lineage.run}  code {model.code[:19]}")
    tell.say(f"datasets by fingerprint: {sources}; {len(model.lineage.decisions)} policy decisions on record")
    pooled = ", ".join(f"{name} {one.mean:.1f} ± {one.std:.1f}" for name, one in model.statistics.items())
    tell.say(f"statistics inside: {pooled}")
    view = hub.deploy(Deployment(name="heart", model=model.reference))
    asked = {name: value for name, value in patient.items() if name != "target"}
    tell.say(f"\nPOST {view.url.rstrip('/')}/predict   one patient whom {HOSPITALS[DOCTOR]} held out of training:")
    tell.say(json.dumps({"rows": [asked]}), "dim")
    tell.say(json.dumps(hub.predict("heart", [asked])), "bold")
    found = "narrowed" if patient["target"] else "not narrowed"
    tell.say(f"The hospital's own finding for this patient: {found}.")


def record(tell: Telling, hub: Client) -> bool:
    """Verify every journal and tell what crossed; return whether all are intact."""
    tell.step(7, "The record: every journal verified, and what crossed each border")
    verdicts = hub.verify()
    for one in verdicts:
        mark = show.text("intact", "green") if one.intact else show.text(f"BROKEN: {one.words}", "bold red")
        tell.out.print(show.text(f"{Path(one.journal).parent.name:12} {one.entries:>6,} entries  "), mark, sep="")
    crossed = hub.traffic()
    cells = {(item.direction, item.kind, item.site): f"{volume(item.bytes)} ({item.count})" for item in crossed}
    kinds = [("out", "data"), *sorted({(item.direction, item.kind) for item in crossed}, reverse=True)]
    rows = [
        (
            way,
            "patients' rows" if kind == "data" else kind,
            *(cells.get((way, kind, site), "none") for site in HOSPITALS),
        )
        for way, kind in dict.fromkeys(kinds)
    ]
    tell.say("\nVolume (crossings) over all runs of this demo, as each owner recorded it at its own border:")
    tell.table(("way", "kind", *(f">{site}" for site in HOSPITALS)), rows)
    return all(one.intact for one in verdicts)


# --- the whole of it ------------------------------------------------------------------------------------------------


def fresh() -> None:
    """Remove what the last demo left, unless its hub still runs. Raises `Unavailable` then."""
    if HOME.exists() and find(HOME) is not None:
        raise Unavailable(
            f"{HOME.relative_to(ROOT)}: a hub runs over the last demo; end it (Ctrl-C there), then try again"
        )
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)


def demo(tell: Telling) -> int:
    tell.say("Atoll: four hospitals train one model, and no patient's row leaves its hospital", "bold")
    tell.say("920 real patients (UCI Heart Disease, CC BY 4.0): is a coronary artery narrowed by half or more?")
    fresh()
    hub, counts, patient = begin(tell)
    pooled = None
    try:
        plan(tell, hub)
        progress = Progress(tell, hub)
        try:
            run = train(hub, SEEDS[0], watch=progress)
        finally:
            progress.close()
        tell.say(f"Finished in {duration(run.seconds)}; {volume(run.bytes_up)} up and {volume(run.bytes_down)} down.")
        tell.step(5, f"What it brings: alone and together, {len(SEEDS)} seeds, {5 * len(SEEDS)} trainings")
        pooled = Pooled(HOME)
        trials = compare(tell, hub, measured(run), pooled)
        outcome(tell, trials, counts)
        deploy(tell, hub, patient)
        intact = record(tell, hub)
    finally:
        if pooled is not None:
            pooled.close()
        hub.close()
    tell.say(f"\nThe whole demo took {tell.seconds:.0f} s. Its state stays in .atoll/demo; look further with:")
    for command in ("ui", "models show heart@1", f"audit explain {run.run}", "audit verify"):
        tell.say(f"  .venv/bin/atoll --home .atoll/demo {command}")
    return 0 if intact else 6


def main() -> int:
    tell = Telling(console())
    try:
        return demo(tell)
    except KeyboardInterrupt:
        tell.say("Interrupted; what was running has ended.")
        return 130
    except AtollError as error:
        console(stderr=True).print(show.text(f"error: {error}"))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
