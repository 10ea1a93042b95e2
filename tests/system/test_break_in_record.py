"""Breaking into the record, with real processes: the first bad entry is named, and witnesses notice a roll-back."""

import json
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from atoll.errors import Corrupt
from atoll.journal import Journal

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
TAMPERED = Corrupt.exit_code


@pytest.fixture(scope="module")
def ended(make_home, tmp_path_factory):
    """A home whose hub and two sites have trained a model, and ended."""
    home = make_home(tmp_path_factory.mktemp("audit") / "home")
    for name in ("berlin", "oslo"):
        home.site(name)
    for _ in range(2):  # a hub that begins anew has something to show at once
        home.asked("run", home.job())
    assert home.empty()
    return home


@pytest.fixture
def home(ended, make_home, tmp_path):
    """A copy of that home, to be tampered with."""
    copy = make_home(tmp_path / "home")
    shutil.copytree(ended.path, copy.path, dirs_exist_ok=True)
    return copy


def tamper(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for trigger in ("entries_keep", "entries_stay", "entries_next"):
            connection.execute(f"drop trigger {trigger}")
        connection.execute(statement)


def broken(home, *words):
    """Return the verdict that is not good, of a command that ends with the exit code of one."""
    command = home.start("audit", "verify", *words, "--json")
    assert command.process.wait(60) == TAMPERED, command.said
    (found,) = [verdict for verdict in json.loads(command.out.read_text()) if not verdict["intact"]]
    return found


def test_each_journal_is_verified_without_a_hub_and_was_witnessed(home):
    found = {Path(verdict["journal"]).parent.name: verdict for verdict in home.asked("audit", "verify")}
    assert set(found) == {"hub", "berlin", "oslo"}
    assert all(verdict["intact"] for verdict in found.values())
    assert set(found["hub"]["witnesses"]) == {"berlin", "oslo"}
    assert set(found["berlin"]["witnesses"]) <= {"hub"}  # it had written nothing when the hub looked
    assert "intact" in home.atoll("audit", "verify")
    assert home.empty()  # none was started


@pytest.mark.parametrize("owner", ["hub", "sites/oslo"])
def test_an_edited_entry_is_named(home, owner):
    path = home.path / owner / "journal.db"
    tamper(path, 'update entries set body = cast(replace(body, \'"actor":"\', \'"actor":"x\') as blob) where seq = 7')
    found = broken(home)
    assert (found["journal"], found["bad"], found["entries"]) == (str(path), 7, 6)
    assert "BROKEN at entry 7" in home.atoll("audit", "verify", code=TAMPERED)


def test_a_truncated_journal_is_named_and_its_hub_does_not_start(home):
    path = home.path / "hub" / "journal.db"
    tamper(path, "delete from entries where seq > 9")
    assert broken(home)["bad"] == 10
    assert "its owner signed" in home.atoll("run", home.job(), code=TAMPERED)


def test_an_export_is_verified_elsewhere_and_an_edit_in_it_is_named(home, make_home, tmp_path):
    file = tmp_path / "hub.jsonl"
    told = home.asked("audit", "export", str(file))
    elsewhere = make_home(tmp_path / "elsewhere")
    (found,) = elsewhere.asked("audit", "verify", str(file), "--key", told["key"])
    assert (found["intact"], set(found["witnesses"])) == (True, {"berlin", "oslo"})
    assert "is there already" in home.atoll("audit", "export", str(file), code=2)
    lines = file.read_bytes().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if b'"seq":12,' in line)
    lines[place] = lines[place].replace(b'"actor":"', b'"actor":"x')
    file.write_bytes(b"".join(lines))
    assert broken(elsewhere, str(file))["bad"] == 12


def test_an_entry_is_proven_to_somebody_who_has_only_the_proof(home, make_home, tmp_path):
    proof = home.asked("audit", "prove", "5")
    assert proof["seq"] == 5
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(proof))
    elsewhere = make_home(tmp_path / "elsewhere")
    assert elsewhere.asked("audit", "verify", str(file), "--key", proof["key"])[0]["intact"]
    file.write_text(json.dumps({**proof, "seq": 6}))
    assert "is not entry 6" in broken(elsewhere, str(file))["words"]
    assert "cosigned by" in home.atoll("audit", "prove", "1")
    assert "and no 99999" in home.atoll("audit", "prove", "99999", code=2)


