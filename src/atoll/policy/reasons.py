"""Why a policy refused: which rule, and which condition of it.

Cedar says which rules decided, and for a default deny it says nothing. So the conditions of the rules are taken apart
at their top-level `&&` and each is put to Cedar by itself, as a permit with that one condition. This happens only on a
refusal, and the little permits are kept.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import cedarpy

from atoll.policy.question import Outcome, Question
from atoll.policy.words import Expression, deed, fact, paths, policy_json
from atoll.spec.policy import Applied

# A permit that fails on these is about something else: it explains less than one that fails on a value.
_ABOUT = {"context.kind", "context.direction"}
_CONTEXT = {"Var": "context"}
_SHOWN = 3  # nearest permits named in one refusal


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a policy. `conditions` all hold when the rule applies; `unless` clauses are in it negated."""

    id: str
    effect: str
    reason: str
    scope: Expression
    conditions: tuple[Expression, ...]
    approvers: tuple[str, ...] = ()  # it permits to two people only: the other one has one of these roles


@dataclass(frozen=True, slots=True)
class Miss:
    """A permit that could have allowed the request, and those of its conditions that do not hold."""

    rule: Rule
    conditions: tuple[Expression, ...]

    @property
    def distance(self) -> tuple[bool, int, int]:
        """How far the rule is from the request: a wrong direction is further than a wrong kind, that than a value."""
        mentioned = [set(paths(condition)) for condition in self.conditions]
        about = sum(_is_about(condition) for condition in self.conditions)
        return {"context.direction"} in mentioned, about, len(self.conditions) - about


def rule_from_json(policy: Mapping[str, Any]) -> Rule:
    """Return a rule from one entry of Cedar's JSON form."""
    annotations: Mapping[str, str] = policy.get("annotations", {})
    conditions: list[Expression] = []
    for clause in policy["conditions"]:
        body: Expression = clause["body"] if clause["kind"] == "when" else {"!": {"arg": clause["body"]}}
        conditions += _conjuncts(body)
    scope = {part: policy[part] for part in ("principal", "action", "resource")}
    roles = tuple(part.strip() for part in (annotations.get("approval") or "").split(",") if part.strip())
    return Rule(annotations["id"], policy["effect"], annotations.get("reason") or "", scope, tuple(conditions), roles)


def seen_by(policies: Iterable[Mapping[str, Any]]) -> frozenset[str] | None:
    """Return which attributes of the context the rules look at, from Cedar's JSON form; None for all of it."""
    found = {name for policy in policies for name in _seen(policy["conditions"])}
    return None if None in found else frozenset(name for name in found if name is not None)


def _seen(node: Any) -> Iterator[str | None]:
    if isinstance(node, list):
        for one in cast("list[Any]", node):
            yield from _seen(one)
    elif isinstance(node, dict):
        for key, value in cast("dict[str, Any]", node).items():
            if key in (".", "has") and value["left"] == _CONTEXT:
                yield value["attr"]
            elif {key: value} == _CONTEXT:  # as a whole
                yield None
            else:
                yield from _seen(value)


