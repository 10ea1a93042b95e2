"""The command line without a hub: what it suggests, how errors end."""

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Group

from atoll.console.cli import app, execute, hoist
from atoll.console.show import table, text
from atoll.console.terminal import console, say


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        execute(arguments)
    return int(end.value.code or 0)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text("class Heart: ...\n")
    path = tmp_path / "job.yaml"
    path.write_text(
        "kind: train\nname: heart\npurpose: research\ntask: {file: task.py, name: Heart}\ndata: {dataset: heart}\n"
    )
    return path


def test_help_names_every_command_and_each_has_an_example(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    topics = [topic.typer_instance for topic in app.registered_groups]
    commands = [command for topic in topics if topic for command in topic.registered_commands]
    groups = [group for topic in topics if topic for group in topic.registered_groups]
    for command in commands:
        assert command.callback is not None
        assert (command.name or command.callback.__name__) in shown
        assert "Example: atoll " in (command.callback.__doc__ or "")
    for group in groups:
        assert str(group.name) in shown
        for command in group.typer_instance.registered_commands if group.typer_instance else ():
            assert "Example: atoll " in (command.callback.__doc__ or "")  # type: ignore[union-attr]
    assert {command.callback.__name__ for command in commands if command.callback} >= {"run", "plan", "deploy", "ui"}


def test_a_near_miss_of_a_command_is_suggested(capsys: pytest.CaptureFixture[str]):
    assert run("depoly", "heart@1") == 2
    assert "'deploy'" in capsys.readouterr().err


def test_a_wrong_field_is_one_sentence_with_exit_code_2(job: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--home", str(job.parent / "home"), "run", str(job), "--set", "stepz=3") == 2
    told = capsys.readouterr()
    assert told.err.strip().endswith("job.yaml: stepz: unknown field; did you mean 'steps'?")
    assert told.out == ""
    assert not (job.parent / "home").exists(), "a wrong document must start nothing"


def test_debug_shows_the_traceback_and_keeps_the_exit_code(job: Path, capsys: pytest.CaptureFixture[str]):
    assert run("plan", str(job), "--set", "sync=fedvg", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["query", "SELECT 1"], "names no dataset after FROM"),
        (["schema", "trian"], "did you mean 'train'?"),
        (["predict", "heart"], "rows: none given"),
        (["predict", "heart", "--row", "{"], "--row 1: not JSON"),
        (["policy", "check", "nowhere.cedar"], "nowhere.cedar: there is no such policy file"),
        (["--home", "nowhere", "join", "token"], "site: nowhere has none"),
        (["run"], "Missing argument 'JOB'; see `atoll run --help`"),
        (["plan", "job.yaml", "--sett", "a=b"], "No such option: --sett"),
        (["deploy", "heart@1", "--port", "http"], "Invalid value for '--port'"),
        (["runs", "shwo"], "Did you mean 'show'?; see `atoll runs --help`"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""


def test_what_is_written_to_a_file_is_neither_wrapped_nor_cut(capsys: pytest.CaptureFixture[str]):
    long = " ".join(["words"] * 400)
    console().print(Group(table("Title", ("name", ">number", "why"), [("a", "1", long), ("b", "2", long)]), text(long)))
    say(long)
    told = capsys.readouterr()
    assert [line.count(long) for line in told.out.splitlines()] == [0, 0, 1, 1, 1]
    assert told.err == f"{long}\n"


@pytest.mark.parametrize("arguments", [["join"], ["join", "-"]])
def test_a_token_is_read_from_standard_input(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    home = ["--home", str(tmp_path)]
    assert run(*home, "site", "add", "bonn") == 0
    for given, words in (("no token\nmore\n", "token: "), ("", "token: none on standard input; paste it there")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        assert run(*home, *arguments) == 2
        assert words in capsys.readouterr().err


def test_global_options_may_stand_anywhere():
    assert hoist(["run", "job.yaml", "--debug"]) == ["--debug", "run", "job.yaml"]
    assert hoist(["runs", "--home", "x", "--json"]) == ["--home", "x", "runs", "--json"]
    assert hoist(["runs", "--home=x"]) == ["--home=x", "runs"]
    assert hoist(["query", "--", "--home"]) == ["query", "--", "--home"]


def test_schema_prints_json(capsys: pytest.CaptureFixture[str]):
    assert run("schema", "train") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["properties"]["kind"]["const"] == "train"
    assert "additionalProperties" in told


def test_a_site_and_its_data_are_added_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home = ["--home", str(tmp_path / "home")]
    rows = tmp_path / "heart.csv"
    rows.write_text("age,sex\n63,1\n41,0\n")
    assert run(*home, "site", "add", "zurich", "--owner", "Zurich hospital") == 0
    add = ["data", "add", "heart", str(rows), "--purpose", "research", "--min-group", "5"]
    assert run(*home, *add, "--site", "zurihc") == 2
    assert "did you mean 'zurich'?" in capsys.readouterr().err
    assert run(*home, *add, "--site", "../zurich") == 2
    assert run(*home, *add, "--site", "zurich") == 0
    capsys.readouterr()
    assert run(*home, "data", "list", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["site"], told["name"], told["rows"], told["min_group"]) == ("zurich", "heart", 2, 5)
    assert str(tmp_path) not in json.dumps(told), "a listing tells no path"
    assert run(*home, "data", "remove", "haert") == 2
    assert "did you mean 'heart'?" in capsys.readouterr().err
    assert run(*home, "data", "remove", "heart", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"site": "zurich", "removed": "heart"}
    assert run(*home, "data", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert rows.exists(), "the file is its owner's"


def test_a_pretrained_model_is_listed_at_a_site_or_at_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home, folder = ["--home", str(tmp_path / "home")], tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"numbers")
    assert run(*home, "site", "add", "zurich") == 0
    assert run(*home, "pretrained", "add", "gemma", str(folder), "--site", "zurich", "--hub") == 2
    capsys.readouterr()
    assert run(*home, "pretrained", "add", "gemma", str(folder)) == 0
    digest = capsys.readouterr().out.strip()
    assert run(*home, "pretrained", "add", "gemma", str(folder), "--hub", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"name": "gemma", "digest": digest}
    for where in (["--hub"], ["--site", "zurich"]):
        capsys.readouterr()
        assert run(*home, "pretrained", "list", *where, "--json") == 0
        assert json.loads(capsys.readouterr().out) == [
            {"name": "gemma", "digest": digest, "files": ["model.safetensors"]}
        ]
        assert run(*home, "pretrained", "remove", "gemma", *where) == 0
        assert run(*home, "pretrained", "remove", "gemma", *where) == 2
    assert folder.exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--host", "hub.example"], "host: 'hub.example': must be an address of this machine"),
        (["--host", "0.0.0.0", "--name", "no name"], "no name"),
    ],
)
def test_a_hub_is_not_made_where_it_cannot_be_reached(
    wrong: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--home", str(tmp_path), "hub", "init", *wrong) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "hub" / "hub.yaml").exists()


def test_a_site_name_that_is_a_path_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--home", str(tmp_path / "home"), "site", "add", "../../evil") == 2
    assert "site add: name: '../../evil'" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_policy_with_a_typo_is_refused_and_a_good_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = tmp_path / "good.cedar", tmp_path / "bad.cedar"
    good.write_text('@id("all") permit (principal, action == Action::"plan", resource);\n')
    bad.write_text('@id("all") permit (principal, action == Action::"pln", resource);\n')
    assert run("policy", "check", str(good)) == 0
    assert "1 rules fit the schema: all" in capsys.readouterr().err
    assert run("policy", "check", str(bad)) == 2
    assert "bad.cedar" in capsys.readouterr().err
