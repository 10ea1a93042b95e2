"""One party's rules, parsed and checked once, and the decisions they give."""

import json
import re
import threading
from collections import OrderedDict
from typing import Any

import cedarpy

from atoll.errors import Invalid
from atoll.policy.mistakes import size_mistakes, statements, syntax_mistakes, type_mistakes
from atoll.policy.question import Question, translate
from atoll.policy.reasons import Reasons, rule_from_json
from atoll.spec.policy import Decision, Policy, Request

_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_KNOWN = 1024  # newest decisions that are remembered: a run asks the same each round, and Cedar takes most of a ms


class Rules:
    """A policy that can be asked. Immutable, so threads may share it.

    Raises `Invalid`, one line for each mistake with its line and rule, for text that is no Cedar, that names what
    the schema does not have, or whose rules have no `@id` of their own.
    """

    __slots__ = ("_known", "_policies", "_reasons", "_turn", "policy")

    def __init__(self, policy: Policy) -> None:
        text = policy.text
        mistakes = size_mistakes(text) or syntax_mistakes(text)
        parsed: dict[str, Any] = {} if mistakes else json.loads(cedarpy.policies_to_json_str(text))
        mistakes = mistakes or _naming_mistakes(text, parsed) or type_mistakes(text)
        if mistakes:
            raise Invalid("\n".join(f"policy of {policy.party}: {mistake}" for mistake in mistakes))
        self.policy = policy
        self._policies = cedarpy.PolicySet.from_str(policy.text)
        rules = {name: rule_from_json(entry) for name, entry in parsed["staticPolicies"].items()}
        self._reasons = Reasons(rules)
        self._turn = threading.Lock()
        self._known: OrderedDict[str, Decision] = OrderedDict()  # by question: a decision follows from it alone

    @property
    def party(self) -> str:
        return self.policy.party

    @property
    def ids(self) -> tuple[str, ...]:
        """The `@id` of each rule, in the order of the text."""
        return tuple(rule.id for rule in self._reasons.rules.values())

    def decide(self, request: Request) -> Decision:
        """Answer one request. Allowed only if a permit matches, no forbid does, and no rule failed to evaluate."""
        try:
            question = translate(request)
            text = question.text
            with self._turn:
                decision = self._known.get(text)
            if decision is None:
                decision = self._decide(question)
        except Invalid as problem:
            return self._refuse((), (str(problem),))
        with self._turn:
            self._known[text] = decision
            self._known.move_to_end(text)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return decision

    def _decide(self, question: Question) -> Decision:
        outcome = question.put(self._policies)
        if not outcome.allowed:
            return self._refuse(*self._reasons.refusal(question, outcome))
        ids = tuple(sorted(self._reasons.rules[name].id for name in outcome.matched))
        words = f"{self.party} allows it (rule{'s' if len(ids) > 1 else ''} {', '.join(ids)})"
        return Decision(allowed=True, party=self.party, rules=ids, reasons=(words,))

    def _refuse(self, ids: tuple[str, ...], reasons: tuple[str, ...]) -> Decision:
        words = tuple(f"{self.party} refuses: {reason}" for reason in reasons)
        return Decision(allowed=False, party=self.party, rules=ids, reasons=words)


def _naming_mistakes(text: str, parsed: dict[str, Any]) -> list[str]:
    """Return which rules cannot be referred to: without an `@id`, with a bad one, or with another rule's."""
    if parsed["templates"]:
        return ["line 1: a template (?principal, ?resource) permits nothing by itself; write the rule out"]
    entries = list(parsed["staticPolicies"].values())
    if not entries:
        return [
            "line 1: there is no rule in it, and without a rule all is refused; write at least one permit or forbid"
        ]
    found: list[str] = []
    seen: dict[str, int] = {}
    for entry, statement in zip(entries, statements(text), strict=True):
        name = entry.get("annotations", {}).get("id") or ""
        if not name:
            found.append(f'{statement.place}: a rule without a name; write @id("owner.what") before it')
        elif not _ID.fullmatch(name):
            found.append(f"{statement.place}: @id {name!r} is no name; use a-z, 0-9, dot, dash and underscore")
        elif name in seen:
            found.append(f"{statement.place}: the rule in line {seen[name]} has this name too; give each its own")
        seen.setdefault(name, statement.line)
    return found
