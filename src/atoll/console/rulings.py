"""Policies as people see them: what rules would say to a job, and what they would have said in the past."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType

from atoll.console.show import number, table, text
from atoll.policy.replay import Replay
from atoll.spec.policy import Foreseen


def foreseen(found: Sequence[Foreseen]) -> RenderableType:
    """Each point with its verdict, and under it the rules that it comes under, each with why it applies or not."""
    rows: list[tuple[object, ...]] = []
    for one in found:
        verdict = text("allowed", "green") if one.decision.allowed else text("refused", "red")
        rows.append((one.point, one.subject, one.party, verdict, "", "; ".join(one.decision.reasons)))
        for rule in one.rules:
            applies = f"{rule.effect}s" if rule.applies else "does not apply"
            rows.append(("", "", "", applies, rule.rule, rule.words))
    refused = [one for one in found if not one.decision.allowed]
    last = "Every point is allowed." if not refused else f"{len(refused)} of {len(found)} points are refused."
    shown = table("What each policy would say", ("point", "about", "rules of", "", "rule", "because"), rows)
    return Group(shown, text(last))


def replayed(found: Replay) -> RenderableType:
    rows = [
        (
            one.run,
            one.what,
            text("allowed", "green") if one.allowed else text("refused", "red"),
            number(one.count),
            f"{datetime.fromtimestamp(one.first):%Y-%m-%d %H:%M}",
            ", ".join(one.rules),
            one.words,
        )
        for one in found.turned
    ]
    shown = [table("Otherwise", ("run", "what", "now", ">times", "first", "rule", "because"), rows)] if rows else []
    return Group(*shown, *(text(words) for words in _sums(found)))


def _sums(found: Replay) -> list[str]:
    told = [f"Of {len(found.runs)} runs, {len(found.refused)} would have been refused: {', '.join(found.refused)}"]
    if not found.refused:
        told = [f"None of {len(found.runs)} runs would have been refused."]
    if found.allowed:
        told.append(f"Allowed what they were refused: {', '.join(found.allowed)}")
    if found.unknown:
        told.append(f"{found.unknown} entries do not tell what was asked, and were left out.")
    return told
