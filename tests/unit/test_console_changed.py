"""What an owner is shown of code: the lines that Python runs, and whatever a screen would hide."""

import ast

import pytest

from atoll.console.changed import cautions, changes
from atoll.inner.task import load_task
from atoll.spec.model import Bundle
from atoll.spec.order import TaskName

GUARD = "def examples(t):\n    # names stay out\n    t = t.drop(['name'])\n    return t\n"


def code(text):
    return Bundle(files={"task.py": text})


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_a_line_that_is_commented_out_by_an_end_that_python_does_not_know_is_shown_as_changed(end):
    evil = GUARD.replace("out\n", f"out{end}")
    assert "drop" not in ast.unparse(ast.parse(evil))
    shown = list(changes(code(GUARD), code(evil)))
    assert "-    t = t.drop(['name'])" in shown
    assert f"+    # names stay out<U+{ord(end):04X}>    t = t.drop(['name'])" in shown
    (words,) = cautions(code(evil))
    assert words.startswith(f"task.py: line 2 has <U+{ord(end):04X}>")


def test_a_line_end_that_python_knows_is_one(tmp_path):
    evil = code("# harmless\rimport os\n")
    assert list(changes(Bundle(files={}), evil))[-2:] == ["+# harmless", "+import os"]
    assert "carriage return alone" in cautions(evil)[0]
    assert not list(changes(code(GUARD), code(GUARD.replace("\n", "\r\n"))))
    assert not cautions(code(GUARD.replace("\n", "\r\n")))


@pytest.mark.parametrize("turn", "\u202a\u202e\u2066\u2069")
def test_what_turns_the_direction_of_text_is_spelt_and_warned_of(turn):
    evil = code(f"access = 'user{turn} # admin'\n")
    assert list(changes(Bundle(files={}), evil))[-1] == f"+access = 'user<U+{ord(turn):04X}> # admin'"
    (words,) = cautions(evil)
    assert words.endswith("which turns how the line reads")


def test_an_encoding_other_than_utf_8_is_warned_of_and_never_obeyed(tmp_path):
    hidden = "# coding: utf-7\nclass Heart:\n    WIDTH = '+AGE-'\n    def model(self): ...\n    examples = model\n"
    assert "names the encoding utf-7" in cautions(code(hidden))[0]
    assert not cautions(code("# -*- coding: UTF_8 -*-\n"))
    (tmp_path / "task.py").write_text(hidden)
    assert load_task(tmp_path, TaskName(file="task.py", name="Heart")).WIDTH == "+AGE-"


def test_of_many_such_lines_some_are_named_and_the_others_counted():
    found = cautions(code("\u202e\n" * 30))
    assert len(found) == 21
    assert found[-1] == "task.py: and 10 more lines of that kind"
