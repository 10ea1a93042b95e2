"""One party's rules, parsed and checked once, and the decisions they give."""

import json
import re
import threading
import time
from collections import OrderedDict
from typing import Any

import cedarpy

from atoll.errors import Invalid
from atoll.policy.defaults import TERMS
from atoll.policy.mistakes import approval_mistakes, size_mistakes, statements, syntax_mistakes, type_mistakes
from atoll.policy.question import Question, translate
from atoll.policy.reasons import Reasons, rule_from_json, seen_by
from atoll.spec.policy import Account, Decision, Policy, Request

_ID = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_RESERVED = "terms."  # how the names of what datasets bring begin
_KNOWN = 1024  # newest decisions that are remembered: a run asks the same each round, and Cedar takes most of a ms


class Rules:
    """A policy that can be asked. Immutable, so threads may share it. A site's holds its datasets' terms, too.

    Raises `Invalid`, one line for each mistake with its line and rule, for text that is no Cedar, that names what
    the schema does not have, or whose rules have no `@id` of their own.
    """

    __slots__ = ("_allowing", "_known", "_policies", "_reasons", "_seen", "_turn", "policy")

    def __init__(self, policy: Policy) -> None:
        text = policy.text
        mistakes = size_mistakes(text) or syntax_mistakes(text)
        parsed: dict[str, Any] = {} if mistakes else json.loads(cedarpy.policies_to_json_str(text))
        mistakes = mistakes or _naming_mistakes(text, parsed) or type_mistakes(text)
        mistakes = mistakes or approval_mistakes(text, parsed, policy.party)
        if mistakes:
            raise Invalid("\n".join(f"policy of {policy.party}: {mistake}" for mistake in mistakes))
        self.policy = policy
        text = text if policy.party == "hub" else f"{text}\n{TERMS}"
        self._policies = cedarpy.PolicySet.from_str(text)
        entries: dict[str, Any] = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"]
        self._seen = seen_by(entries.values())
        self._reasons = Reasons({name: rule_from_json(entry) for name, entry in entries.items()})
        self._allowing: dict[tuple[str, ...], Decision] = {}  # by the rules that matched: an allowance says no more
        self._turn = threading.Lock()
        self._known: OrderedDict[str, Decision] = OrderedDict()  # by question: a decision follows from it alone

    @property
    def party(self) -> str:
        return self.policy.party

    @property
    def ids(self) -> tuple[str, ...]:
        """The `@id` of each rule, in the order of the text."""
        return tuple(rule.id for rule in self._reasons.rules.values() if not rule.id.startswith(_RESERVED))

    def decide(self, request: Request, at: float | None = None) -> Decision:
        """Answer one request as of ``at`` (seconds since the epoch), by which grants end; now, when left out.

        Allowed only if a permit matches, no forbid does, and no rule failed to evaluate.
        """
        try:
            question = translate(request, time.time() if at is None else at, self._seen)
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

    def permits(self, request: Request, at: float | None = None) -> bool:
        """Answer one request as `decide` does, in no words: those of a refusal take ten times as long."""
        try:
            outcome = translate(request, time.time() if at is None else at, self._seen).put(self._policies)
        except Invalid:
            return False
        return outcome.allowed and self._allow(outcome.matched).allowed

    def account(self, request: Request, at: float | None = None) -> Account:
        """Answer one request as `decide` does, and tell of each rule that is about such requests what became of it."""
        decision = self.decide(request, at)
        try:
            question = translate(request, time.time() if at is None else at, self._seen)
            return Account(decision=decision, rules=self._reasons.account(question))
        except Invalid:  # the decision says why
            return Account(decision=decision)

    def _decide(self, question: Question) -> Decision:
        outcome = question.put(self._policies)
        if not outcome.allowed:
            return self._refuse(*self._reasons.refusal(question, outcome))
        known = self._allowing.get(outcome.matched)
        if known is None:
            known = self._allowing[outcome.matched] = self._allow(outcome.matched)
        return known

    def _allow(self, matched: tuple[str, ...]) -> Decision:
        """Return the decision by these permits: allowed, unless each of them wants another person to agree."""
        rules = sorted((self._reasons.rules[name] for name in matched), key=lambda rule: rule.id)
        alone = tuple(rule.id for rule in rules if not rule.approvers)
        if alone:
            words = f"{self.party} allows it (rule{'s' if len(alone) > 1 else ''} {', '.join(alone)})"
            return Decision(allowed=True, party=self.party, rules=alone, reasons=(words,))
        roles = tuple(dict.fromkeys(role for rule in rules for role in rule.approvers))
        ids = tuple(rule.id for rule in rules)
        words = f"{self.party} needs the approval of another {' or '.join(roles)} for it (rule {', '.join(ids)})"
        return Decision(allowed=False, party=self.party, rules=ids, reasons=(words,), approvers=roles)

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
        elif name.startswith(_RESERVED):
            found.append(f"{statement.place}: names that begin with {_RESERVED} are of datasets' terms; choose another")
        elif name in seen:
            found.append(f"{statement.place}: the rule in line {seen[name]} has this name too; give each its own")
        seen.setdefault(name, statement.line)
    return found
