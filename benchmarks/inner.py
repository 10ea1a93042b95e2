"""Claim: one site's ranks train as fast as a bare script's, start sooner, and lose no step when one of them dies.

Two ranks on one machine and a GPT of 10.9 million parameters on bytes of Python. The peers, a bare torchrun DDP script
and Ray Train's TorchTrainer, train the same module on the same batches with the same AdamW; they and Atoll's own
executors take turns, and each ratio is of runs that followed each other. Ranks are driven as a site's agent does it.
"""

import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

from inner_cases import FULL, GOALS, QUICK, Absent, Bench, Case, Samples, checkpoint, mirror, recovery, speed, spread
from inner_cases import uneven as unequal
from reporting import Figure, Options, Report, fresh, parser

from atoll.errors import AtollError

CASES: Mapping[tuple[str, ...], Case] = {
    speed.KEYS: speed.local,
    speed.RAY_KEYS: speed.actors,
    recovery.KEYS: recovery.copies,
    recovery.MESH_KEYS: recovery.meshes,
    mirror.KEYS: mirror.measure,
    checkpoint.KEYS: checkpoint.measure,
    unequal.KEYS: unequal.measure,
}
REPEATS = 5


def main() -> int:
    reading = parser("One site's ranks beside torchrun and Ray Train, and what a dead rank costs.")
    reading.add_argument("--only", nargs="+", choices=sorted(GOALS), metavar="KEY", help=f"of {', '.join(GOALS)}")
    reading.add_argument("--repeats", type=int, help=f"of each case ({REPEATS}; 1 with --quick)")
    given = reading.parse_args()
    logging.getLogger("atoll").setLevel(logging.ERROR)  # that a rank was lost is no news here
    asked = Options(given.quick, given.record, given.json)
    report = Report("inner", "One site's ranks, beside torchrun and Ray Train", asked)
    home = fresh("inner")
    repeats = given.repeats or (1 if asked.quick else REPEATS)
    bench = Bench(report, home, QUICK if asked.quick else FULL, repeats)
    before, began = os.getloadavg(), time.monotonic()
    samples, missing = run(bench, frozenset(given.only or GOALS))
    figures = tell(report, samples, missing)
    figures |= {"repeats": repeats, "load_before": round(before[0], 2), "load_after": round(os.getloadavg()[0], 2)}
    figures["missing"] = dict(missing)
    took = time.monotonic() - began
    report.say(f"\nLoad of the machine {before[0]:.2f} before, {figures['load_after']} after {took:.0f} s.")
    report.finish(figures, {key: [round(value, 5) for value in values] for key, values in samples.items()})
    return 1 if any(words.startswith("failed") for words in missing.values()) else 0


def run(bench: Bench, wanted: frozenset[str]) -> tuple[Samples, dict[str, str]]:
    """Return all samples by key, and why there are none of a key. A case that fails does not keep the others away."""
    samples: Samples = {}
    missing: dict[str, str] = {}
    for number, (keys, case) in enumerate(CASES.items()):
        asked = wanted & set(keys)
        if not asked:
            continue
        bench.report.say(f"{', '.join(key for key in keys if key in asked)}:")
        home = bench.home / f"case-{number}"
        home.mkdir()
        try:
            samples |= case(Bench(bench.report, home, bench.size, bench.repeats), asked)
        except Absent as absent:
            missing |= dict.fromkeys(asked, f"not measured: {absent}")
        except (AtollError, RuntimeError, TimeoutError, ValueError) as error:
            missing |= dict.fromkeys(asked, f"failed: {error}")
        for key in asked & missing.keys():
            bench.report.say(f"  {key}: {missing[key]}")
    return samples, missing


def tell(report: Report, samples: Samples, missing: Mapping[str, str]) -> dict[str, Figure]:
    """Print a table of the figures; return them, medians of their repeats, with everything else that was measured."""
    rows: list[Sequence[str]] = []
    figures: dict[str, Figure] = {}
    quartiles: dict[str, Figure] = {}
    for key, goal in GOALS.items():
        if key in missing:
            rows.append((key, "", "", str(goal), "", missing[key][:60]))
            figures[key] = None
        if key not in samples:
            continue
        value = _figure(key, samples[key])
        low, high = spread(samples[key])
        met = "met" if goal.met(value) else "MISSED"
        rows.append((key, f"{value:.3f}", f"{low:.3f} to {high:.3f}", str(goal), met, goal.what))
        figures[key], quartiles[key] = round(value, 4), [round(low, 4), round(high, 4)]
    report.say()
    report.table(("figure", ">median", ">quartiles", "goal", "", "what"), rows)
    others = {key: values for key, values in samples.items() if key not in GOALS}
    if others:
        report.table(("also", ">median"), [(key, f"{_figure(key, values):.3f}") for key, values in others.items()])
    also: dict[str, Figure] = {key: round(_figure(key, values), 4) for key, values in others.items()}
    return {**figures, "quartiles": quartiles, "also": also}


def _figure(key: str, values: list[float]) -> float:
    """Return the median; of lost steps the worst repeat counts."""
    return max(values) if key.endswith("steps_lost") else statistics.median(values)


if __name__ == "__main__":
    sys.exit(main())