def test_what_was_live_and_a_promise_to_keep_the_record_are_told(home):
    home.asked("promote", "risk@1", "champion")
    (live,) = home.asked("audit", "what-was-live", "--at", "2999-01-01")
    assert (live["model"], live["alias"]) == ("risk@1", "champion")
    assert home.asked("audit", "what-was-live", "--at", "2001-01-01T00:00Z") == []
    assert "is no time" in home.atoll("audit", "what-was-live", "--at", "noon", code=2)
    home.asked("audit", "retain", "--until", "2900-12-31")
    assert "cannot be shortened" in home.atoll("audit", "retain", "--until", "2900-01-01", code=3)


# --- a witness of its own, that joined


@pytest.fixture
def pair(make_home, tmp_path, eventually):
    """A hub, and the site lyon in a home of its own; both have seen each other's journals."""
    hub, lyon = make_home(tmp_path / "hub"), make_home(tmp_path / "lyon")
    lyon.site("lyon")
    daemon = hub.start("hub", "start")
    hub.seen("site.connected", site__name="local")
    token = hub.asked("site", "invite", "lyon")["token"]
    agent = lyon.start("join", token)
    hub.seen("site.connected", site__name="lyon")
    hub.asked("run", hub.job())
    assert eventually(lambda: list((lyon.path / "sites" / "lyon" / "witness").glob("*")))
    return hub, lyon, daemon, agent, token


def files(home, folder):
    return [file for file in (home.path / folder).iterdir() if file.name.startswith("journal.")]


def put_back(home, folder, kept):
    for file in files(home, folder):
        file.unlink()
    for name, data in kept.items():
        (home.path / folder / name).write_bytes(data)
        (home.path / folder / name).chmod(0o600)  # the key would not be used otherwise


def test_a_hub_whose_journal_was_rolled_back_is_refused_by_its_site(pair, eventually):
    hub, lyon, daemon, agent, token = pair
    assert daemon.end() == 128 + signal.SIGTERM
    kept = {file.name: file.read_bytes() for file in files(hub, "hub")}
    head, daemon = hub.head(), hub.start("hub", "start")
    hub.seen("site.connected", site__name="lyon", after=head)
    run = hub.asked("run", hub.job())["run"]
    folder = lyon.path / "sites" / "lyon" / "witness"
    agent.end()
    agent = lyon.start("join", token)  # it looks once more as it begins
    with Journal(hub.path / "hub" / "journal.db", "hub", read_only=True) as journal:
        size = next(entry.seq for entry in journal.entries(kinds=("run.published",), run=run))
    assert eventually(lambda: int(next(folder.iterdir()).read_text().split("\n")[2]) >= size)
    assert daemon.end() == 128 + signal.SIGTERM
    put_back(hub, "hub", kept)
    export = str(hub.path / "hub.jsonl")
    hub.asked("audit", "export", export)
    assert [verdict["intact"] for verdict in hub.asked("audit", "verify", export)] == [True]  # by itself it is whole
    assert "the witness local says that there are" in hub.atoll("audit", "verify", "--json", code=6)
    daemon = hub.start("hub", "start")
    assert eventually(lambda: lyon.journal("journal.disputed", site="lyon"), seconds=60)
    (disputed,) = [entry.event for entry in lyon.journal("journal.disputed", site="lyon")]
    assert disputed.party != "hub"  # by the name of the hub that it joined
    assert "the journal of hub was rolled back" in disputed.words
    assert "the journal of hub was rolled back" in hub.atoll("run", hub.job(), code=3)
    assert daemon.end() == 128 + signal.SIGTERM
    agent.end()


def test_a_site_whose_journal_was_rolled_back_is_in_quarantine(pair, eventually):
    hub, lyon, daemon, agent, token = pair
    folder = "sites/lyon"
    agent.end()
    kept = {file.name: file.read_bytes() for file in files(lyon, folder)}
    head, agent = hub.head(), lyon.start("join", token)
    hub.seen("site.connected", site__name="lyon", after=head)
    hub.asked("run", hub.job())
    agent.end()
    agent = lyon.start("join", token)
    assert eventually(lambda: int((hub.path / "hub" / "witness" / "lyon").read_text().split("\n")[2]) > 5)
    agent.end()
    put_back(lyon, folder, kept)
    agent = lyon.start("join", token)
    (quarantined,) = hub.seen("site.quarantined", site="lyon")
    assert "the journal of lyon was rolled back" in quarantined.event.words
    (view,) = [view for view in hub.asked("sites") if view["name"] == "lyon"]
    assert "rolled back" in view["quarantine"]
    hub.asked("site", "release", "lyon")
    assert hub.asked("run", hub.job())["state"] == "finished"
    assert daemon.end() == 128 + signal.SIGTERM
    agent.end()
