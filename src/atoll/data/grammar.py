"""Which SQL may be asked of data that do not move: text is parsed by duckdb, checked node by node, and written anew.

Nothing of the user's text is ever run: the engine runs what `Reader` writes from the checked tree.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from atoll.data.engine import connect
from atoll.data.expression import FORM, REFUSED, Node, Reader, closed, quoted, refusal
from atoll.errors import Invalid
from atoll.spec.document import Name

LONGEST = 10_000  # characters of a query
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True, slots=True)
class Output:
    """A column of the answer: a group key (no function) or an aggregate. `sql` is None for count(*), and `cast` is the
    dataset's column that an aggregate takes a CAST of."""

    name: str
    sql: str | None
    function: str | None = None
    cast: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """Sort by output column `output`, counted from 0."""

    output: int
    descending: bool
    nulls_first: bool


@dataclass(frozen=True, slots=True)
class Query:
    """A checked query over one dataset. Its SQL was written by this module; `columns` are those it reads, and all of
    `conditions` hold for the rows that it is about."""

    dataset: str
    outputs: tuple[Output, ...]
    columns: tuple[str, ...]
    conditions: tuple[str, ...] = ()
    order: tuple[Order, ...] = ()
    limit: int | None = None

    @property
    def keys(self) -> tuple[Output, ...]:
        return tuple(output for output in self.outputs if output.function is None)

    @property
    def aggregates(self) -> tuple[Output, ...]:
        return tuple(output for output in self.outputs if output.function is not None)


def parse(sql: str) -> Query:
    """Read a query; raise `Invalid` naming what in it is not allowed, and what is.

    Allowed: one SELECT of group keys and of count, sum, avg, min, max, variance and standard deviation of columns,
    FROM one dataset, WHERE, GROUP BY, and over the merged answer ORDER BY output columns and LIMIT. In keys and
    conditions: columns, constants, comparisons, AND, OR, NOT, IS NULL, IN, BETWEEN, arithmetic, CAST to a plain type,
    coalesce, abs, ceil, floor, round, lower, upper. A key is of one column: with a second one it could put a row among
    others that are known, by a value of its own. An aggregate takes a column as it is, or a CAST of it to a number:
    what is computed of a row could be nothing for all rows but one.
    """
    if len(sql) > LONGEST:
        raise Invalid(f"sql: {len(sql)} characters long; {LONGEST} is the most")
    try:
        source = sql.encode()
    except UnicodeEncodeError:
        raise Invalid("sql: holds a character that is no Unicode; remove it") from None
    node = _tree(sql)
    if node.get("type") != "SELECT_NODE":
        raise refusal(REFUSED.get(str(node.get("type")), "this statement"))
    parts = {"modifiers", "select_list", "from_table", "where_clause"}
    closed(node, parts | {"group_expressions", "group_sets", "aggregate_handling"})
    dataset, alias = _dataset(node["from_table"])
    reader = Reader(source, qualifiers=(alias,) if alias else (dataset,))
    outputs = tuple(_output(item, reader) for item in node["select_list"])
    _check_groups(node, reader, outputs)
    conditions = reader.conditions(node["where_clause"]) if node["where_clause"] else ()
    order, limit = _modifiers(node["modifiers"], reader, outputs)
    _check_names(outputs, reader.columns)
    return Query(dataset, outputs, tuple(reader.columns), conditions, order, limit)


def _tree(sql: str) -> Node:
    with connect() as connection:
        row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
    try:
        tree = json.loads(row[0] if row else "null")
    except RecursionError:
        raise Invalid("sql: nested too deeply; ask something simpler") from None
    if tree["error"]:
        message = str(tree["error_message"]).splitlines()[0]
        if "expression depth" in message:
            raise Invalid("sql: nested too deeply; ask something simpler")
        if tree["error_type"] == "parser":
            raise Invalid(f"sql: {message}; mend the text there")
        raise refusal("anything but SELECT")
    if len(tree["statements"]) != 1:
        raise refusal("more than one statement" if tree["statements"] else "an empty query")
    statement = tree["statements"][0]
    if statement["named_param_map"]:
        raise refusal("a parameter")
    return statement["node"]


def _dataset(table: Node) -> tuple[str, str]:
    if table["type"] != "BASE_TABLE":
        raise refusal(REFUSED.get(table["type"], "this kind of FROM"))
    closed(table, {"table_name"})
    try:
        return _NAME.validate_python(table["table_name"]), table["alias"]
    except ValidationError:
        raise Invalid(
            f"sql: {table['table_name']!r} is no dataset's name; those are lower case: a-z 0-9 . _ -"
        ) from None


