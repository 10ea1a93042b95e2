"""The API of a real hub without sites: found by its home, closed without the token, errors told as they were."""

import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from atoll.console.client import Client, connect
from atoll.console.host import attach, find
from atoll.errors import Invalid, NotFound, Unavailable
from atoll.spec.job import QueryJob, run_name
from atoll.spec.model import Deployment

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api") / "home"


@pytest.fixture(scope="module")
def hub(home: Path) -> Iterator[Client]:
    """A hub that is asked much and given nothing to do, so that all these tests may ask the same one."""
    with connect(home, sites=False) as client:
        yield client


def test_a_second_command_finds_the_first_ones_hub(hub: Client, home: Path):
    with connect(home, sites=False) as other:
        assert (other.address.url, other.address.embedded) == (hub.address.url, False)
        assert other.runs() == []
    assert hub.runs() == [], "closing a visitor leaves the hub as it is"
    for name in ("token", "address.json"):
        assert stat.S_IMODE((home / "hub" / name).stat().st_mode) == 0o600


def test_a_closed_hub_leaves_no_address_and_can_be_opened_again(tmp_path: Path):
    first = attach(tmp_path, sites=False)
    first.close()
    assert find(tmp_path) is None
    assert not (tmp_path / "hub" / "address.json").exists()
    second = attach(tmp_path, sites=False)
    second.close()
    assert second.token != first.token


def test_errors_come_back_as_the_class_they_were(hub: Client):
    with pytest.raises(NotFound, match="there is no 'heart-1'"):
        hub.run("heart-1")
    with pytest.raises(NotFound, match="heart"):
        hub.model("heart@1")
    with pytest.raises(NotFound, match="heart"):
        list(hub.follow("heart-1"))
    with pytest.raises(NotFound, match="heart"):
        hub.deploy(Deployment(name="heart", model="heart@1"))
    with pytest.raises(NotFound, match="atoll deploy"):
        hub.predict("heart", [{"age": 63}])
    with pytest.raises(NotFound, match="'oslo' is not in quarantine; `atoll sites` tells which are"):
        hub.release("oslo")
    with pytest.raises(Invalid, match="is no name"):
        hub.cancel("../models")
    with pytest.raises(Invalid, match="hours"):
        hub.invite("zurich", hours=-1)


def test_a_job_without_a_site_is_followed_to_its_failure(tmp_path: Path):
    job = QueryJob(name="ages", purpose="research", sql="SELECT count(*) FROM heart", dataset="heart")
    views = []
    with connect(tmp_path / "home", sites=False) as hub:
        last = hub.run_job(job, watch=views.append)
        assert last.state == "failed"
        assert "no site is connected" in last.words
        assert views[-1] == last
        assert [line["kind"] for line in hub.explain(last.run)][:2] == ["decision", "run.submitted"]
        assert [verdict.intact for verdict in hub.verify()] == [True]


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A hub that is given jobs; with no site each of them fails at once."""
    with connect(tmp_path_factory.mktemp("busy"), sites=False) as client:
        yield client


AGES = QueryJob(name="ages", purpose="research", sql="SELECT count(*) FROM heart", dataset="heart")


def test_what_policies_would_say_needs_sites_to_say_it(busy: Client):
    with pytest.raises(Unavailable, match="no site is connected"):
        busy.foresee(AGES)


def submissions(hub: Client, run: str) -> int:
    return [line["kind"] for line in hub.explain(run)].count("run.submitted")


def test_a_job_submitted_twice_under_one_name_is_one_run(busy: Client):
    name = run_name(AGES)
    assert [busy.submit(AGES, None, name), busy.submit(AGES, None, name)] == [name, name]
    assert submissions(busy, name) == 1
    assert busy.submit(AGES) != name
    with pytest.raises(Invalid, match=f"run: '{name}' is a run of another job"):
        busy.submit(AGES.model_copy(update={"dataset": "lung"}), None, name)
    with pytest.raises(Invalid, match="run: "):
        busy.submit(AGES, None, "../ages")


def test_one_name_at_the_same_time_is_one_run(busy: Client):
    name = run_name(AGES)
    threads = [threading.Thread(target=busy.submit, args=(AGES, None, name)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert submissions(busy, name) == 1


@pytest.mark.parametrize("arrived", [True, False])
def test_an_interrupted_submission_is_withdrawn_whether_or_not_it_arrived(busy: Client, arrived: bool):
    name = run_name(AGES)
    if arrived:
        busy.submit(AGES, None, name)
    view = busy.withdraw(AGES, None, name)
    assert (view.run, view.state in ("cancelled", "failed")) == (name, True)
    assert submissions(busy, name) == 1


def test_the_page_is_whole_strict_and_logs_in_once(hub: Client):
    with httpx.Client(base_url=hub.address.url, trust_env=False) as browser:
        shell = browser.get("/")
        assert "default-src 'none'" in shell.headers["content-security-policy"]
        assert "unsafe" not in shell.headers["content-security-policy"]
        assert "<script src=" in shell.text
        assert "style=" not in shell.text
        assert "innerHTML" not in browser.get("/app.js").text
        assert browser.get("/style.css").headers["content-type"].startswith("text/css")
        url = hub.login_url()
        answer = browser.get(url)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "SameSite=strict" in answer.headers["set-cookie"]
        assert hub.address.token not in answer.headers["set-cookie"]
        assert browser.get("/v1/runs").json() == []
        assert browser.post("/v1/resume").status_code == 401, "a cookie without our Origin changes nothing"
        assert browser.post("/v1/resume", headers={"Origin": hub.address.url}).json() == {"runs": []}
        assert httpx.get(url, trust_env=False).status_code == 403


def test_a_wrong_body_names_the_field(hub: Client):
    body = json.dumps({"job": {"kind": "query", "name": "Ages"}})
    headers = {"Authorization": f"Bearer {hub.address.token}", "Content-Type": "application/json"}
    answer = httpx.post(f"{hub.address.url}/v1/jobs", content=body, headers=headers, trust_env=False)
    assert answer.status_code == 422
    told = answer.json()["error"]
    assert (told["type"], told["exit_code"]) == ("Invalid", 2)
    assert "job.query.name: 'Ages'" in told["message"]
    assert "job.query.sql: " in told["message"]
