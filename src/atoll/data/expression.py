"""Which expressions a query may hold: each node of duckdb's syntax tree is recognised and written anew, or refused.

An unknown node, or an unknown part of a known one, is refused, so nothing that a later duckdb adds gets through.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atoll.errors import Invalid
from atoll.spec.document import near_miss

Node = Mapping[str, Any]

AGGREGATES = {
    "count_star": "count",
    "count": "count",
    "sum": "sum",
    "avg": "mean",
    "mean": "mean",
    "min": "min",
    "max": "max",
    "var_pop": "var_pop",
    "var_samp": "var_samp",
    "variance": "var_samp",
    "stddev_pop": "stddev_pop",
    "stddev_samp": "stddev_samp",
    "stddev": "stddev_samp",
}
_OPERATORS = ("+", "-", "*", "/", "//", "%")
_FUNCTIONS = {"abs": (1,), "ceil": (1,), "floor": (1,), "lower": (1,), "round": (1, 2), "upper": (1,)}
_COMPARISONS = {
    "COMPARE_EQUAL": "=",
    "COMPARE_NOTEQUAL": "<>",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
    "COMPARE_DISTINCT_FROM": "IS DISTINCT FROM",
    "COMPARE_NOT_DISTINCT_FROM": "IS NOT DISTINCT FROM",
}
_CASTS = {
    **dict.fromkeys(("BOOLEAN", "BOOL", "LOGICAL"), "BOOLEAN"),
    **dict.fromkeys(("INTEGER", "INT", "INT4", "SIGNED"), "INTEGER"),
    **dict.fromkeys(("BIGINT", "INT8", "LONG"), "BIGINT"),
    **dict.fromkeys(("FLOAT", "REAL", "FLOAT4"), "FLOAT"),
    **dict.fromkeys(("DOUBLE", "FLOAT8"), "DOUBLE"),
    **dict.fromkeys(("VARCHAR", "TEXT", "STRING"), "VARCHAR"),
    "DATE": "DATE",
    "TIMESTAMP": "TIMESTAMP",
}
_NUMBERS = tuple(f" AS {kind})" for kind in ("INTEGER", "BIGINT", "FLOAT", "DOUBLE"))
REFUSED = {  # kind of node -> its name for people
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "STAR": "* (rows never leave a site)",
    "CASE": "CASE",
    "LAMBDA": "a lambda",
    "PARAMETER": "a parameter",
    "COLLATE": "COLLATE",
    "JOIN": "a join",
    "TABLE_FUNCTION": "a table function",
    "EMPTY": "a query without FROM",
    "SET_OPERATION_NODE": "UNION, INTERSECT or EXCEPT",
}
_PARTS = {  # part of a node -> its name for people, where the two differ
    "cte_map": "WITH",
    "schema": "a schema",
    "schema_name": "a schema",
    "qualified_name": "a schema",
    "column_name_alias": "renaming columns in FROM",
}
FORM = "ask in the form SELECT keys, aggregates FROM dataset WHERE ... GROUP BY keys ORDER BY output LIMIT n"
_PLACE = {"class", "type", "alias", "query_location", "query_location_length"}


def refusal(what: str) -> Invalid:
    return Invalid(f"sql: {what} is not allowed; {FORM}")


def closed(node: Node, known: set[str]) -> None:
    """Refuse a node that says more than is understood here, whatever a later duckdb adds to it."""
    for key, value in node.items():
        if key in known or key in _PLACE or value in (None, "", False, [], {}):
            continue
        if key == "qualified_name" and len(value["path"]) == 1:
            continue
        if key == "cte_map" and not value["map"]:
            continue
        if key == "order_bys" and not value["orders"]:
            continue
        raise refusal(_PARTS.get(key, key.removesuffix("_clause").upper()))


def quoted(name: str) -> str:
    """Return the name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(slots=True)