def _output(node: Node, reader: Reader) -> Output:
    own = Reader(reader.source, reader.qualifiers)
    name, sql, function = own.meaning(node)
    reader.columns.update(own.columns)
    name = node["alias"] or name
    if not name:
        raise Invalid(f"sql: the key {sql} needs a name; write it as ... AS name")
    if function is None and len(own.columns) > 1:
        raise Invalid(
            f"sql: the key {name!r} is made of {', '.join(own.columns)}: it could tell of one row; take one column for "
            "a key, and group by several keys"
        )
    columns = [quoted(column) for column in own.columns]  # of an aggregate there is one at most
    return Output(name, sql, function, columns[0] if function and columns and columns != [sql] else None)


def _check_groups(node: Node, reader: Reader, outputs: Sequence[Output]) -> None:
    """See that the keys in the select list are exactly the groups."""
    if len(node["group_sets"] or ()) > 1:
        raise refusal("ROLLUP, CUBE or GROUPING SETS")
    keys = [output for output in outputs if output.function is None]
    if len(keys) == len(outputs):
        raise Invalid(f"sql: there is no aggregate in it, and rows never leave a site; {FORM}")
    if node["aggregate_handling"] == "FORCE_AGGREGATES":  # GROUP BY ALL
        return
    if node["aggregate_handling"] != "STANDARD_HANDLING":
        raise refusal(str(node["aggregate_handling"]))
    grouped = [_pointed(item, reader, outputs, "GROUP BY") for item in node["group_expressions"]]
    for index, output in enumerate(outputs):
        if output.function is None and index not in grouped:
            raise Invalid(f"sql: {output.name!r} stands beside an aggregate without being a group; add it to GROUP BY")
        if output.function is not None and index in grouped:
            raise Invalid(f"sql: GROUP BY {output.name}: an aggregate is no group; group by a column")


def _pointed(item: Node, reader: Reader, outputs: Sequence[Output], where: str) -> int:
    """Return which output column `item` means: by number, by name, or by saying the same."""
    if item["class"] == "CONSTANT":
        text = item["literal"].get("text") or ""
        if not text.isdecimal() or not 1 <= int(text) <= len(outputs):
            raise Invalid(f"sql: {where} {text}: output columns count from 1 to {len(outputs)}")
        return int(text) - 1
    if item["class"] == "COLUMN_REF" and len(item["column_names"]) == 1:
        for index, output in enumerate(outputs):
            if output.name == item["column_names"][0]:
                return index
    _, sql, function = reader.meaning(item)
    for index, output in enumerate(outputs):
        if (output.sql, output.function) == (sql, function):
            return index
    raise Invalid(f"sql: {where} {sql or 'count(*)'}: it is not in the select list; put it there too")


def _modifiers(
    modifiers: Sequence[Node], reader: Reader, outputs: Sequence[Output]
) -> tuple[tuple[Order, ...], int | None]:
    order: tuple[Order, ...] = ()
    limit: int | None = None
    for node in modifiers:
        if node["type"] == "ORDER_MODIFIER":
            closed(node, {"orders"})
            order = tuple(
                Order(
                    _pointed(item["expression"], reader, outputs, "ORDER BY"),
                    item["type"] == "DESCENDING",
                    item["null_order"] == "NULLS FIRST",  # by default they come last, both ways, as in duckdb
                )
                for item in node["orders"]
            )
        elif node["type"] == "LIMIT_MODIFIER":
            closed(node, {"limit", "limit_type"})
            text = (node["limit"] or {}).get("literal", {}).get("text") or ""
            if node["limit_type"] != "ROW_COUNT" or not text.isdecimal():
                raise refusal("a LIMIT that is not a plain number")
            limit = int(text)
        else:
            raise refusal("DISTINCT" if node["type"] == "DISTINCT_MODIFIER" else str(node["type"]))
    return order, limit


def _check_names(outputs: Sequence[Output], columns: Mapping[str, None]) -> None:
    seen: set[str] = set()
    for output in outputs:
        if output.name in seen:
            raise Invalid(f"sql: two output columns are named {output.name!r}; give one another name with AS")
        seen.add(output.name)
        if output.function is None and output.name in columns and output.sql != quoted(output.name):
            raise Invalid(f"sql: {output.name!r} names both a column and a key made from it; choose another after AS")
    if len({name.lower() for name in columns}) < len(columns):
        raise Invalid(f"sql: columns {', '.join(columns)}: two differ only in case; write one as the dataset does")
