"""Claim: over a slow link two sites that stream fragments of the model train about as fast as with no link at all.

A hub and two sites, each a process as its user starts it, joined by token over mutual TLS. Each site is in a network of
its own behind a link with a rate and a round trip (`benchmarks/shaped`). They train the GPT of `examples/coder` in
several ways. The limit, in the same run, is the same processes over this machine's loopback. The network changes no
number, so a way's loss is the same over every link: exchange at every step, which would take an hour over a slow one,
is timed there over few steps and has its loss from loopback.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "coder"))

from fleet import Fleet, Ran, fleet
from prepare import prepare
from reporting import Figure, Report, fresh, options, peer
from shaped import CannotShape, Shape, links

from atoll.console.document import load_job
from atoll.planner.explain import volume
from atoll.spec.document import parse
from atoll.spec.job import TrainJob
from atoll.spec.model import Bundle
from atoll.spec.plan import Layout
from atoll.spec.sync import Sync

EXAMPLE = Path(__file__).parents[1] / "examples" / "coder" / "job.yaml"
CONTEXT = 64  # bytes of a window that the task predicts: its tokens
SEED = 1  # what was tried for the outer step was tried on seed 0
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
KEPT, FEWER, GAP = 0.95, 100.0, 2.0  # of the tokens per second; times the bytes; percent of loss

DATASET, PURPOSE = "source", "research"  # as job.yaml has them

EVERY, STREAMED, ALONE = "every step", "streaming, int4", "once, at the end"
DILOCO = {"preset": "diloco", "period": 50, "outer": {"rate": 0.7, "momentum": 0.5}}
INT8, INT4 = [{"kind": "int8"}], [{"kind": "int4"}]
WAYS: dict[str, dict[str, Any]] = {
    EVERY: {"preset": "data_parallel", "outer": {"kind": "adam", "rate": 0.001}},
    "period 50": DILOCO,
    "period 50, int8": {**DILOCO, "wire": INT8, "down": INT8},
    "period 50, int4": {**DILOCO, "wire": INT4, "down": INT4},
    STREAMED: {
        "preset": "streaming_diloco",
        "period": 16,
        "fragments": 2,
        "delay": 6,  # of the eight steps between two exchanges: some 200 ms for each to travel and be merged in
        "outer": {"rate": 1.0, "momentum": 0.0, "nesterov": False},
        "wire": INT4,
        "down": INT4,
    },
}
MAIN = ("period 50", STREAMED)  # over the other links, too
FIRST = Shape(mbit=100, round_trip=0.05)
OTHERS = (Shape(mbit=100, round_trip=0.1), Shape(mbit=20, round_trip=0.05), Shape(mbit=20, round_trip=0.1))


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of a run whose loss counts, of one whose speed alone does, and of every-step exchange by megabits."""

    full: int
    speed: int
    every: Mapping[float, int]


FULL, QUICK = Steps(1600, 200, {100: 12, 20: 5}), Steps(50, 50, {100: 3, 20: 2})


@dataclass(frozen=True, slots=True)
class Row:
    """A run of a way over a link, or over loopback."""

    link: Shape | None
    way: str
    ran: Ran

    @property
    def speed(self) -> float:
        """Tokens per second, of both sites together."""
        return self.ran.examples * CONTEXT / self.ran.seconds

    @property
    def steady(self) -> float:
        """Tokens per second after the first round, which waits for the first weights; of all where there is one."""
        examples, seconds = self.ran.first if self.ran.rounds > 1 else (0, 0.0)
        return (self.ran.examples - examples) * CONTEXT / (self.ran.seconds - seconds)

    @property
    def loss(self) -> float | None:
        """Held-out, in nats per byte, where it was measured."""
        return self.ran.metrics.get("loss")

    @property
    def relay_share(self) -> float | None:
        """Of one core, what carrying the packets took while the run lasted."""
        return self.ran.carried.processor_seconds / self.ran.seconds if self.ran.carried else None


