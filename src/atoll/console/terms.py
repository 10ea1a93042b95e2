"""A dataset's terms as a person gives them: until when a grant holds, and what updates must pass through."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pydantic import TypeAdapter, ValidationError

from atoll.errors import Invalid
from atoll.spec.wire import Wire

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_WIRE: TypeAdapter[Wire] = TypeAdapter(Wire)
_VALUES = {"clip": "value", "topk": "share", "zstd": "level"}


def end_of(text: str) -> datetime:
    """Return when a grant given until ``text`` ends: with the day, in UTC, or at the time given with its zone."""
    try:
        found = datetime.fromisoformat(text)
        if _DAY.fullmatch(text):
            return found.replace(tzinfo=UTC) + timedelta(days=1)
    except (ValueError, OverflowError):
        raise Invalid(f"until: {text!r} is no date; give one as 2027-01-31, or as 2027-01-31T12:00Z") from None
    if found.tzinfo is None:
        raise Invalid(f"until: {text!r} has no time zone; add one: {text}Z")
    return found


def required(steps: Sequence[str]) -> Wire:
    """Return transforms given as `clip=1.0` or `int8`, in this order; raise `Invalid`."""
    made: list[dict[str, object]] = []
    for step in steps:
        kind, _, value = step.partition("=")
        made.append({"kind": kind, **({_VALUES.get(kind, "value"): value} if value else {})})
    try:
        return _WIRE.validate_python(made)
    except ValidationError as error:
        words = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors(include_url=False))
        raise Invalid(f"require: {', '.join(steps)}: {words}") from None
