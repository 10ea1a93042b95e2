"""A plan in plain words: what was chosen, what was not, by whom, and why."""

from collections.abc import Sequence

from atoll.spec.plan import Candidate, Layout, Plan, Reason


def lines(plan: Plan) -> list[str]:
    """Return one sentence for each thing a person should know of the plan, the choice first."""
    said: list[str] = []
    chosen = next((candidate for candidate in plan.considered if not candidate.rejected), None)
    if chosen is not None:
        said.append(f"chosen: {chosen.name}, {plan.rounds} rounds at {', '.join(plan.sites)}{_predicted(chosen)}")
    else:
        said.append(f"sites: {', '.join(plan.sites)}")
    said += told(plan.reasons)
    said += [f"{one.name}: {_verdict(one.rejected)}" for one in plan.considered if one.rejected]
    return said


def told(reasons: Sequence[Reason]) -> list[str]:
    """Return reasons as people read them: one line for what several policies refuse in the same words."""
    parties: dict[str, list[str]] = {}
    for reason in reasons:
        party, _, ground = reason.words.partition(" refuses: ")
        policy, _, rule = reason.by.partition(" (")
        if policy == f"policy of {party}" and ground:
            parties.setdefault(ground, []).append(party)
        else:  # a price and a pin speak for themselves, and a policy's own words name its rule already
            plain = reason.by in ("price", "the job") or (rule and rule in reason.words)
            by = "" if plain else f" [{reason.by}]"
            parties.setdefault(f"{reason.words}{by}", [])
    return [_refusal(who, ground) if who else ground for ground, who in parties.items()]


def _refusal(who: list[str], ground: str) -> str:
    if len(who) == 1:
        return f"{who[0]} refuses: {ground}"
    return f"{', '.join(who[:-1])} and {who[-1]} refuse: {ground}"


def duration(seconds: float) -> str:
    """Return a time for people, in the unit that fits."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def volume(size: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    return scaled(size, ("B", "kB", "MB", "GB", "TB"))


def scaled(value: float, units: Sequence[str]) -> str:
    """Return a number with three digits and its unit, of which each is a thousand times the one before."""
    for unit in units[:-1]:
        if value < 999.5:  # above it, three digits would round to 1000
            return f"{value:.3g} {unit}".rstrip()
        value /= 1000
    return f"{value:.3g} {units[-1]}"


def spelled(layout: Layout) -> str:
    """Return a layout for people: its degrees above 1."""
    said = [f"{axis} {degree}" for axis, degree in layout.model_dump().items() if degree > 1]
    return " x ".join(said) or "1 rank"


def _predicted(chosen: Candidate) -> str:
    if chosen.price is None:
        return ""
    return f"; predicted {duration(chosen.price.seconds)} and {volume(chosen.price.bytes)} over all links"


def _verdict(reasons: Sequence[Reason]) -> str:
    verb = {"price": "not chosen", "the job": "set aside"}.get(reasons[0].by, "removed")
    return f"{verb}: {'; '.join(told(reasons))}"
