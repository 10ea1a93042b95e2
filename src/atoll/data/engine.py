"""The SQL engine as Atoll runs it: duckdb in memory, cut off from files, network, extensions and Python variables."""

import atexit
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

_CLOSED: "dict[str, str | bool | int | float | list[str]]" = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",  # rows are never spilled to a disk
    "memory_limit": "1GB",
    "threads": "1",  # sums in one order: the same answer each time
    "max_expression_depth": "100",
}


def connect() -> "duckdb.DuckDBPyConnection":
    """Return a connection of its own to this process's one engine: what it registers or makes as TEMP nobody else
    sees, and closing it (use it in a ``with``) drops that. All connections together keep to the memory limit."""
    import duckdb

    try:
        connection = _engine().cursor()
        connection.execute("SELECT 1").fetchall()  # to its end, or the connection stays busy
    except duckdb.Error:  # after a fault inside it, duckdb refuses everything: no query may stop those after it
        _engine.cache_clear()
        connection = _engine().cursor()
    return connection


@cache  # a new engine takes 20 ms, ten times as long as a small query
def _engine() -> "duckdb.DuckDBPyConnection":
    import duckdb

    engine = duckdb.connect(":memory:", config=dict(_CLOSED))
    atexit.register(engine.close)  # before the interpreter goes, or duckdb complains of what it leaked
    # Optimisers move parts of an expression out of its TRY (shared ones, IN lists): a row that fails would be heard of.
    names = [str(name) for (name,) in engine.execute("SELECT name FROM duckdb_optimizers()").fetchall()]
    engine.execute(f"SET disabled_optimizers = '{','.join(names)}'")
    engine.execute("SET lock_configuration = true")  # none of this can be undone by a statement
    return engine
