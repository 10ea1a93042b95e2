"""A plan in plain words: what was chosen, what was not, by whom, and why."""

from atoll.spec.plan import Candidate, Plan, Reason


def lines(plan: Plan) -> list[str]:
    """Return one sentence for each thing a person should know of the plan, the choice first."""
    said: list[str] = []
    chosen = next((candidate for candidate in plan.considered if not candidate.rejected), None)
    if chosen is not None:
        said.append(f"chosen: {chosen.name}, {plan.rounds} rounds at {', '.join(plan.sites)}{_predicted(chosen)}")
    else:
        said.append(f"sites: {', '.join(plan.sites)}")
    said += [f"{reason.by}: {reason.words}" for reason in plan.reasons]
    said += [_rejection(candidate, reason) for candidate in plan.considered for reason in candidate.rejected]
    return said


def duration(seconds: float) -> str:
    """Return a time for people, in the unit that fits."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


def volume(size: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # above it, three digits would round to 1000
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _predicted(chosen: Candidate) -> str:
    if chosen.price is None:
        return ""
    return f"; predicted {duration(chosen.price.seconds)} and {volume(chosen.price.bytes)} over all links"


def _rejection(candidate: Candidate, reason: Reason) -> str:
    if reason.by == "price":
        return f"{candidate.name}: not chosen: {reason.words}"
    if reason.by == "the job":
        return f"{candidate.name}: set aside by the job: {reason.words}"
    return f"{candidate.name}: removed by {reason.by}: {reason.words}"
