"""Which words about a failed order leave a site: a place in the code, the error's class, sentences of Atoll's own.

A worker runs user code, so what it says is that code's to choose, and may be rows. Nobody's rule is asked about the
words of a failure, so the agent writes them itself. It takes a file, a line and a class only if they are the bundle's
and Python's, and a sentence only if it stands in Atoll's own source. What fills the sentence's gaps is shown if it is a
small number, or a word of the bundle or the job, which the hub has too; it is left out otherwise. All else stays in the
worker's log. So a failure says a line, or at most eight such words and numbers.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import atoll
from atoll import errors
from atoll.errors import TaskFailed
from atoll.spec.order import Fault, Open, Order

KEPT = "its words stay in the log of this site's worker"
_GAP = "…"
_SAID_BY = ("inner/*.py", "tasks/*.py", "data/*.py", "outer/*.py", "spec/*.py", "runtime/worker.py")
_LEAST, _WHOLE = 6, 16  # characters of a part, and of a sentence, that are the source's own; with fewer anybody says it
_ATOMS = 8  # words and numbers that are filled in: each is something that user code can choose
_JOINTS = ("; ", ", and ")  # before a part that not every such sentence has
_DEPTH, _SCANS = 6, 24  # of a sentence that is put together of others; a worker that lies costs the agent no more
# Fields of an order that are the job's, or the model's: the hub has them.
_FIELDS = {"task", "data", "compute", "layout", "signature", "keep_local", "optimiser", "sync"}
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_NUMBER = re.compile(r"-?(\d{1,7}|\d{1,3}(,\d{3}){1,2}|nan|inf)")
_ITEM = r"'?[A-Za-z0-9_.,\-]{1,150}'?"
_VALUE = re.compile(rf"[\[(]?{_ITEM}(, {_ITEM}){{0,7}}[\])]?")
_KINDS = frozenset(
    name
    for module in (builtins, errors)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
)
# Types, how torch calls the tensors of its layers, a task's methods, a pretrained model's files: what code
# means also where it does not say it.
_COMMON = {name for name, kind in vars(builtins).items() if isinstance(kind, type)} | set(
    _WORD.findall(
        "NoneType ndarray Tensor Parameter torch numpy weight bias running_mean running_var num_batches_tracked text "
        "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 complex64 complex128 "
        "Task ArraysTask model examples loss metrics predict arrays fit parallelize task py "
        "config json tokenizer safetensors tp_plan context_plan expert_plan"
    )
)
# What Python says of a mistake in code, by its class: each is raised before a row is looked at, or names none.
_PYTHON = (
    "name {} is not defined",
    "name {} is not defined. Did you mean: {}?",
    "No module named {}",
    "cannot import name {} from {}",
    "module {} has no attribute {}",
    "{} object has no attribute {}",
    "{}() missing {} required positional argument: {}",
    "{}() missing {} required positional arguments: {}",
    "{}() got an unexpected keyword argument {}",
    "division by zero",
    "invalid syntax",
    "invalid syntax. Perhaps you forgot a comma?",
    "expected ':'",
    "unexpected indent",
    "unindent does not match any outer indentation level",
    "expected an indented block after {} on line {}",
    "'(' was never closed",
    "'[' was never closed",
    "'{' was never closed",
    "unterminated string literal (detected at line {})",
)
Parts = tuple[str, ...]  # the words of a sentence around its gaps


@dataclass(slots=True)
class Known:
    """What a hub knows of a job's code: how many lines its files have, and the words in them."""

    lines: dict[str, int] = field(default_factory=dict[str, int])
    words: set[str] = field(default_factory=set[str])

    @staticmethod
    def of(order: Open) -> "Known":
        """Read the code of an order that opens a dataset, which is verified, before a worker is told of it."""
        known = Known(words=_asked(order))
        try:
            for path in Path(order.bundle).iterdir():
                if path.is_file() and not path.is_symlink():
                    text = path.read_bytes().decode("utf-8", "replace")
                    known.lines[path.name] = len(text.splitlines())
                    known.words.update(_WORD.findall(f"{path.name} {text}"))
        except OSError:  # who is to run it fails, too, and says so
            pass
        return known

    def failure(self, fault: Fault, order: Order) -> TaskFailed:
        """Return what the hub may be told of an order that a worker failed at; `bare`, where a promise hides the data:
        a sentence with nothing in its gaps, and no line."""
        failed = TaskFailed(self.told(fault, order))
        if not self._here(fault):
            failed.bare = _Filling(set(), atoms=0, scans=1).sentence(fault.words, _own()) or ""
        return failed

    def told(self, fault: Fault, order: Order) -> str:
        """Return a sentence for the hub about an order that a worker failed at."""
        kind = fault.kind if fault.kind in _KINDS else "an error of its own class"
        filling = _Filling(self.words | _asked(order))
        if self._here(fault):
            said = filling.sentence(fault.words, _PYTHON_PARTS)
            return f"{fault.file}: line {fault.line}: {kind}: {said or KEPT}"
        return filling.sentence(fault.words, _own()) or f"{order.kind}: {kind}: {KEPT}"

    def _here(self, fault: Fault) -> bool:
        return fault.file in self.lines and 1 <= fault.line <= self.lines[fault.file]