def main() -> int:
    asked = options("A GPT at two sites over slow links, by several ways of agreeing.")
    report = Report("wan", "Two sites over slow links: every step, every 50 steps, and streaming fragments", asked)
    try:
        with links([FIRST]):
            pass
    except CannotShape as error:
        print(json.dumps({"skipped": str(error)}))  # not recorded: nothing was measured
        return 0
    report.finish(tell(report, measure(report, QUICK if asked.quick else FULL, asked.quick)))
    return 0


def measure(report: Report, steps: Steps, quick: bool) -> list[Row]:
    home = fresh("wan")
    files = prepare(home / "texts")
    rows: list[Row] = []

    def run(at: Fleet, link: Shape | None, way: str, count: int) -> None:
        """Run a way, and say so: all of them take a while. The loss is measured where it counts."""
        rows.append(Row(link, way, at.run(*job(WAYS[way], count, count == steps.full))))
        report.say(f"{link or 'loopback'}; {way}: {count} steps, {rows[-1].speed:,.0f} tokens/s")

    def standing(at: Fleet, link: Shape) -> None:
        assert at.links is not None
        found = at.links.measure(0, int(link.mbit * 2e5))
        report.say(f"{link}: a bare TCP connection finds {1000 * found.round_trip:.0f} ms and {found.mbit:.1f} Mbit/s")

    def fleet_of(link: Shape | None) -> AbstractContextManager[Fleet]:
        name = f"{link.mbit:g}-{link.round_trip:g}" if link else "loopback"
        return fleet(home / name, DATASET, PURPOSE, files, link)

    with fleet_of(None) as near:
        alone = {**DILOCO, "period": steps.speed}
        rows.append(Row(None, ALONE, near.run(*job(alone, steps.speed, False))))
        run(near, None, EVERY, steps.full)
        with fleet_of(FIRST) as far:
            standing(far, FIRST)
            run(far, FIRST, EVERY, steps.every[FIRST.mbit])
            for way in MAIN if quick else tuple(WAYS)[1:]:
                run(near, None, way, steps.speed)  # before and after, for this machine's speed swings
                run(far, FIRST, way, steps.full)
                run(near, None, way, steps.speed)
    for link in () if quick else OTHERS:
        with fleet_of(link) as far:
            standing(far, link)
            run(far, link, EVERY, steps.every[link.mbit])
            for way in MAIN:
                run(far, link, way, steps.speed)
    return rows


def job(sync: dict[str, Any], steps: int, evaluate: bool) -> tuple[TrainJob, Bundle]:
    made, bundle = load_job(EXAMPLE, [f"steps={steps}", f"seed={SEED}"])
    assert isinstance(made, TrainJob)
    assert bundle is not None
    data = made.data if evaluate else made.data.model_copy(update={"evaluate": ()})
    # One rank: each of the two sites would take this machine's two cores for its own.
    more = {"sync": parse(Sync, sync, "sync"), "data": data, "layout": Layout(data=1)}
    return made.model_copy(update=more), bundle


def tell(report: Report, rows: list[Row]) -> dict[str, Figure]:
    every = next(row for row in rows if row.way == EVERY and row.link is None)
    streamed = next(row for row in rows if row.way == STREAMED and row.link == FIRST)
    alone = next(row for row in rows if row.way == ALONE)
    report.table(COLUMNS, [cells(row, rows, every) for row in rows])
    # After the first round: the runs over loopback are shorter, and what starting costs weighs more in them.
    kept, fewer, gap = streamed.steady / limit(streamed, rows)[1], less(streamed, every), behind(streamed, every)
    report.say(NOTES + f"TCP: {CONGESTION.read_text().strip()}, as this machine has it.")
    for good, words in (
        (kept >= KEPT, f"tokens/s at {FIRST}, after the 1st round, {100 * KEPT:g} % of no network: {100 * kept:.1f} %"),
        (fewer >= FEWER, f"bytes at least {FEWER:g}x fewer than every step: {fewer:.0f}x"),
        (gap is not None and gap <= GAP, f"loss within {GAP:g} % of every step: {gap or 0:+.2f} %"),
    ):
        report.say(f"{'met   ' if good else 'MISSED'}  {words}")
    report.say(
        f"        of sites that do not agree before the end, over loopback: {100 * streamed.speed / alone.speed:.1f} %"
    )
    if report.options.quick:
        report.say("        (quick: too few steps for a loss that means anything)")
    report.say(f"\n{peer('flwr', 'Flower')}; {peer('torchft', 'torchft')}")
    figures: dict[str, Figure] = {
        "kept_tokens_ratio": round(kept, 3),
        "bytes_ratio": round(fewer, 1),
        "loss_gap_percent": None if gap is None else round(gap, 2),
        "kept_of_never_agreeing": round(streamed.speed / alone.speed, 3),
    }
    for row in rows:
        under = figures.setdefault(str(row.link or "loopback"), {})
        assert isinstance(under, dict)
        under[row.way if row.way not in under else f"{row.way}, again"] = named(row, rows, every)
    return figures


