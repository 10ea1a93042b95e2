"""The agent: what it tells of itself, what a release drops, and whose mistakes do not end it."""

import threading

import pytest

from atoll.data.catalogue import Catalogue
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime import site as sites
from atoll.runtime.agent import Agent
from atoll.spec.fleet import Site
from atoll.spec.message import Notice, Release, Welcome
from tests.unit.places import Hub, Workers, assign, eventually, honest, until_closed


class Served:
    """The agent of a new site, at work for a hub in this process."""

    def __init__(self, home):
        self.home, self.hub, self.workers = home, Hub(), Workers()
        if not (home / "site.yaml").exists():
            sites.create(home, Site(name="lyon"), SITE_POLICY)
        self.agent = Agent(sites.read(home), home, self.workers)
        self.thread = threading.Thread(target=self.agent.serve_desk, args=(self.hub,))
        self.thread.start()
        assert eventually(lambda: self.hub.send is not None)

    def welcomed(self):
        self.hub.send(Welcome(heartbeat=2.0))
        return self.hub.wait("hello", count=1 + len([one for one in self.hub.heard_ if one.kind == "hello"]))

    def close(self):
        if not self.thread.is_alive():
            return
        self.agent.stop()
        self.hub.send(Release(run="none"))  # whatever wakes it: it looks only once a second by itself
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def serve(tmp_path, request):
    def served(home=tmp_path / "lyon"):
        made = Served(home)
        request.addfinalizer(made.close)
        return made

    return served


def add(home, name="rows"):
    file = home.parent / "rows.csv"
    file.write_text("age,rare\n" + "".join(f"{20 + row},\n" for row in range(50)))
    return Catalogue(home).add(name, file, purposes=("care",))


def test_a_new_session_hears_of_the_runs_that_have_a_folder(serve, tmp_path):
    for name in ("job-2", "job-1", "Not a run"):
        (tmp_path / "lyon" / "runs" / name).mkdir(parents=True)
    assert serve().welcomed().runs == ("job-1", "job-2")


def test_a_release_drops_the_folder_of_a_run_that_this_agent_never_worked_on(serve, tmp_path):
    runs = tmp_path / "lyon" / "runs"
    for name in ("job-1", "job-2"):
        (runs / name).mkdir(parents=True)
        (runs / name / "update-1.f32").write_bytes(b"1234")
    (runs / "elsewhere").symlink_to(tmp_path)
    served = serve()
    for run in ("job-1", "elsewhere", "unknown"):
        served.hub.send(Release(run=run))
    assert eventually(lambda: not (runs / "job-1").exists())
    assert served.welcomed().runs == ("job-2",)
    assert (runs / "elsewhere").is_symlink()
    assert (tmp_path / "lyon").is_dir()


def test_a_release_that_takes_its_time_holds_up_no_message(serve):
    served = serve()
    add(served.home)
    served.workers.answers["train"] = until_closed
    served.hub.send(assign())
    assert eventually(lambda: served.workers.did("train"))
    served.workers.may_close.clear()
    served.hub.send(Release(run="run"))
    assert served.welcomed().runs == ("run",)  # still ending
    served.workers.answers["train"] = honest
    served.hub.send(assign())
    served.hub.send(assign("query", run="other"))
    served.hub.wait("done")
    assert served.hub.taken == []
    served.workers.may_close.set()
    served.hub.wait_taken()


def test_closing_ends_work_and_keeps_what_the_run_has(serve):
    served = serve()
    add(served.home)
    served.workers.answers["train"] = until_closed
    served.hub.send(assign())
    assert eventually(lambda: served.workers.did("train"))
    served.close()
    assert served.workers.closed == 1
    assert (served.home / "runs" / "run").is_dir()


def test_a_typo_in_the_catalogue_leaves_the_last_good_one_in_force_and_is_logged_once(serve, caplog):
    served = serve()
    add(served.home)
    assert len(served.welcomed().site.datasets) == 1
    file = served.home / "catalogue.yaml"
    good = file.read_text()
    file.write_text(good.replace("format:", "fromat:"))
    served.hub.send(assign())
    served.hub.wait_taken()  # the job works with the last good one
    assert len(served.welcomed().site.datasets) == 1
    assert caplog.text.count("did you mean 'format'") == 1
    file.write_text(good)
    add(served.home, "more")
    assert len(served.welcomed().site.datasets) == 2


def test_a_catalogue_that_is_wrong_at_the_start_is_an_empty_one_that_says_so(serve, tmp_path, caplog):
    home = tmp_path / "lyon"
    home.mkdir()
    (home / "catalogue.yaml").write_text("entries: [")
    served = serve()
    assert served.welcomed().site.datasets == ()
    assert "catalogue.yaml: line 1, column 11: not valid YAML" in caplog.text
    assert "(0 datasets)" in caplog.text


def test_what_the_hub_tells_the_owner_is_in_the_agents_log(serve, caplog):
    served = serve()
    served.hub.send(Notice(words="lyon: in quarantine until `atoll site release lyon`"))
    assert eventually(lambda: "the hub says: lyon: in quarantine until" in caplog.text)
