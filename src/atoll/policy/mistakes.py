"""What is wrong with a policy's text: the line, the rule, the problem and the mend.

Cedar's messages carry no line, so the text is cut into its rules here; the cutting never decides what a rule means.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cedarpy

from atoll.policy.schema import ACTIONS, CONTEXT, ENTITIES, parsed
from atoll.spec.document import near_miss
from atoll.spec.user import ROLES

# An open string runs to the end of the text, which keeps the cutting linear.
_SIGN = re.compile(r'//[^\n]*|"(?:\\.|[^"\\])*"?|[;\n()\[\]{}]|&&|\|\||[-+*!.]|[^-";\n()\[\]{}&|+*!./]+|.', re.DOTALL)
_ID = re.compile(r'@id\s*\(\s*"((?:\\.|[^"\\])*)"\s*\)')
_COMPARING = ["lessThan", "lessThanOrEqual", "greaterThan", "greaterThanOrEqual"]  # of decimals
_METHODS = ["contains", "containsAll", "containsAny", "isEmpty", *_COMPARING]
_OPERATORS = {"&&", "||", "+", "-", "*", "!", "."}
# Cedar's parser recurses and ends the process some hundred brackets down; rules may come from another party.
_LONGEST_TEXT, _MOST_OPERATORS, _DEEPEST = 1 << 18, 150, 30
APPROVABLE = ("submit", "promote", "deploy", "erase")  # what waits for a second person where a permit wants one
_FOLLOWS = "unable to find an applicable action"  # Cedar adds it to a wrong name in the scope


@dataclass(frozen=True, slots=True)
class Statement:
    """The text of one rule with its `;`, and the line it begins on."""

    line: int
    text: str

    @property
    def place(self) -> str:
        return self.at(self.line)

    def at(self, line: int) -> str:
        named = _ID.search(self.text)
        return f"line {line}, rule {named[1]}" if named else f"line {line}"

    def mention(self, word: str) -> int:
        """Return the first line with `word` outside of a comment, else the rule's first line."""
        for offset, line in enumerate(self.text.split("\n")):
            if re.search(rf"\b{re.escape(word)}\b", line.partition("//")[0]):
                return self.line + offset
        return self.line


def statements(text: str) -> list[Statement]:
    """Cut a policy into its rules; what comes before a rule's first sign (space, comments) is left out."""
    found: list[Statement] = []
    line = start = 1
    pieces: list[str] = []
    for sign in _SIGN.findall(text):
        if pieces or not (sign.isspace() or sign.startswith("//")):
            if not pieces:
                start = line
            pieces.append(sign)
        line += sign.count("\n")
        if sign == ";":
            found.append(Statement(start, "".join(pieces)))
            pieces = []
    if pieces:
        found.append(Statement(start, "".join(pieces).rstrip()))
    return found


def size_mistakes(text: str) -> list[str]:
    """Return which rules are too long or too deep to be given to Cedar at all."""
    if len(text) > _LONGEST_TEXT:
        return [f"line 1: {len(text)} characters, and a policy has at most {_LONGEST_TEXT}; say it with fewer rules"]
    found: list[str] = []
    for statement in statements(text):
        depth = deepest = operators = 0
        for sign in _SIGN.findall(statement.text):
            depth += (sign in ("(", "[", "{")) - (sign in (")", "]", "}"))
            deepest = max(deepest, depth)
            operators += sign in _OPERATORS
            operators += sign.split().count("if")
        if deepest > _DEEPEST or operators > _MOST_OPERATORS:
            found.append(f"{statement.place}: is nested or chained too far for one rule; make several rules of it")
    return found


def syntax_mistakes(text: str) -> list[str]:
    """Return what keeps the text from being Cedar, rule by rule; nothing when it is."""
    try:
        cedarpy.PolicySet.from_str(text)
    except ValueError as error:
        found = [line for statement in statements(text) if (line := _syntax_mistake(statement))]
        return found or [f"line 1: {error}; mend the text"]
    return []


def type_mistakes(text: str) -> list[str]:
    """Return where a text that is Cedar uses names or types that the schema does not have."""
    result = cedarpy.validate_policies(text, parsed())  # pyright: ignore[reportUnknownMemberType] - bare dict inside
    if result.validation_passed:
        return []
    cut = statements(text)
    messages = [(error.policy_id, error.error) for error in result.errors]
    telling = [item for item in messages if _FOLLOWS not in item[1]] or messages
    found: list[str] = []
    for name, message in telling:
        number = int(name.removeprefix("policy")) if re.fullmatch(r"policy\d+", name) else len(cut)
        statement = cut[number] if number < len(cut) else Statement(1, "")
        found.append(_type_mistake(statement, message.removeprefix(f"for policy `{name}`, ")))
    return list(dict.fromkeys(found))


