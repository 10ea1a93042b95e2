"""The commands about privacy budgets, on a site's files alone: no hub runs for any of them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.console.cli import execute
from atoll.data.catalogue import Catalogue
from atoll.journal import Journal
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.spec.budget import Guarantee, Mechanism, PrivacyCharged, PrivacyReserved
from atoll.spec.fleet import Site

MECHANISM = Mechanism(multiplier=1.0, steps=10, sampling=0.1)
WHOLE = Guarantee(unit="record", epsilon=4.0, delta=1e-6, mechanism=MECHANISM, accountant="pld")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the site berlin, where a run reserved epsilon 4 and was charged 1 of it."""
    folder = tmp_path / "sites" / "berlin"
    sites.create(folder, Site(name="berlin"), SITE_POLICY)
    pq.write_table(pa.table({"age": [1.0] * 50}), tmp_path / "rows.parquet")  # pyright: ignore[reportUnknownMemberType]
    Catalogue(folder).add("rows", tmp_path / "rows.parquet", purposes=("care",))
    with Journal(folder / "journal.db", "berlin") as journal:
        journal.append(
            PrivacyReserved(dataset="rows", run="one", guarantee=WHOLE),
            PrivacyCharged(dataset="rows", run="one", epsilon=1.0, delta=1e-6, steps=3),
            actor="berlin",
        )
    return tmp_path


def run(home: Path, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        execute([*words, "--home", str(home)])
    return int(ended.value.code or 0)


def told(home: Path, capsys: pytest.CaptureFixture[str], *words: str):
    assert run(home, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_used_reserved_and_left_is_shown_and_a_lost_run_can_be_released(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    assert told(home, capsys, "data", "budget", "rows", "--epsilon", "8", "--delta", "1e-5")["budget"]["epsilon"] == 8
    [found] = told(home, capsys, "privacy")
    assert (found["epsilon"], found["reserved"], found["left"]) == (1.0, 3.0, 4.0)
    assert [(one["run"], one["steps"], one["over"]) for one in found["runs"]] == [("one", 3, False)]
    assert run(home, "privacy") == 0
    shown = capsys.readouterr().out
    assert "███▒▒▒▒▒▒▒··········" in shown
    assert "goes on" in shown
    assert run(home, "privacy", "release", "two") == 2
    assert "'two' has nothing reserved at berlin; one has" in capsys.readouterr().err
    assert told(home, capsys, "privacy", "release", "one") == {"site": "berlin", "released": "one"}
    [found] = told(home, capsys, "privacy", "--site", "berlin")
    assert (found["epsilon"], found["reserved"], found["left"]) == (1.0, 0.0, 7.0)


def test_a_budget_below_what_is_used_leaves_nothing_and_without_one_the_past_stays_known(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    told(home, capsys, "data", "budget", "rows", "--epsilon", "0.5", "--delta", "1e-5", "--unit", "site")
    [found] = told(home, capsys, "privacy")
    assert (found["budget"]["unit"], found["left"]) == ("site", 0.0)
    assert told(home, capsys, "data", "budget", "rows", "--unit", "none")["budget"] is None
    [found] = told(home, capsys, "privacy")
    assert (found["budget"], found["epsilon"], found["left"]) == (None, 1.0, None)


@pytest.mark.parametrize(
    "wrong",
    [("--epsilon", "8"), (), ("--unit", "none", "--epsilon", "1"), ("--epsilon", "0", "--delta", "0.1")],
    ids=["half", "nothing", "both", "zero"],
)
def test_what_is_no_budget_is_said_in_a_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, ...]
):
    assert run(home, "data", "budget", "rows", *wrong) == 2
    assert capsys.readouterr().err.startswith("error: budget: ")