class _Filling:
    """Fills the gaps of one sentence: with so many ``atoms`` at most, and so many looks through what is known."""

    def __init__(self, words: set[str], atoms: int = _ATOMS, scans: int = _SCANS) -> None:
        self._words, self._left, self._scans = words, atoms, scans

    def sentence(self, words: str, known: Iterable[Parts], depth: int = _DEPTH) -> str | None:
        """Return the known sentence that this is, with what may be shown in its gaps; None where it is none."""
        if not self._scans:
            return None
        self._scans -= 1
        best: tuple[int, Parts, list[str]] | None = None
        least = 0 if known is _PYTHON_PARTS or depth < _DEPTH else _WHOLE - 1
        for parts in known:
            gaps = _gaps(words, parts)
            size = sum(map(len, parts))
            if gaps is not None and size > (best[0] if best is not None else least):
                best = size, parts, gaps
        if best is None:
            return None
        _, parts, gaps = best
        shown = [self._shown(gap, known, depth - 1) for gap in gaps]
        return "".join(part + more for part, more in zip(parts, [*shown, ""], strict=True))

    def _shown(self, gap: str, known: Iterable[Parts], depth: int) -> str:
        if not gap:
            return ""
        if _VALUE.fullmatch(gap):
            atoms = [atom for item in gap.strip("[]()").split(", ") for atom in _atoms(item.strip("'"))]
            if len(atoms) <= self._left and all(self._may(atom) for atom in atoms):
                self._left -= len(atoms)
                return gap
        said = self.sentence(gap, known, depth) if depth else None
        if said is not None:
            return said
        for mark in _JOINTS if depth else ():
            head, found, tail = gap.partition(mark)
            if found and head:
                return self._shown(head, known, depth - 1) + self._shown(mark + tail, known, depth - 1)
        return _GAP

    def _may(self, atom: str) -> bool:
        return bool(_NUMBER.fullmatch(atom)) or atom in self._words or atom in _COMMON


def _atoms(item: str) -> list[str]:
    """Return the names in a dotted one; a number is one by itself."""
    return [item] if _NUMBER.fullmatch(item) else item.split(".")


def _asked(order: Order) -> set[str]:
    """Return the words of a job's own fields in an order, and of the names of its model's tensors."""
    return set(_WORD.findall(order.model_dump_json(include=_FIELDS)))


def _gaps(words: str, parts: Parts) -> list[str] | None:
    """Return what stands in the gaps between the parts; None where this is no such sentence. Nothing is tried twice."""
    first, *rest = parts
    if not words.startswith(first):
        return None
    at, gaps = len(first), list[str]()
    for number, part in enumerate(rest, 1):
        last = number == len(rest)
        end = len(words) - len(part) if last else words.find(part, at)
        if end < at or not words.startswith(part, end):
            return None
        gaps.append(words[at:end])
        at = end + len(part)
    return gaps if at == len(words) else None


@cache
def _own() -> tuple[Parts, ...]:
    """Return the sentences in the source of what runs in workers. It is read when the first one fails."""
    root = Path(atoll.__file__).parent
    found = {parts for pattern in _SAID_BY for path in sorted(root.glob(pattern)) for parts in _sentences(path)}
    return tuple(sorted(found))


def _sentences(path: Path) -> Iterator[Parts]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):  # an installation without source: sentences stay at the site
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = _parts(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = (node.value,)
        else:
            continue
        if sum(map(len, parts)) >= _LEAST and any(" " in part for part in parts):
            yield parts


def _parts(node: ast.JoinedStr) -> Parts:
    parts = [""]
    before = None
    for value in node.values:
        if isinstance(value, ast.Constant):
            parts[-1] += str(value.value)
        elif before is None or isinstance(before, ast.Constant):  # gaps without a word between them are one
            parts.append("")
        before = value
    return tuple(parts)


_PYTHON_PARTS = tuple(tuple(words.split("{}")) for words in _PYTHON)