def approval_mistakes(text: str, entries: Mapping[str, Any], party: str) -> list[str]:
    """Return which rules have an `@approval` that nobody could give, or that nobody would ask for.

    ``entries`` is the text in Cedar's JSON form.
    """
    found: list[str] = []
    for entry, statement in zip(entries["staticPolicies"].values(), statements(text), strict=True):
        said = entry.get("annotations", {}).get("approval", ...)
        if said is ...:
            continue
        action = entry["action"]
        named = [action["entity"]] if "entity" in action else action.get("entities", [])
        roles = [part.strip() for part in (said or "").split(",")]
        wrong = [role for role in roles if role not in ROLES]
        if party != "hub":
            found.append(f"{statement.place}: @approval is for a hub's rules; at a site write a forbid with conditions")
        elif entry["effect"] != "permit":
            found.append(f"{statement.place}: @approval is of a permit; a forbid forbids whoever approves")
        elif not named or any(one["id"] not in APPROVABLE for one in named):
            acts = ", ".join(APPROVABLE)
            found.append(f"{statement.place}: @approval is for {acts}; name one or more of them as the rule's action")
        elif wrong:
            found.append(f"{statement.place}: @approval: there is no role {wrong[0]!r}{near_miss(wrong[0], [*ROLES])}")
    return found


def _syntax_mistake(statement: Statement) -> str | None:
    try:
        cedarpy.PolicySet.from_str(statement.text)
    except ValueError as error:
        message = str(error)
    else:
        return None
    line, mend = _last_good_line(statement) if "unexpected" in message else statement.line, "mend the rule"
    if "end of input" in message:
        mend = "close its brackets and end the rule with ;"
    elif "unexpected token" in message:
        mend = "look at that sign, and for a missing ; or && before it"
    elif "invalid token" in message:
        mend = 'close the open " or take the stray sign out'
    elif "'='" in message:
        mend = "compare with =="
    for pattern, known in (
        (r"`(\w+)` is not a valid method", _METHODS),
        (r"invalid policy condition: (\w+)", ["when", "unless"]),
        (r"invalid policy effect: (\w+)", ["permit", "forbid"]),
        (r"invalid variable in the policy scope: (\w+)", ["principal", "action", "resource"]),
        (r"`(\w+)` has no fields", ["principal", "action", "resource", "context"]),
    ):
        if named := re.search(pattern, message):
            line, mend = statement.mention(named[1]), near_miss(named[1], known).removeprefix("; ")
    return f"{statement.at(line)}: {message}; {mend}"


def _last_good_line(statement: Statement) -> int:
    """Return the line at which the parser gave up: the first whose end it does not reach wanting more."""
    lines = statement.text.split("\n")
    for count in range(1, len(lines) + 1):
        try:
            cedarpy.PolicySet.from_str("\n".join(lines[:count]))
        except ValueError as error:
            if "end of input" not in str(error):
                return statement.line + count - 1
    return statement.line + len(lines) - 1


def _type_mistake(statement: Statement, message: str) -> str:
    if named := re.match(r"attribute `(\w+)` in context", message):
        name = named[1]
        problem = f"context has no attribute {name!r}{near_miss(name, list(CONTEXT))}"
    elif named := re.match(r"attribute `(\w+)` on entity type `(\w+)`", message):
        name = named[1]
        problem = _unknown_attribute(name, named[2])
    elif named := re.match(r"unrecognized action `Action::\"(.*)\"`", message):
        name = named[1]
        problem = f"there is no action {name!r}{near_miss(name, list(ACTIONS))}"
    elif named := re.match(r"unrecognized entity type `(\w+)`", message):
        name = named[1]
        problem = f"there is no type {name!r}{near_miss(name, list(ENTITIES))}"
    else:
        return f"{statement.place}: {message}; mend the rule"
    return f"{statement.at(statement.mention(name))}: {problem}"


def _unknown_attribute(name: str, kind: str) -> str:
    owners = [other for other, attributes in ENTITIES.items() if name in attributes]
    if owners:
        return f"only a {owners[0]} has {name!r}; narrow the rule with `resource is {owners[0]}` in its first line"
    return f"a {kind} has no attribute {name!r}{near_miss(name, list(ENTITIES.get(kind, {})))}"
