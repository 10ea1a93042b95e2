"""What an owner is shown of code before deciding about it: each line as Python counts them, and nothing left unseen.

A screen that obeys control characters, and a splitter with other line ends than Python's, show other code than runs.
"""

import difflib
import re
import unicodedata
from collections.abc import Iterator

from atoll.spec.model import Bundle

_END = re.compile(r"\r\n|\r|\n")  # Python's, of source; str.splitlines() knows eight more
_COOKIE = re.compile(r"[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", re.ASCII)  # PEP 263, in the first two lines
_PLAIN = {"utf-8", "utf8"}
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # CVE-2021-42574
_MOST = 20  # lines of a file that are warned of


def changes(old: Bundle, new: Bundle) -> Iterator[str]:
    """Yield the lines of a unified diff of each file, with characters that are not printed spelt out."""
    for name in sorted({*old.files, *new.files}):
        was, now = (_lines(one.files.get(name, "")) for one in (old, new))
        for line in difflib.unified_diff(was, now, f"before/{name}", f"now/{name}", lineterm=""):
            yield "".join(char if _seen(char) else _spelt(char) for char in line)


def cautions(code: Bundle) -> list[str]:
    """Return what in code can make it read otherwise than it runs, a sentence for each line that has some."""
    return [words for name, text in sorted(code.files.items()) for words in _cautions(name, text)]


def _cautions(name: str, text: str) -> Iterator[str]:
    found = list[str]()
    if re.search(r"\r(?!\n)", text):
        found.append(f"{name}: has lines that end by a carriage return alone, which screens do not show as an end")
    for number, line in enumerate(_lines(text), 1):
        cookie = _COOKIE.match(line) if number <= 2 else None
        if cookie is not None and cookie[1].lower().replace("_", "-") not in _PLAIN:
            found.append(f"{name}: line {number} names the encoding {cookie[1]}, and it runs as UTF-8")
        hidden = sorted({char for char in line if not _seen(char)})
        if hidden:
            shown = ", ".join(f"{_spelt(char)} {unicodedata.name(char, '')}".rstrip() for char in hidden[:4])
            does = "turns how the line reads" if _TURNS & set(hidden) else "is not printed"
            found.append(f"{name}: line {number} has {shown}, which {does}")
    yield from found[:_MOST]
    if len(found) > _MOST:
        yield f"{name}: and {len(found) - _MOST} more lines of that kind"


def _lines(text: str) -> list[str]:
    lines = _END.split(text)
    return lines[:-1] if not lines[-1] else lines


def _seen(char: str) -> bool:
    return char.isprintable() or char == "\t"


def _spelt(char: str) -> str:
    return f"<U+{ord(char):04X}>"