@dataclass(frozen=True, slots=True)
class Reasons:
    """The rules of one policy by Cedar's names for them, and the probes made so far."""

    rules: Mapping[str, Rule]
    probes: dict[str, cedarpy.PolicySet] = field(default_factory=dict[str, cedarpy.PolicySet])

    def refusal(self, question: Question, outcome: Outcome) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the ids of the rules behind a refusal, and for each why, in words."""
        found = [self._failure(error) for error in outcome.errors]
        forbids = [rule for rule in map(self.rules.get, outcome.matched) if rule and rule.effect == "forbid"]
        found += [(rule.id, f"{self._forbidden(rule, question)} (rule {rule.id})") for rule in forbids]
        if not found:
            found = self._not_permitted(question)
        return tuple(rule for rule, _ in found if rule), tuple(words for _, words in found)

    def account(self, question: Question) -> tuple[Applied, ...]:
        """Return each rule whose first line fits the question, in the order of the text, and whether it applies."""
        return tuple(
            self._applied(rule, question) for rule in self.rules.values() if self._holds(None, question, rule.scope)
        )

    def _applied(self, rule: Rule, question: Question) -> Applied:
        held = [(condition, self._holds(condition, question)) for condition in rule.conditions]
        applies = all(holds for _, holds in held)
        telling = [(condition, bool(holds)) for condition, holds in held if applies or not holds]
        facts = [words for condition, holds in telling for words in self._facts(condition, holds, question)]
        words = " and ".join(facts) or "it has no condition"
        effect = "permit" if rule.effect == "permit" else "forbid"
        return Applied(rule=rule.id, effect=effect, applies=applies, words=words)

    def _failure(self, error: str) -> tuple[str, str]:
        named = re.search(r"`(policy\d+)`: (.*)", error, re.DOTALL)
        rule = self.rules.get(named[1]) if named else None
        if named is None or rule is None:
            return "", f"the question could not be put to its rules ({error})"
        return rule.id, f"rule {rule.id} could not be evaluated ({named[2]}), and what cannot be decided is refused"

    def _forbidden(self, rule: Rule, question: Question) -> str:
        if rule.reason:
            return rule.reason
        telling = [condition for condition in rule.conditions if not _is_about(condition)] or list(rule.conditions)
        facts = [words for condition in telling for words in self._facts(condition, True, question)]
        return " and ".join(facts) or f"{deed(question)} is forbidden"

    def _not_permitted(self, question: Question) -> list[tuple[str, str]]:
        misses = [miss for rule in self.rules.values() if (miss := self._miss(rule, question))]
        if not misses:
            return [("", f"no rule permits {deed(question)}")]
        nearest = min(miss.distance for miss in misses)
        # With a wrong kind or direction even in the nearest rule, what is asked for comes first.
        prefix = f"no rule permits {deed(question)}: " if nearest[1] else ""
        found: list[tuple[str, str]] = []
        for miss in [miss for miss in misses if miss.distance == nearest][:_SHOWN]:
            facts = [words for condition in miss.conditions for words in self._facts(condition, False, question)]
            found.append((miss.rule.id, f"{prefix}{' and '.join(facts)} (rule {miss.rule.id})"))
        return found

    def _miss(self, rule: Rule, question: Question) -> Miss | None:
        if rule.effect != "permit" or not self._holds(None, question, rule.scope):
            return None
        failing = tuple(part for part in rule.conditions if self._holds(part, question) is False)
        return Miss(rule, failing) if failing else None

    def _holds(self, condition: Expression | None, question: Question, scope: Expression | None = None) -> bool | None:
        """Put one condition to Cedar; None where it fails by itself (a condition before it guards it)."""
        text = policy_json(condition, scope)
        probe = self.probes.get(text)
        if probe is None:
            probe = self.probes[text] = cedarpy.PolicySet.from_json_str(text)
        outcome = question.put(probe)
        return None if outcome.errors else outcome.allowed

    def _facts(self, condition: Expression, holds: bool, question: Question) -> list[str]:
        """Return why `condition` holds or does not: of `&&`, `||` and `!`, only the parts that make it so."""
        operator, operands = next(iter(condition.items()))
        if operator == "!":
            return self._facts(operands["arg"], not holds, question)
        if operator not in ("&&", "||"):
            return [fact(condition, holds, question)]
        parts: list[Expression] = [operands["left"], operands["right"]]
        if holds == (operator == "||"):  # one part was enough
            parts = [part for part in parts if self._holds(part, question) is holds][:1]
        return [words for part in parts for words in self._facts(part, holds, question)]


def _conjuncts(condition: Expression) -> list[Expression]:
    """Take `a && b && ...` apart, and `!(a || b)` as `!a && !b`."""
    operator, operands = next(iter(condition.items()))
    if operator == "&&":
        return _conjuncts(operands["left"]) + _conjuncts(operands["right"])
    if operator == "!":
        inner = cast("Expression", operands["arg"])
        if "||" in inner:
            sides: Expression = inner["||"]
            return _conjuncts({"!": {"arg": sides["left"]}}) + _conjuncts({"!": {"arg": sides["right"]}})
        if "!" in inner:
            return _conjuncts(inner["!"]["arg"])
    return [condition]


def _is_about(condition: Expression) -> bool:
    mentioned = set(paths(condition))
    return bool(mentioned) and mentioned <= _ABOUT
