"""Decisions a second by a site's own rules: of questions that are all different, and of one that is asked again.

A run asks the same questions each round, with other sizes: what was decided before is remembered by all that rules can
look at, so that only a new question is put to Cedar. The first figure is of new ones alone.
"""

import time
from collections.abc import Sequence

from reporting import Figure, Report

from atoll.policy.defaults import SITE_POLICY
from atoll.policy.rules import Rules
from atoll.spec.fleet import Dataset
from atoll.spec.policy import Crossing, Policy, Request

KEYS = ("policy_decisions_per_s",)
GOAL = 10_000  # new questions a second
_DATASET = Dataset(name="patients", rows=303, fingerprint="sha256:" + "0" * 64, purposes=("cardiology-research",))


def measure(report: Report, quick: bool) -> dict[str, Figure]:
    """Print and return decisions a second: of new questions, of one asked again and again, of new ones refused."""
    count = 2_000 if quick else 20_000
    new = policy_decisions_per_s(count)
    again = _rate([_update(0)] * count)
    refused = _rate([_update(size, "marketing") for size in range(count // 10)], allowed=False)
    report.say("Decisions a second by the rules that a new site begins with, one thread:")
    rows = [("new ones", f"{new:,.0f}"), ("one again and again", f"{again:,.0f}"), ("refused ones", f"{refused:,.0f}")]
    report.table(("questions", ">decisions/s"), rows)
    report.say(f"New ones: goal {GOAL:,}: {'met' if new >= GOAL else 'MISSED'}.")
    return {
        "policy_decisions_per_s": round(new),
        "policy_repeated_per_s": round(again),
        "policy_refused_per_s": round(refused),
    }


def policy_decisions_per_s(questions: int = 20_000) -> float:
    """Return decisions a second about updates of different sizes, each a question that was never asked before: a rule
    that a new site begins with looks at the rows behind it."""
    return _rate([_update(size) for size in range(questions)])


def _update(size: int, purpose: str = "cardiology-research") -> Request:
    crossing = Crossing(kind="update", direction="out", site="zurich", run="heart", bytes=size, rows=64 + size)
    return Request(action="cross", site="zurich", dataset=_DATASET, purpose=purpose, crossing=crossing)


def _rate(asked: Sequence[Request], allowed: bool = True) -> float:
    """Return decisions a second of this thread's processor time: others on the machine do not count against it."""
    rules = Rules(Policy(party="zurich", text=SITE_POLICY))
    rules.decide(_update(-1, asked[0].purpose))  # what is made once for all of them
    began = time.thread_time()
    for request in asked:
        if rules.decide(request).allowed != allowed:
            raise AssertionError(f"{request}: decided otherwise than the figure is about")
    return len(asked) / (time.thread_time() - began)
