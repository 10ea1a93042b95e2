"""Good bytes made bad: what a stranger may send in place of what a parser takes, and what may come of it."""

import re

from hypothesis import strategies as st

from atoll.errors import AtollError

# What stands for a value in JSON, YAML and SQL where another was: deep, huge, no number, no text, or of another kind.
HOSTILE = st.sampled_from(
    (b"[" * 3000, b'{"a":' * 3000, b"(" * 3000, b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'""')
) | st.sampled_from(
    (b"18446744073709551616", b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\xe2\x80\xae", b"0.1", b"true", b"\n\n")
)
_VALUE = re.compile(rb'"[^"]*"|-?[0-9]+(?:\.[0-9]+)?|\[[^\[\]]*\]|true|false|null')


@st.composite
def mutated(draw, data):
    """Return bytes with some replaced, cut off, left out, said twice or put in, and values by hostile ones."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(made)))
        stop = min(len(made), start + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["flip", "cut", "out", "twice", "in", "value", "value"])):
            case "flip" if start < len(made):
                made[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del made[start:]
            case "out":
                del made[start:stop]
            case "twice":
                made[start:start] = made[start:stop]
            case "in":
                made[start:start] = draw(HOSTILE | st.binary(max_size=8))
            case "value" if found := list(_VALUE.finditer(made)):
                place = draw(st.sampled_from(found))
                made[place.start() : place.end()] = draw(HOSTILE)
            case _:
                pass
    return bytes(made)


def outcome(call, *arguments):
    """Return what a call returns, or the error of ours that it raises, which is a sentence or a few: else it is a
    fault that no stranger may cause."""
    try:
        return call(*arguments)
    except AtollError as error:
        told = error
    assert 0 < len(str(told)) < 10_000
    return told
