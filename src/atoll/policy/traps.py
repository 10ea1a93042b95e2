"""What is right in a policy's text and still may not do what its author means: above all, a forbid that never forbids.

Cedar skips a rule that looks at something missing. Here nothing is missing, for the schema knows no optional attribute
and what cannot be decided is refused; but a rule can be written so that it is silently about nothing.
"""

import json
from collections.abc import Iterator
from typing import Any, cast, get_args

import cedarpy

from atoll.policy.mistakes import Statement, statements
from atoll.policy.schema import ENTITIES
from atoll.policy.words import Expression, attribute_path
from atoll.spec.document import near_miss
from atoll.spec.job import JOBS
from atoll.spec.policy import CrossingKind
from atoll.spec.wire import ORDER

_STEPS = [kind for kinds in ORDER for kind in kinds]
# What these can be at all: a rule about another word is about nothing.
_VALUES: dict[str, list[str]] = {
    "kind": [*get_args(CrossingKind), *JOBS],
    "direction": ["in", "out"],
    "wire": _STEPS,
    "lacks": _STEPS,
    "privacy": ["record", "site", ""],
    "overdraws": ["promise", "unit", "epsilon", "delta"],
}
_COMPUTED = ("+", "-", "*", "neg")


def traps(text: str) -> list[str]:
    """Return a sentence, with line and rule, for each trap in a text that `Rules` has taken."""
    entries: dict[str, Any] = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
    found: list[str] = []
    for entry, statement in zip(entries.values(), statements(text), strict=True):
        bodies = [clause["body"] for clause in entry["conditions"]]
        found += [words for body in bodies for words in _of_values(entry["effect"], body, statement)]
        if entry["effect"] == "forbid":
            found += [words for body in bodies for words in _of_forbid(body, statement)]
    if all(entry["effect"] == "forbid" for entry in entries.values()):
        found.append("line 1: there is no permit in it, and so all is refused; write what may be done")
    return list(dict.fromkeys(found))


def _of_forbid(body: Expression, statement: Statement) -> Iterator[str]:
    for operator, operands in _operators(body):
        if operator == "has":
            name = operands["attr"]
            owners = [kind for kind, attributes in ENTITIES.items() if name in attributes]
            mend = f"write `resource is {owners[0]}` into its first line" if owners else "it is always there"
            yield (
                f"{statement.at(statement.mention(name))}: where there is no {name!r} this rule forbids nothing; "
                f"{mend}, and take `has` out"
            )
        if operator in _COMPUTED:
            yield (
                f"{statement.place}: computes a number; where it goes beyond 64 bits the rule fails, and then all that "
                "the rule is about is refused"
            )


def _of_values(effect: str, body: Expression, statement: Statement) -> Iterator[str]:
    for attribute, value in _compared(body):
        known = _VALUES.get(attribute)
        if known is not None and value not in known:
            yield (
                f"{statement.at(statement.mention(value))}: context.{attribute} is never {value!r}, so that this "
                f"{effect} may never apply{near_miss(value, known)}"
            )


def _compared(body: Expression) -> Iterator[tuple[str, str]]:
    """Yield which attribute of the context is held against which word."""
    for operator, operands in _operators(body):
        if operator in ("==", "!=", "contains", "containsAny", "containsAll"):
            left, right = cast("Expression", operands["left"]), cast("Expression", operands["right"])
            for one, other in ((left, right), (right, left)):
                variable, _, attribute = attribute_path(one).partition(".")
                if variable == "context":
                    yield from ((attribute, value) for value in _words(other))


def _words(expression: Expression) -> Iterator[str]:
    if isinstance(expression.get("Value"), str):
        yield expression["Value"]
    for member in expression.get("Set", ()):
        yield from _words(member)


def _operators(expression: Any) -> Iterator[tuple[str, Any]]:
    waiting: list[Any] = [expression]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += cast("list[Any]", part)
        elif isinstance(part, dict):
            for operator, operands in cast("Expression", part).items():
                yield operator, operands
                waiting.append(operands)
