"""What a condition of a rule comes to, in words, with the values it was about.

Conditions are in Cedar's JSON form: one operator and its operands. This module does not decide whether a condition
holds: it is told, and says so.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, cast

import cedarpy

from atoll.policy.question import Question

Expression = dict[str, Any]

_LONGEST = 80  # characters of a value: other parties choose values, and reasons end up in logs and terminals
_MOST = 8  # members of a list

_CONTEXT_WORDS = {
    "by": "whoever asked for it",
    "to": "receiver",
    "region": "the receiver's region",
    "code": "code",
    "bytes": "size in bytes",
    "delta_one_in": "delta as one in",
}
_DOING = {
    "view": "viewing",
    "submit": "submitting",
    "cancel": "cancelling",
    "plan": "planning with",
    "open": "opening",
    "release": "releasing",
    "promote": "promoting",
    "deploy": "deploying",
    "export": "exporting",
    "erase": "erasing",
    "approve": "approving",
    "administer": "administering",
    "audit": "auditing",
}
_ORDER = {
    "<": ("is smaller than", "is not smaller than"),
    "<=": ("is not larger than", "is larger than"),
    ">": ("is larger than", "is not larger than"),
    ">=": ("is not smaller than", "is smaller than"),
}


_DECIMAL = {"lessThan": "<", "lessThanOrEqual": "<=", "greaterThan": ">", "greaterThanOrEqual": ">="}


@dataclass(frozen=True, slots=True)
class Term:
    """An operand: the path it was read from ("" for a literal), what a person calls that, and its value."""

    path: str
    label: str
    value: Any


def deed(question: Question) -> str:
    """Say what is asked for: `crossing 'data' going out`, `deploying model 'heart@1'`."""
    if question.action == "cross":
        way = "going out" if question.context["direction"] == "out" else "coming in"
        return f"crossing {shown(question.context['kind'])} {way}"
    return f"{_DOING[question.action]} {question.resource['type'].lower()} {shown(question.resource['id'])}"


def shown(value: Any) -> str:
    """Return a value as a reason shows it: quoted, escaped and not too long."""
    if isinstance(value, list):
        members = cast("list[Any]", value)
        more = f" and {len(members) - _MOST} more" if len(members) > _MOST else ""
        return ", ".join(shown(member) for member in members[:_MOST]) + more if members else "nothing"
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + "...'"


def paths(expression: Any) -> list[str]:
    """Return the attributes that a condition looks at, as in the rule: `context.rows`, `resource.purposes`."""
    found: list[str] = []
    waiting: list[Any] = [expression]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += reversed(cast("list[Any]", part))
        elif isinstance(part, dict):
            path = attribute_path(cast("Expression", part))
            if path:
                found.append(path)
            else:
                waiting += reversed(cast("Expression", part).values())
    return found


def fact(condition: Expression, holds: bool, question: Question) -> str:
    """Say in words that `condition` holds, or that it does not, with the values in `question`."""
    operator, operands = next(iter(condition.items()))
    words: str | None = None
    if operator in ("contains", "containsAny", "containsAll"):
        words = _membership(operator, operands, holds, question)
    elif operator in ("==", "!="):
        words = _equality(operands, holds == (operator == "=="), question)
    elif operator in _ORDER:
        words = _order(operator, operands, holds, question)
    elif operator in _DECIMAL:
        words = _order(_DECIMAL[operator], dict(zip(("left", "right"), operands, strict=True)), holds, question)
    elif operator == "like":
        words = _likeness(operands, holds, question)
    elif operator == "isEmpty":
        words = _emptiness(attribute_path(operands["arg"]), holds, question)
    return words or _verbatim(condition, holds, question)


def attribute_path(expression: Expression) -> str:
    """Return the attribute that an expression is, as in the rule: `context.rows`; "" for another expression."""
    inner = expression.get(".")
    if not isinstance(inner, dict):
        return ""
    access = cast("Expression", inner)
    variable = access["left"].get("Var")
    return f"{variable}.{access['attr']}" if variable else ""


def _term(expression: Expression, question: Question) -> Term | None:
    """Return an operand with its value, or None where only Cedar could compute it."""
    path = attribute_path(expression)
    if path:
        variable, _, attribute = path.partition(".")
        table = question.context if variable == "context" else question.attributes.get(variable, {})
        value = float(table[attribute]["__extn"]["arg"]) if path == "context.epsilon" else table.get(attribute)
        return Term(path, _label(path, question), value) if attribute in table else None
    if "Value" in expression and not isinstance(expression["Value"], dict):
        return Term("", "", expression["Value"])
    if "Set" in expression:
        members = [_term(member, question) for member in expression["Set"]]
        return Term("", "", [member.value for member in members if member]) if all(members) else None
    if "decimal" in expression and isinstance(text := expression["decimal"][0].get("Value"), str):
        return Term("", "", float(text))
    return None


def _label(path: str, question: Question) -> str:
    variable, _, attribute = path.partition(".")
    if variable == "resource":
        return f"the {question.resource['type'].lower()}'s {attribute}"
    if variable == "principal":
        return f"the user's {attribute}"
    return _CONTEXT_WORDS.get(attribute, attribute)


def _noun(term: Term) -> str:
    """Return an operand as a noun with its value: `purpose 'x'`, `a group of 3 rows`, `'x'`."""
    if term.path == "context.rows":
        return f"a group of {shown(term.value)} row{'' if term.value == 1 else 's'}"
    if term.path == "resource.min_group":
        return f"the site's minimum of {shown(term.value)}"
    return f"{term.label} {shown(term.value)}" if term.path else shown(term.value)


def _terms(operands: Expression, question: Question) -> tuple[Term, Term] | None:
    left, right = _term(operands["left"], question), _term(operands["right"], question)
    return (left, right) if left and right and (left.path or right.path) else None


def _membership(operator: str, operands: Expression, holds: bool, question: Question) -> str | None:
    terms = _terms(operands, question)
    if terms is None:
        return None
    group, member = terms
    if group.path == "principal.roles":
        return _roles(operator, group, member, holds, question)
    if operator != "contains":
        having = {"containsAny": ("has some of", "has none of"), "containsAll": ("has all of", "lacks some of")}
        return f"{_noun(group)} {having[operator][0 if holds else 1]} {_noun(member)}"
    if member.path == "context.purpose" and group.path in ("resource.purposes", "resource.ended"):
        return _purpose(group, member, holds, question)
    if group.path == "context.wire":
        kind = str(question.context["kind"])
        thing = f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}" if kind else "what crosses"
        if holds:
            return f"{thing} passes through {member.value}"
        leaves = "enters" if question.context["direction"] == "in" else "leaves"
        wire = [str(step) for step in group.value]
        return f"{thing} must pass through {member.value} before it {leaves}; the job's wire is {wire}"
    return f"{_noun(member)} is {'' if holds else 'not '}among {_noun(group)}"


def _purpose(granted: Term, purpose: Term, holds: bool, question: Question) -> str:
    dataset, name = shown(question.resource["id"]), shown(purpose.value)
    if granted.path == "resource.ended" and not holds:
        return f"no grant for purpose {name} has ended"
    if end := question.notes.get("ended", {}).get(str(purpose.value)):
        return f"the grant of {dataset} for purpose {name} ended on {end}"
    if not granted.value:
        return f"purpose {name} is not granted: {dataset} is granted for nothing"
    return f"purpose {name} is {'' if holds else 'not '}among the granted {shown(granted.value)}"


def _emptiness(path: str, empty: bool, question: Question) -> str | None:
    if path == "context.lacks":
        return _lacking(question)
    if path == "context.overdraws":
        return "; ".join(question.notes.get("overdraws", {}).values()) or "what it costs fits into the budget"
    if path == "resource.regions":
        kept = shown(question.attributes["resource"]["regions"])
        return f"{shown(question.resource['id'])} is kept in {'no region' if empty else kept}"
    return None


def _lacking(question: Question) -> str:
    """Say what a dataset's terms want of an update, and what its wire is."""
    wanted, wire = question.notes.get("lacks", {}), [str(step) for step in question.context["wire"]]
    lacks = [f"{step}{wanted.get(step, '')}" for step in question.context["lacks"]]
    if not lacks:
        return f"what crosses passes through all that {shown(question.resource['id'])} asks for"
    whose = f"by the terms of {shown(question.resource['id'])}"
    return f"an update must pass through {' and '.join(lacks)} before it leaves, {whose}; the job's wire is {wire}"


