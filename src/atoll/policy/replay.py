"""What other rules would have said to what is in a journal: the past as a test of a policy that is not in force yet.

Of a crossing the journal has the thing itself; who asked, for which job and on what terms of the dataset is with the
decision about the run's plan at that site: the newest before it, or the first, where code crossed to make the plan.
Each question is put as of the time of its entry.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from atoll.policy.rules import Rules
from atoll.spec.document import Document
from atoll.spec.event import Crossed, Decided, Event
from atoll.spec.policy import Decision, Request


class Turned(Document):
    """A kind of question of one run that other rules would have answered otherwise, and how often."""

    run: str  # or its job, where there was no run yet
    what: str  # "open patients", "update out"
    count: int
    first: float  # seconds since the epoch
    allowed: bool  # by the other rules
    rules: tuple[str, ...]
    words: str


class Replay(Document):
    """All that would have been otherwise. A run that was refused in the middle would have gone no further."""

    questions: int
    unknown: int  # entries that do not tell what was asked
    runs: tuple[str, ...]
    refused: tuple[str, ...]  # runs that the other rules refuse something that they were allowed
    allowed: tuple[str, ...]  # and those that they allow something that they were refused
    turned: tuple[Turned, ...]


@dataclass(slots=True)
class _Past:
    asked: dict[tuple[str | None, str], Request] = field(default_factory=dict[tuple[str | None, str], Request])
    early: dict[tuple[str | None, str], list[tuple[float, Crossed]]] = field(
        default_factory=dict[tuple[str | None, str], list[tuple[float, Crossed]]]
    )
    questions: int = 0
    unknown: int = 0
    runs: dict[str, None] = field(default_factory=dict[str, None])
    turned: dict[tuple[str, str, bool, tuple[str, ...]], Turned] = field(
        default_factory=dict[tuple[str, str, bool, tuple[str, ...]], Turned]
    )


def replay(entries: Iterable[tuple[float, Event]], rules: Rules) -> Replay:
    """Put what was decided, given as (time, event) in journal order, to ``rules``."""
    past = _Past()
    for time, event in entries:
        if isinstance(event, Decided):
            _decided(past, time, event, rules)
        elif isinstance(event, Crossed):
            _crossed(past, time, event, rules)
    turned = tuple(past.turned.values())
    return Replay(
        questions=past.questions,
        unknown=past.unknown + sum(len(crossings) for crossings in past.early.values()),
        runs=tuple(past.runs),
        refused=tuple(dict.fromkeys(one.run for one in turned if not one.allowed)),
        allowed=tuple(dict.fromkeys(one.run for one in turned if one.allowed)),
        turned=turned,
    )


def _decided(past: _Past, time: float, event: Decided, rules: Rules) -> None:
    request = event.request
    if request is None:
        past.unknown += 1
        return
    if request.dataset is not None:
        past.asked[event.run, request.site] = request
        for earlier, crossed in past.early.pop((event.run, request.site), []):
            _crossed(past, earlier, crossed, rules)
    about = request.dataset.name if request.dataset is not None else request.model or request.job or ""
    _put(past, time, f"{event.action} {about}", event.run, (request, event.decision), rules)


def _crossed(past: _Past, time: float, event: Crossed, rules: Rules) -> None:
    crossing = event.crossing
    known = past.asked.get((crossing.run, crossing.site))
    if known is None:
        past.early.setdefault((crossing.run, crossing.site), []).append((time, event))
        return
    request = known.model_copy(update={"action": "cross", "crossing": crossing})
    _put(past, time, f"{crossing.kind} {crossing.direction}", crossing.run, (request, event.decision), rules)


def _put(past: _Past, time: float, what: str, run: str | None, asked: tuple[Request, Decision], rules: Rules) -> None:
    request, before = asked
    name = run or request.job or "?"
    past.questions += 1
    past.runs.setdefault(name)
    now = rules.decide(request, time)
    # What another party refused it would refuse again.
    if now.allowed == before.allowed or (now.allowed and before.party != rules.party):
        return
    key = (name, what, now.allowed, now.rules)
    seen = past.turned.get(key)
    if seen is not None:
        past.turned[key] = seen.model_copy(update={"count": seen.count + 1})
        return
    past.turned[key] = Turned(
        run=name, what=what, count=1, first=time, allowed=now.allowed, rules=now.rules, words=str(now)
    )
