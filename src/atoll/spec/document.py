"""One base for every document: frozen, closed, read from YAML with errors a person can act on."""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from atoll.errors import Invalid, NotFound

# A name may become part of a path, a URL or a log line, so its alphabet is closed here, once for all parties.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
# What user code calls a tensor or a metric. It crosses borders beside the numbers, so its alphabet is closed too.
Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
# A sentence for a person; whoever sends a longer one is refused, so the sender shortens it.
WORDS_LIMIT = 2000
Words = Annotated[str, StringConstraints(max_length=WORDS_LIMIT)]

# PyYAML is built with libyaml nearly everywhere.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DEEPEST = 100  # a document has five or six levels
_LINES = 50  # of what is wrong in a document
_VALUES = 1_000_000  # in a document, each as often as an alias repeats it


class Document(BaseModel):
    """A value that may cross a process: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


D = TypeVar("D", bound=BaseModel)


def canonical(value: Any) -> bytes:
    """Return the one JSON spelling of ``value`` that digests and chains are computed over."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return _ENCODER.encode(value).encode()


def sha256(data: bytes | memoryview) -> str:
    """Digest of bytes in the form every document uses, ``sha256:<64 hex digits>``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest(document: BaseModel) -> str:
    """Digest of a document's canonical JSON."""
    return sha256(canonical(document))


def parse(kind: type[D], data: Any, source: str) -> D:
    """Validate ``data`` as ``kind``; raise `Invalid` with one line for each wrong field."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise Invalid("\n".join(f"{source}: {line}" for line in _explain(kind, error))) from error


def parse_json(kind: type[D], data: bytes | str, source: str) -> D:
    """Validate JSON text from another process or party; raise `Invalid`."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise Invalid("\n".join(f"{source}: {line}" for line in _explain(kind, error))) from error


def read_yaml(path: Path) -> Any:
    """Return the YAML in ``path``; raise `NotFound` or `Invalid` with the place of the mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"{path}: cannot be read as text ({error}); give a YAML file") from None
    try:
        return _loaded(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2026-13-45 is a date to YAML, and none
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise Invalid(f"{path}: {place}not valid YAML: {problem}; mend that line") from None


def _loaded(text: str) -> Any:
    """Return the YAML in ``text``, by libyaml where it is there: ten times as fast as PyYAML's own, poorer in words."""
    try:
        _check_bounds(text)
        return yaml.load(text, Loader=_LOADER)  # noqa: S506 - one of the two safe ones
    except yaml.YAMLError:
        yaml.safe_load(text)  # raises with words for it
        raise


def _check_bounds(text: str) -> None:
    """Raise ValueError for what no document is.

    Loaders recurse, and libyaml's ends the process some ten thousand levels down, so levels are counted before. So are
    values: nine aliases of nine aliases, and so on, are a page of text and more values than any memory holds.
    """
    anchored: dict[str, int] = {}  # how many values each anchor stands for
    above: list[tuple[str | None, int]] = []  # the tables and lists that are open: anchor, and values before them
    count = 0
    for event in yaml.parse(text, Loader=_LOADER):  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - untyped
        if isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            if anchor is not None:
                anchored[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in above):
                raise ValueError(f"alias {event.anchor!r} stands inside of what it repeats")
            count += anchored.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(str(event.value)):
            raise ValueError("half of a pair of surrogates, which is no character")  # PyYAML's own lets it pass
        count += 1
        if len(above) > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} tables and lists in each other")
        if count > _VALUES:
            raise ValueError(f"more than {_VALUES:,} values, with what its aliases repeat")


def write_yaml(document: BaseModel) -> str:
    """Return ``document`` as YAML in the field order of its class, leaving out what nobody set."""
    data = document.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if "kind" in type(document).model_fields:
        data = {"kind": _tag(type(document)), **data}
    return yaml.dump(data, Dumper=_DUMPER, sort_keys=False, allow_unicode=True)


def override(data: Any, assignments: list[str]) -> Any:
    """Apply ``a.b=c`` assignments (values in YAML) to parsed YAML, making tables that are not there."""
    for assignment in assignments:
        path, mark, text = assignment.partition("=")
        if not mark or not path.strip():
            raise Invalid(f"--set {assignment}: needs the form field.field=value, for example sync.period=20")
        try:
            value = _loaded(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise Invalid(f"--set {assignment}: {text!r} is not a YAML value; quote it") from None
        data = _assigned(data, path.strip().split("."), value, assignment)
    return data


def _assigned(data: Any, keys: list[str], value: Any, assignment: str) -> dict[str, Any]:
    if data is None:
        data = {}
    if isinstance(data, str):
        data = {"preset": data}  # `sync: fedavg` is short for `sync: {preset: fedavg}`
    if not isinstance(data, dict):
        raise Invalid(f"--set {assignment}: {keys[0]!r} is inside a value that is not a table; set the table itself")
    table = cast("dict[str, Any]", data)
    if len(keys) == 1:
        return {**table, keys[0]: value}
    return {**table, keys[0]: _assigned(table.get(keys[0]), keys[1:], value, assignment)}


def near_miss(name: str, known: list[str]) -> str:
    """Return `; did you mean 'x'?` when a known name is close, else the list of what there is."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there is {', '.join(sorted(known))}" if known else ""


def _explain(kind: type[BaseModel], error: ValidationError) -> list[str]:
    lines: list[str] = []
    for item in error.errors(include_url=False):
        if len(lines) == _LINES:
            return [*lines, f"and {error.error_count() - _LINES} more; mend these first"]
        path = ".".join(str(part)[:80] for part in item["loc"]) or "(document)"
        value = item.get("input")
        shown = repr(value)
        if isinstance(value, dict | list):
            shown = "a table" if isinstance(value, dict) else "a list"
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        if item["type"] == "extra_forbidden":
            known = _fields_at(kind, item["loc"][:-1])
            lines.append(f"{path}: unknown field{near_miss(str(item['loc'][-1])[:80], known)}")
        elif item["type"] == "missing":
            lines.append(f"{path}: required and missing; add it")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {shown}: {message}")
    return lines


def _fields_at(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the document that ``path`` leads to (best effort, for suggestions)."""
    found: list[type[BaseModel]] = [kind]
    for part in path:
        inner: list[type[BaseModel]] = []
        for model in found:
            field = model.model_fields.get(str(part))
            if field is not None:
                inner += _models_in(field.annotation)
            elif part == _tag(model):
                inner.append(model)
        found = inner or found
    return sorted({name for model in found for name in model.model_fields})


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field is not None else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    parts: tuple[Any, ...] = getattr(annotation, "__args__", ())
    return [model for part in parts for model in _models_in(part)]