def _roles(operator: str, group: Term, member: Term, holds: bool, question: Question) -> str:
    wanted = shown(member.value)
    user = f"user {shown(question.principal['id'])}"
    if operator == "contains":
        return f"{user} has {'the' if holds else 'no'} role {wanted} (has {shown(group.value)})"
    if operator == "containsAny":
        return f"{user} has {'one' if holds else 'none'} of the roles {wanted} (has {shown(group.value)})"
    return f"{user} has {'all' if holds else 'not all'} of the roles {wanted} (has {shown(group.value)})"


def _equality(operands: Expression, equal: bool, question: Question) -> str | None:
    terms = _terms(operands, question)
    if terms is None:
        return None
    left, right = terms if terms[0].path else (terms[1], terms[0])
    words = f"{left.label} is {shown(left.value)}"
    if equal:
        return f"{words}, as is {right.label}" if right.path else words
    return f"{words}, not {_noun(right)}"


def _order(operator: str, operands: Expression, holds: bool, question: Question) -> str | None:
    terms = _terms(operands, question)
    if terms is None:
        return None
    left, right = terms
    if not question.context["privacy"] and {left.path, right.path} & {"context.epsilon", "context.delta_one_in"}:
        return "the run promises no privacy"
    return f"{_noun(left)} {_ORDER[operator][0 if holds else 1]} {_noun(right)}"


