"""How the record looks in a terminal: verdicts, a run's entries, what crossed borders, what was live."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType

from atoll.console.show import number, table, text
from atoll.planner.explain import volume
from atoll.spec.record import Live
from atoll.spec.run import Traffic, Verdict


def traffic(found: Sequence[Traffic]) -> RenderableType:
    rows = [
        (
            item.site,
            item.direction,
            item.kind,
            number(item.count),
            volume(item.bytes),
            text(item.refused, "red" if item.refused else "dim"),
        )
        for item in sorted(found, key=lambda item: (item.site, item.direction, item.kind))
    ]
    return table("What crossed each border", ("site", "way", "kind", ">crossings", ">volume", ">refused"), rows)


def verdicts(found: Sequence[Verdict]) -> RenderableType:
    rows = [
        (
            item.journal,
            number(item.entries),
            text("intact", "green") if item.intact else text(_broken(item), "bold red"),
            ", ".join(f"{name} to {number(size)}" for name, size in sorted(item.witnesses.items())),
            item.words,
        )
        for item in found
    ]
    return table("Journals", ("journal", ">entries", "", "cosigned by", ""), rows)


def _broken(item: Verdict) -> str:
    return "BROKEN" if item.bad is None else f"BROKEN at entry {item.bad}"


def journal(lines: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The entries of one run in words."""
    rows = [
        (
            line.get("seq", ""),
            _at(float(line.get("time", 0.0))),
            line.get("actor", ""),
            line.get("kind", ""),
            line.get("words", ""),
        )
        for line in lines
    ]
    return table("What happened", (">entry", "time", "by", "event", "words"), rows)


def live(found: Sequence[Live]) -> RenderableType:
    """What was live: deployments first, then aliases."""
    rows = [
        ("alias" if item.alias else "deployment", item.alias or item.name, item.model, _at(item.since), item.actor)
        for item in found
    ]
    return table("What was live", ("", "name", "model", "since", "by"), rows)


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