NOTES = """
Loss in nats per byte, held out; a token is a byte of text. Bytes of a step at both sites, from those of the run: as the
owners' journals have them and, with headers, TLS and what was sent again, as the links carried them. Kept: of the same
way's tokens per second over loopback, in the same run; after the 1st round, which waits for the first weights, it is
what a long run keeps. Relay: of one core, what carrying the packets took. A queue holds what a round trip carries.
"""


def limit(row: Row, rows: list[Row]) -> tuple[float, float]:
    """Return the same way's tokens per second over loopback: of whole runs, and after the first round."""
    same = [other for other in rows if other.way == row.way and other.link is None]
    return fmean(other.speed for other in same), fmean(other.steady for other in same)


def less(row: Row, every: Row) -> float:
    """Return how many times fewer bytes a step takes than with every-step exchange."""
    return (every.ran.crossed / every.ran.steps) / (row.ran.crossed / row.ran.steps)


def behind(row: Row, every: Row) -> float | None:
    """Return by how many percent the loss is above every-step exchange's at equal tokens."""
    if row.loss is None or every.loss is None or row.ran.steps != every.ran.steps:
        return None
    return 100 * (row.loss / every.loss - 1)


COLUMNS = (
    "link",
    "way",
    ">steps",
    ">tokens/s",
    ">kept",
    ">after 1st",
    ">bytes",
    ">on the link",
    ">fewer",
    ">loss",
    ">gap",
    ">relay",
)


def cells(row: Row, rows: list[Row], every: Row) -> tuple[str, ...]:
    carried, gap, (whole, steady) = row.ran.carried, behind(row, every), limit(row, rows)
    return (
        str(row.link or "loopback"),
        row.way,
        str(row.ran.steps),
        f"{row.speed:,.0f}",
        f"{100 * row.speed / whole:.1f} %" if row.link else "",
        f"{100 * row.steady / steady:.1f} %" if row.link else "",
        volume(round(row.ran.crossed / row.ran.steps)),
        volume(round(carried.bytes / row.ran.steps)) if carried else "",
        f"{less(row, every):.1f}x",
        f"{row.loss:.4f}" if row.loss else "",
        f"{gap:+.2f} %" if gap is not None and row is not every else "",
        f"{100 * row.relay_share:.0f} %" if row.relay_share is not None else "",
    )


def named(row: Row, rows: list[Row], every: Row) -> dict[str, Figure]:
    gap, (whole, steady) = behind(row, every), limit(row, rows)
    return {
        "tokens_per_second": round(row.speed),
        "kept": round(row.speed / whole, 3) if row.link else None,
        "kept_after_first_round": round(row.steady / steady, 3) if row.link else None,
        "bytes_a_step": round(row.ran.crossed / row.ran.steps),
        "bytes_a_step_on_the_link": round(row.ran.carried.bytes / row.ran.steps) if row.ran.carried else None,
        "loss": row.loss and round(row.loss, 4),
        "loss_gap_percent": None if gap is None else round(gap, 2),
        "relay_of_a_core": row.relay_share and round(row.relay_share, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