def _likeness(operands: Expression, holds: bool, question: Question) -> str | None:
    term = _term(operands["left"], question)
    if term is None:
        return None
    pattern = "".join("*" if part == "Wildcard" else str(part["Literal"]) for part in operands["pattern"])
    return f"{_noun(term)} {'matches' if holds else 'does not match'} {shown(pattern)}"


def _verbatim(condition: Expression, holds: bool, question: Question) -> str:
    """Fall back to the condition as Cedar prints it, and the values of what it looks at."""
    text = _cedar_text(condition)
    text = text if len(text) <= 3 * _LONGEST else text[: 3 * _LONGEST - 3] + "..."
    terms = [_term({".": _access(path)}, question) for path in dict.fromkeys(paths(condition))]
    values = [f"{term.label} is {shown(term.value)}" for term in terms if term]
    where = f", where {' and '.join(values)}" if values else ""
    return f"the condition `{text}` {'holds' if holds else 'does not hold'}{where}"


def _access(path: str) -> Expression:
    variable, _, attribute = path.partition(".")
    return {"left": {"Var": variable}, "attr": attribute}


def policy_json(condition: Expression | None, scope: Expression | None = None) -> str:
    """Return, in Cedar's JSON form, a permit of this scope (or of everything) under this one condition (or none)."""
    everything = {"principal": {"op": "All"}, "action": {"op": "All"}, "resource": {"op": "All"}}
    conditions = [] if condition is None else [{"kind": "when", "body": condition}]
    policy = {"effect": "permit", **(scope or everything), "conditions": conditions}
    return json.dumps({"templates": {}, "templateLinks": [], "staticPolicies": {"probe": policy}})


def _cedar_text(condition: Expression) -> str:
    printed = cedarpy.policies_from_json_str(policy_json(condition))
    body = printed[printed.index("{") + 1 : printed.rindex("}")]
    body = " ".join(body.split())
    return re.sub(r"\(((?:context|resource|principal)\.\w+)\)", r"\1", body)  # Cedar prints (context.rows) > (3)
