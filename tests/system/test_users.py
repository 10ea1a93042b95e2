"""People at a real hub: its owner makes a scientist and an operator, who come by their tokens and find their limits."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from atoll.console.cli import execute
from atoll.console.client import Client, connect
from atoll.console.host import attach, find
from atoll.console.login import given_token, log_in, log_out
from atoll.errors import Denied, Invalid, NotFound, Unapproved, Unavailable
from atoll.journal import Journal
from atoll.policy.defaults import HUB_POLICY
from atoll.spec.job import QueryJob, run_name
from atoll.spec.model import Deployment
from atoll.spec.user import Project

pytestmark = pytest.mark.system

AGES = QueryJob(name="ages", purpose="research", sql="SELECT count(*) FROM heart", dataset="heart")
LUNGS = AGES.model_copy(update={"name": "lungs", "project": "lung"})
TWO = """
@id("two.lung") @approval("operator") permit (principal, action == Action::"submit", resource)
when { principal.roles.contains("auditor") && resource.project == "lung" };
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("users") / "home"
    (path / "hub").mkdir(parents=True)
    (path / "hub" / "policy.cedar").write_text(HUB_POLICY + TWO)
    return path


@pytest.fixture(scope="module")
def owner(home: Path) -> Iterator[Client]:
    with connect(home, sites=False) as client:
        client.people.put_project(Project(name="lung"))
        yield client


def of(owner: Client, home: Path, name: str, *roles: str, scope: str = "all", projects: tuple[str, ...] = ()) -> Client:
    """Return the hub as a user sees it who has a token of their own."""
    owner.people.put(name, roles, ("default", *projects))
    return connect(home, sites=False, token=owner.people.token(name, scope=(scope,)))


def who_asked(home: Path, kind: str) -> list[tuple[str, str]]:
    with Journal(home / "hub" / "journal.db", "hub", read_only=True) as journal:
        return [(entry.event.kind, entry.actor) for entry in journal.entries(kinds=(kind,))]


def test_a_scientist_submits_and_cannot_promote_deploy_invite_or_make_users(owner: Client, home: Path):
    with of(owner, home, "ada", "scientist") as ada:
        view = ada.run_job(AGES)
        assert (view.user, view.state) == ("ada", "failed")
        assert ("run.submitted", "ada") in who_asked(home, "run.submitted")
        for refused in (
            lambda: ada.invite("zurich"),
            lambda: ada.revoke("zurich"),
            lambda: ada.people.users(),
            lambda: ada.people.token("ada"),
            lambda: ada.people.put("ada", ["owner"]),
            lambda: ada.people.revoke("ada"),
            lambda: ada.resume(),
            lambda: ada.verify(),
            lambda: ada.explain(view.run),
        ):
            with pytest.raises(Denied, match=r"hub refuses: user 'ada' has (none|no role)"):
                refused()
        with pytest.raises(Denied, match="'lung' is not among"):
            ada.submit(LUNGS)
        with pytest.raises(NotFound):
            ada.deploy(Deployment(name="heart", model="heart@1"))
        assert ada.people.me()["user"]["roles"] == ["scientist"]


def test_anothers_run_is_an_operators_to_cancel_and_not_a_scientists(owner: Client, home: Path):
    held = run_name(AGES)
    with of(owner, home, "ana", "auditor", projects=("lung",)) as ana, of(owner, home, "ada", "scientist") as ada:
        ana.submit(LUNGS, None, held)
        with pytest.raises(Denied, match="'ada'"):
            ada.cancel(held)
        assert ana.cancel(held).words.startswith("ana rejected")


def test_a_token_to_read_does_not_submit_though_its_user_may(owner: Client, home: Path):
    with of(owner, home, "olga", "operator", scope="read") as olga:
        assert olga.runs() is not None
        assert [verdict.intact for verdict in olga.verify()] == [True]
        with pytest.raises(Denied, match="its scope leaves view, audit to it, and this is submit"):
            olga.submit(AGES)


def test_what_two_people_are_wanted_for_waits_and_goes_on_when_another_agrees(owner: Client, home: Path):
    run, seen = run_name(LUNGS), []
    with (
        of(owner, home, "ana", "auditor", "operator", projects=("lung",)) as ana,
        of(owner, home, "bob", "operator") as bob,
    ):
        owner.people.put("ana", ["auditor"], ["lung"])
        assert ana.submit(LUNGS, None, run) == run
        [asked] = [view for view in bob.people.approvals() if view.state == "waiting"]
        owner.people.put("ana", ["auditor", "operator"], ["default"])
        with pytest.raises(Denied, match="nobody approves what they asked for themselves"):
            ana.people.answer(asked, approve=True)
        owner.people.put("ana", ["auditor"], ["lung"])
        for view in ana.follow(run):
            seen.append(view.state)
            if view.state == "waiting" and len(seen) == 1:
                assert f"(they run: atoll approve {asked.approval})" in view.words
                assert bob.people.answer(asked, approve=True).by == "bob"
        assert seen[0] == "waiting"
        assert seen[-1] == "failed", "there is no site"
        assert bob.run(run).user == "ana"
        with pytest.raises(Invalid, match="is approved"):
            bob.people.answer(asked, approve=True)
        kinds = [line["kind"] for line in bob.explain(run)]
        assert [kinds.count(kind) for kind in ("approval.asked", "approval.answered", "run.submitted")] == [1, 1, 1]
        rejected = run_name(LUNGS)
        ana.submit(LUNGS, None, rejected)
        [asked] = [view for view in bob.people.approvals() if view.state == "waiting"]
        bob.people.answer(asked, approve=False)
        last = ana.wait(rejected)
        assert (last.state, last.error) == ("failed", Unapproved.__name__)


