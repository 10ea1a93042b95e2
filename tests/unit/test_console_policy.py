"""The commands about rules and grants, on files alone: no hub runs for any of them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.console.cli import execute
from atoll.console.terms import end_of, required
from atoll.data.catalogue import Catalogue
from atoll.errors import Invalid
from atoll.journal import Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.spec.event import Decided
from atoll.spec.fleet import Site
from atoll.spec.policy import Decision, Request

CLOSED = SITE_POLICY + '\n@id("b.closed")\nforbid (principal, action == Action::"plan", resource);\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the site berlin, which has a dataset and the journal of two runs that it was planned with."""
    folder = tmp_path / "sites" / "berlin"
    sites.create(folder, Site(name="berlin"), SITE_POLICY)
    pq.write_table(pa.table({"age": [1.0] * 50}), tmp_path / "rows.parquet")  # pyright: ignore[reportUnknownMemberType]
    dataset = Catalogue(folder).add("rows", tmp_path / "rows.parquet", purposes=("care",))
    asked = Request(action="plan", site="berlin", dataset=dataset, purpose="care", job="job").kept
    said = Decision(allowed=True, party="berlin")
    with Journal(folder / "journal.db", "berlin") as journal:
        for run in ("one", "two"):
            journal.append(
                Decided(action="plan", subject="berlin/rows", run=run, decision=said, request=asked), actor="berlin"
            )
    (tmp_path / "closed.cedar").write_text(CLOSED, encoding="utf-8")
    (tmp_path / "open.cedar").write_text(SITE_POLICY, encoding="utf-8")
    return tmp_path


def run(home: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        execute(["--home", str(home), *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def told(home: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert run(home, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_names_the_runs_that_would_have_been_refused(home: Path, capsys: pytest.CaptureFixture[str]):
    found = told(home, capsys, "policy", "dry-run", str(home / "closed.cedar"))
    assert (found["runs"], found["refused"], found["unknown"]) == (["one", "two"], ["one", "two"], 0)
    assert told(home, capsys, "policy", "dry-run", str(home / "closed.cedar"), "--run", "two")["runs"] == ["two"]
    assert run(home, "policy", "dry-run", str(home / "closed.cedar"), "--site", "berlin") == 0
    shown = capsys.readouterr().out
    assert "Of 2 runs, 2 would have been refused: one, two" in shown
    assert "b.closed" in shown
    assert run(home, "policy", "dry-run", str(home / "open.cedar")) == 0
    assert "None of 2 runs would have been refused." in capsys.readouterr().out


def test_a_dry_run_without_a_past_says_so(home: Path, capsys: pytest.CaptureFixture[str]):
    assert run(home, "policy", "dry-run", str(home / "open.cedar"), "--hub") == 2
    assert "there is no journal yet" in capsys.readouterr().err
    assert run(home, "policy", "dry-run", str(home / "open.cedar"), "--hub", "--site", "berlin") == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_check_tells_rules_and_warnings(home: Path, capsys: pytest.CaptureFixture[str]):
    file = home / "trap.cedar"
    file.write_text(SITE_POLICY + '@id("b.t") forbid (principal, action, resource) when { context.kind == "rows" };\n')
    found = told(home, capsys, "policy", "check", str(file))
    assert isinstance(found["warnings"], list)
    assert len(found["warnings"]) == 1
    assert run(home, "policy", "check", str(file)) == 0
    assert "warning: line" in capsys.readouterr().err


def test_a_grant_is_given_an_end_and_taken_back(home: Path, capsys: pytest.CaptureFixture[str]):
    found = told(home, capsys, "data", "grant", "rows", "care", "--until", "2027-01-31")
    assert (found["purposes"], found["until"]) == (["care"], {"care": "2027-02-01T00:00:00Z"})
    assert told(home, capsys, "data", "grant", "rows", "research")["purposes"] == ["care", "research"]
    assert told(home, capsys, "data", "grant", "rows", "care")["until"] == {}
    assert told(home, capsys, "data", "withdraw", "rows", "care")["purposes"] == ["research"]
    assert run(home, "data", "withdraw", "rows", "reserch") == 2
    assert "did you mean 'research'?" in capsys.readouterr().err
    assert run(home, "data", "grant", "other", "care") == 2


def test_what_is_required_of_updates_is_listed_and_let_go(home: Path, capsys: pytest.CaptureFixture[str]):
    found = told(home, capsys, "data", "require", "rows", "clip=0.5", "int8")
    assert isinstance(found["wire"], list)
    assert [(step["kind"], step["value"]) for step in found["wire"]] == [("clip", 0.5), ("int8", None)]
    assert told(home, capsys, "data", "require", "rows")["wire"] == []
    assert run(home, "data", "require", "rows", "int8", "clip=0.5") == 2
    assert "put clip before int8" in capsys.readouterr().err


def test_where_a_dataset_is_kept_is_listed_and_let_go(home: Path, capsys: pytest.CaptureFixture[str]):
    assert told(home, capsys, "data", "keep", "rows", "ch", "eu")["regions"] == ["ch", "eu"]
    assert told(home, capsys, "data", "keep", "rows")["regions"] == []


def test_no_site_takes_the_hubs_name(home: Path, capsys: pytest.CaptureFixture[str]):
    assert run(home, "site", "add", "hub") == 2
    assert "'hub': is the hub's own name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("2027-01-31", "2027-02-01T00:00:00+00:00"),
        ("2027-01-31T12:00Z", "2027-01-31T12:00:00+00:00"),
        ("2027-01-31T12:00+01:00", "2027-01-31T12:00:00+01:00"),
    ],
)
def test_a_day_ends_with_itself_and_a_time_at_itself(text: str, end: str):
    assert end_of(text).isoformat() == end


@pytest.mark.parametrize(
    ("text", "words"), [("soon", "is no date"), ("2027-01-31T12:00", "has no time zone"), ("9999-12-31", "is no date")]
)
def test_what_is_no_end_is_refused_in_words(text: str, words: str):
    with pytest.raises(Invalid, match=words):
        end_of(text)


@pytest.mark.parametrize("steps", [["clip"], ["clip=much"], ["noise=1"], ["int8=3"], ["int8", "int4"]])
def test_a_step_that_is_none_is_refused(steps: list[str]):
    with pytest.raises(Invalid, match="require: "):
        required(steps)
