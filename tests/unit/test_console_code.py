"""An owner's word on code, by commands: shown before it is given, and never given by asking for JSON."""

import json

import pytest

from atoll.console.cli import execute
from atoll.journal import Journal
from atoll.runtime.reviews import Reviews
from atoll.spec.model import Bundle

CODE = Bundle(files={"task.py": "admin = False  # \u202e\n"})


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "sites" / "lyon"
    folder.mkdir(parents=True)
    (folder / "site.yaml").write_text("name: lyon\n")
    with Journal(folder / "journal.db", "lyon") as journal:
        Reviews(folder, journal, lambda event: journal.append(event, actor="lyon")).keep(
            CODE, "task.py:T", "job", "eve"
        )
    return tmp_path


def run(home, *arguments):
    with pytest.raises(SystemExit) as end:
        execute(("--home", str(home), *arguments))
    return int(end.value.code or 0)


def states(home, capsys):
    assert run(home, "site", "code", "--json") == 0
    return [one["state"] for one in json.loads(capsys.readouterr().out)]


def test_json_shows_code_and_approves_it_only_when_it_is_told_to(home, capsys):
    assert run(home, "site", "approve", "sha256:", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["approved"] is False
    assert told["diff"][-1] == "+admin = False  # <U+202E>"
    assert told["cautions"][0].startswith("task.py: line 1 has <U+202E> RIGHT-TO-LEFT OVERRIDE")
    assert states(home, capsys) == ["waiting"]
    assert run(home, "site", "approve", "sha256:", "--json", "--yes") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["approved"], again["diff"], again["cautions"]) == (True, told["diff"], told["cautions"])
    assert states(home, capsys) == ["approved"]


def test_what_a_screen_would_hide_is_spelt_and_warned_of(home, capsys):
    assert run(home, "site", "approve", "sha256:", "--yes") == 0
    shown = "".join(capsys.readouterr())
    assert "\u202e" not in shown
    assert "CAUTION: task.py: line 1 has <U+202E>" in shown


def test_an_empty_journal_is_not_exported_and_leaves_no_file_in_the_way(tmp_path, capsys):
    with Journal(tmp_path / "hub" / "journal.db", "hub"):
        pass
    out = tmp_path / "hub.jsonl"
    assert run(tmp_path, "audit", "export", str(out)) == 2
    assert "has no entries yet" in capsys.readouterr().err
    assert not out.exists()