class Reader:
    """Writes checked expressions as SQL and notes the columns they read, in the order met."""

    source: bytes
    qualifiers: tuple[str, ...]
    columns: dict[str, None] = field(default_factory=dict[str, None])

    def meaning(self, node: Node) -> tuple[str, str | None, str | None]:
        """Return (name it goes by, SQL of the key or the aggregate's argument, aggregate function or None)."""
        if node["class"] == "FUNCTION" and node["function_name"].lower() in AGGREGATES:
            function = node["function_name"].lower()
            closed(node, {"function_name", "arguments", "is_operator"})
            if len(node["arguments"]) != (0 if function == "count_star" else 1):
                raise Invalid(f"sql: {function} takes one expression")
            sql = self._argument(node["arguments"][0]["expression"], function) if node["arguments"] else None
            start, length = node["query_location"], node["query_location_length"]
            written = self.source[start : start + length].decode(errors="replace")
            return " ".join(written.split()), sql, AGGREGATES[function]
        sql = self.expression(node)
        return (node["column_names"][-1] if node["class"] == "COLUMN_REF" else ""), sql, None

    def conditions(self, node: Node) -> tuple[str, ...]:
        """Return what AND joins, each by itself."""
        if node["type"] != "CONJUNCTION_AND":
            return (self.expression(node),)
        closed(node, {"children"})
        return tuple(part for child in node["children"] for part in self.conditions(child))

    def _argument(self, node: Node, function: str) -> str:
        """Write what an aggregate is of. Of an expression it could be of one row alone, as sum(age * (id = 17)) is."""
        inner = node["child"] if node["class"] == "CAST" else node
        sql = self.expression(node)
        if inner["class"] != "COLUMN_REF" or (inner is not node and not sql.endswith(_NUMBERS)):
            raise Invalid(
                f"sql: {function} of an expression is not allowed: it could tell of one row; take a column, or its "
                "CAST to INTEGER, BIGINT, FLOAT or DOUBLE, and have expressions in WHERE and GROUP BY"
            )
        return sql

    def expression(self, node: Node) -> str:
        write = {
            "COLUMN_REF": self._column,
            "CONSTANT": self._constant,
            "COMPARISON": self._comparison,
            "CONJUNCTION": self._conjunction,
            "BETWEEN": self._between,
            "OPERATOR": self._operator,
            "CAST": self._cast,
            "FUNCTION": self._function,
        }.get(node["class"])
        if write is None:
            raise refusal(REFUSED.get(node["class"], str(node["class"]).lower()))
        return write(node)

    def _column(self, node: Node) -> str:
        closed(node, {"column_names"})
        *qualifier, name = node["column_names"]
        if qualifier and (len(qualifier) > 1 or qualifier[0] not in self.qualifiers):
            raise refusal(f"{'.'.join(node['column_names'])} (a part of a column, or another table's column)")
        self.columns[name] = None
        return quoted(name)

    def _constant(self, node: Node) -> str:
        closed(node, {"literal"})
        kind, text = node["literal"]["kind"], node["literal"].get("text", "")
        if kind == "NULL_LITERAL":
            return "NULL"
        if kind == "STRING":
            return "'" + text.replace("'", "''") + "'"
        if kind == "BOOLEAN" and text in ("true", "false"):
            return text
        if kind in ("INTEGER", "NUMERIC") and re.fullmatch(r"-?[0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?", text):
            return text.replace("_", "")
        raise refusal(f"the constant {text}")

    def _comparison(self, node: Node) -> str:
        closed(node, {"left", "right"})
        if node["type"] not in _COMPARISONS:
            raise refusal(node["type"])
        return f"({self.expression(node['left'])} {_COMPARISONS[node['type']]} {self.expression(node['right'])})"

    def _conjunction(self, node: Node) -> str:
        closed(node, {"children"})
        word = {"CONJUNCTION_AND": " AND ", "CONJUNCTION_OR": " OR "}[node["type"]]
        return "(" + word.join(map(self.expression, node["children"])) + ")"

    def _between(self, node: Node) -> str:
        closed(node, {"input", "lower", "upper"})
        value, lower, upper = (self.expression(node[part]) for part in ("input", "lower", "upper"))
        return f"({value} BETWEEN {lower} AND {upper})"

    def _operator(self, node: Node) -> str:
        closed(node, {"children"})
        first, *rest = map(self.expression, node["children"])
        match node["type"]:
            case "OPERATOR_NOT":
                return f"(NOT {first})"
            case "OPERATOR_IS_NULL":
                return f"({first} IS NULL)"
            case "OPERATOR_IS_NOT_NULL":
                return f"({first} IS NOT NULL)"
            case "COMPARE_IN":
                return f"({first} IN ({', '.join(rest)}))"
            case "COMPARE_NOT_IN":
                return f"({first} NOT IN ({', '.join(rest)}))"
            case "OPERATOR_COALESCE":
                return f"coalesce({', '.join([first, *rest])})"
            case other:
                raise refusal(str(other).lower())

    def _cast(self, node: Node) -> str:
        """Write every cast as TRY_CAST: an error would tell that a row, perhaps of a small group, has such a value."""
        closed(node, {"child", "type_expr", "try_cast"})
        target = node["type_expr"]
        closed(target, {"type_name"})
        kind = _CASTS.get(target["type_name"].upper())
        if kind is None:
            raise Invalid(f"sql: CAST to {target['type_name']} is not allowed; there is {', '.join(_CASTS.values())}")
        return f"TRY_CAST({self.expression(node['child'])} AS {kind})"

    def _function(self, node: Node) -> str:
        closed(node, {"function_name", "arguments", "is_operator"})
        name = node["function_name"].lower().replace("~~", "like")
        if name in AGGREGATES:
            raise Invalid(
                f"sql: {name} inside an expression is not allowed; an aggregate stands alone in the select list"
            )
        arguments = [self.expression(argument["expression"]) for argument in node["arguments"]]
        if any(argument["name"] for argument in node["arguments"]):
            raise refusal("an argument by name")
        if name in _OPERATORS and len(arguments) == 2:
            return f"({arguments[0]} {name} {arguments[1]})"
        if name in ("+", "-") and len(arguments) == 1:
            return f"({name} {arguments[0]})"
        if len(arguments) not in _FUNCTIONS.get(name, ()):
            known = near_miss(name, [*_FUNCTIONS, "coalesce"])
            raise Invalid(f"sql: {name!r} with {len(arguments)} arguments is not allowed{known}")
        return f"{name}({', '.join(arguments)})"
