"""Rows to ask a deployment about, from a file, standard input or the command line."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.errors import Invalid, NotFound


def read_rows(source: str | None, given: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows (column -> value) of ``source`` (.csv, .json, .jsonl, or - for standard input) and of JSON texts.

    An empty CSV cell is null. Raises `NotFound` for a missing file and `Invalid` with the row that is no row.
    """
    rows = [] if source is None else _from_file(source)
    rows += [_row(_json(text, f"--row {number}"), f"--row {number}") for number, text in enumerate(given, 1)]
    if not rows:
        raise Invalid("rows: none given; add --rows FILE or --row '{\"column\": 1}'")
    return rows


def _from_file(source: str) -> list[dict[str, Any]]:
    if source == "-":
        return _from_json(sys.stdin.read(), "standard input")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFound(f"--rows {source}: there is no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"--rows {source}: cannot be read as text ({error}); give CSV or JSON") from None
    return _from_csv(text, source) if path.suffix == ".csv" else _from_json(text, source)


def _from_csv(text: str, source: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, cells in enumerate(csv.DictReader(io.StringIO(text)), 2):
        if None in cells or None in cells.values():
            raise Invalid(f"--rows {source}: line {number} has another number of cells than the header; mend that line")
        rows.append({name: _cell(cell) for name, cell in cells.items()})
    return rows


def _cell(text: str) -> Any:
    if not text.strip():
        return None
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if value - value == 0 else None  # nan and infinities are missing values
    return {"true": True, "false": False}.get(text.lower(), text)


def _from_json(text: str, source: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [_json(line, f"{source} line {at}") for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    items = found if isinstance(found, list) else [found]
    return [_row(item, f"{source} row {number}") for number, item in enumerate(items, 1)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Invalid(f'{where}: not JSON at column {error.colno} ({error.msg}); write {{"column": 1}}') from None


def _row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Invalid(f"{where}: {json.dumps(value)[:60]} is no row; write a table of column and value")
    return value
