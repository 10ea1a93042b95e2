"""A pace in words for people: rates, the share of a device's peak, memory, and each rank's step."""

from collections.abc import Iterable, Sequence

from atoll.planner.explain import scaled, volume
from atoll.spec.pace import Pace

COLUMNS = ("site", ">rate", ">MFU", ">memory", ">step, rank by rank", "")
_FEW = 4  # ranks that are told one by one


def words(pace: Pace) -> str:
    """Return a pace in one line; what is not known is left out."""
    return ", ".join(part for part in (_rate(pace), _mfu(pace), _memory(pace), _step(pace.step_seconds)) if part)


def together(paces: Iterable[Pace]) -> str:
    """Return the rate of all sites together, "" while none tells one."""
    known = list(paces)
    if not known:
        return ""
    tokens = [one.tokens_per_second for one in known if one.tokens_per_second is not None]
    return _counted(sum(tokens) if tokens else None, sum(one.examples_per_second for one in known))


def cells(site: str, pace: Pace) -> tuple[str, ...]:
    """Return a row of a table with `COLUMNS`."""
    mfu = _mfu(pace).removeprefix("MFU ") or "-"
    return (site, _rate(pace), mfu, _memory(pace), _step(pace.step_seconds), _loss(pace))


def _rate(pace: Pace) -> str:
    return _counted(pace.tokens_per_second, pace.examples_per_second)


def _counted(tokens: float | None, examples: float) -> str:
    return f"{short(examples)} examples/s" if tokens is None else f"{short(tokens)} tokens/s"


def short(value: float) -> str:
    """Return a number with three digits and the unit's prefix."""
    return scaled(value, ("", "k", "M", "G", "T"))


def _mfu(pace: Pace) -> str:
    return "" if pace.mfu is None else f"MFU {pace.mfu:.1%}"


def _memory(pace: Pace) -> str:
    return f"{volume(pace.memory_bytes)} (most {volume(pace.memory_peak_bytes)})"


def _step(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    scale, unit = (1000, "ms") if max(seconds) < 1 else (1, "s")
    if len(seconds) > _FEW:
        low, high = min(seconds) * scale, max(seconds) * scale
        return f"{low:.3g} to {high:.3g} {unit} in {len(seconds)} ranks"
    return f"{' / '.join(f'{one * scale:.3g}' for one in seconds)} {unit}"


def _loss(pace: Pace) -> str:
    return "" if pace.loss is None else f"loss {pace.loss:.4f}"