def test_a_project_has_no_more_runs_than_its_quota(owner: Client, home: Path):
    owner.people.put_project(Project(name="small", runs_per_day=1))
    with of(owner, home, "sam", "scientist", projects=("small",)) as sam:
        small = AGES.model_copy(update={"project": "small"})
        sam.run_job(small)
        with pytest.raises(Denied, match="project small: 1 of 1 runs within 24 hours"):
            sam.submit(small)
        sam.run_job(AGES)
        [view] = [view for view in sam.people.projects() if view.project.name == "small"]
        assert view.runs == 1


def test_a_revoked_token_ends_commands_and_the_browsers_session(owner: Client, home: Path):
    with of(owner, home, "rob", "viewer") as rob, httpx.Client(base_url=rob.address.url, trust_env=False) as browser:
        browser.get(rob.login_url())
        me = browser.get("/v1/me").json()
        assert (me["user"]["name"], me["user"]["roles"]) == ("rob", ["viewer"])
        origin = {"Origin": rob.address.url}
        assert browser.post("/v1/resume", headers=origin).status_code == 403
        assert browser.get("/v1/traffic").status_code == 403
        assert len(owner.people.revoke("rob")) == 1
        assert browser.get("/v1/me").status_code == 401
        with pytest.raises(Denied, match="revoked"):
            rob.runs()


def test_a_login_is_kept_for_the_hub_that_proves_to_have_made_the_token(owner: Client, home: Path, tmp_path: Path):
    owner.people.put("lea", ["viewer"])
    token = owner.people.token("lea")
    log_in(tmp_path, owner.address.url, token)
    assert stat.S_IMODE((tmp_path / "login.json").stat().st_mode) == 0o600
    with connect(tmp_path, sites=False) as lea:
        assert (lea.people.me()["user"]["name"], lea.address.embedded) == ("lea", False)
    kept = json.loads((tmp_path / "login.json").read_text())
    (tmp_path / "login.json").write_text(json.dumps({**kept, "key": "00" * 32}))
    with pytest.raises(Unavailable, match="does not answer"):
        find(tmp_path)
    assert log_out(tmp_path)
    assert find(tmp_path) is None
    with pytest.raises(Unavailable, match="no hub runs there for this token"):
        attach(tmp_path, sites=False, token=token)
    other = attach(tmp_path / "other", sites=False)
    try:
        with pytest.raises(Denied, match="did not make the token"):
            log_in(tmp_path, other.url, token)
    finally:
        other.close()
    with pytest.raises(Invalid, match=r"is not http://127\.0\.0\.1:PORT"):
        log_in(tmp_path, "http://hub.example.org:80", token)
    file = tmp_path / "token"
    file.write_text(token)
    file.chmod(0o644)
    with pytest.raises(Denied, match="others can read this token"):
        given_token(file)
    file.chmod(0o600)
    assert given_token(file) == token


def atoll(home: Path, *words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as end:
        execute(["--home", str(home), *words])
    assert end.value.code == code, words


def test_the_commands_do_it_too(
    owner: Client, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = str(tmp_path / "cleo.token")
    atoll(home, "user", "add", "cleo", "--role", "scientist")
    atoll(home, "user", "add", "cleo", "--role", "owner", code=2)
    assert "'cleo' is one already" in capsys.readouterr().err
    atoll(home, "user", "token", "cleo", "--hours", "1", "--scope", "submit", "--out", file)
    told = capsys.readouterr()
    token = Path(file).read_text().strip()
    assert token not in told.out + told.err
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600
    atoll(home, "user", "list", "--json")
    [cleo] = [one for one in json.loads(capsys.readouterr().out) if one["user"]["name"] == "cleo"]
    assert [one["scope"] for one in cleo["tokens"]] == [["submit"]]
    atoll(home, "--token-file", file, "runs")
    atoll(home, "user", "list", "--token-file", file, code=3)
    assert "this is administer" in capsys.readouterr().err
    monkeypatch.setenv("ATOLL_TOKEN", token)
    atoll(home, "audit", "explain", "run-1", code=3)
    atoll(tmp_path, "login", "--hub", owner.address.url)
    assert "You are cleo (scientist)" in capsys.readouterr().err
    monkeypatch.delenv("ATOLL_TOKEN")
    atoll(tmp_path, "approvals")
    atoll(tmp_path, "project", "list")
    assert "default" in capsys.readouterr().out
    atoll(home, "user", "role", "cleo", "--role", "auditor")
    atoll(home, "user", "revoke", "cleo")
    capsys.readouterr()
    atoll(tmp_path, "runs", code=3)
    assert "revoked" in capsys.readouterr().err
    atoll(tmp_path, "logout")
    atoll(home, "project", "set", "cleos", "--runs-at-once", "1")
    atoll(home, "approve", "ask-none", code=2)
    atoll(home, "user", "remove", "cleo")
    with pytest.raises(NotFound):
        owner.people.token("cleo")
