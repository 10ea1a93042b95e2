"""From a run to an answering model, and the other kinds of job, over two sites, by the command line."""

import json
import signal
import socket

import duckdb
import httpx
import pyarrow.parquet as pq
import pytest
import yaml

from atoll.data.catalogue import Catalogue
from atoll.errors import Invalid, NotFound, Unavailable
from atoll.spec.document import sha256

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]
PURPOSE = "cardiology-research"


@pytest.fixture(scope="module")
def place(make_home, tmp_path_factory):
    """A hub that runs, with two sites made by the command line, and one trained model, risk@1."""
    home = make_home(tmp_path_factory.mktemp("deploy"))
    for name, rows in (("berlin", 60), ("oslo", 90)):
        home.atoll("site", "add", name, "--owner", f"{name} hospital")
        data = ("data", "add", "patients", str(home.data(name, rows=rows)), "--site", name)
        home.atoll(*data, "--purpose", PURPOSE, "--min-group", "5")
    hub = home.start("hub", "start")
    home.seen("site.connected", 2)
    view = home.asked("run", home.job())
    assert view["result"]["model"] == "risk@1"
    yield home
    hub.end()
    assert home.empty()


def write(home, name: str, **document) -> str:
    path = home.path / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "purpose": PURPOSE, **document}))
    return str(path)


def test_a_deployed_model_answers_over_http_with_its_name_version_and_digest(place):
    row = {"age": 66.0, "dose": 0.4}
    (model,) = place.asked("models")["models"]
    promoted = place.asked("promote", "risk@1", "production")
    assert (promoted["name"], promoted["version"]) == ("risk", 1)
    view = place.asked("deploy", "risk@production", "--name", "heart")
    assert (view["state"], view["model"]) == ("answering", "risk@1")
    reply = httpx.post(f"{view['url']}/predict", json={"rows": [row]}, timeout=30, trust_env=False)
    assert reply.status_code == 200
    answer = reply.json()
    assert (answer["model"], answer["version"], answer["digest"]) == ("risk", 1, model["weights"])
    assert 0 < answer["answers"][0]["risk"] < 1
    assert place.asked("predict", "heart", "--row", json.dumps(row)) == answer
    said = place.atoll("predict", "heart", "--row", '{"agee": 66, "dose": 0.4}', code=Invalid.exit_code)
    assert "age" in said
    place.atoll("undeploy", "heart")
    assert place.asked("deployments") == []


def test_a_port_in_use_is_told(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = place.atoll("deploy", "risk@1", "--port", port, code=Unavailable.exit_code)
        assert f"port: {port} cannot be had (Address already in use)" in said


def test_a_model_shows_its_lineage(place):
    (model,) = place.asked("models")["models"]
    tree = place.asked("models", "show", "risk@1")
    run = place.journal("run.submitted")[0].event
    assert tree["doubts"] == []
    assert (tree["origin"]["run"], tree["origin"]["job"]["name"]) == (run.run, "risk")
    assert tree["origin"]["plan"]["sites"] == ["berlin", "oslo"]
    assert tree["code"] == run.code == model["code"]
    fingerprints = {
        name: Catalogue(place.path / "sites" / name).entry("patients").dataset.fingerprint
        for name in ("berlin", "oslo")
    }
    assert {source["site"]: (source["fingerprint"], source["rows"]) for source in tree["sources"]} == {
        "berlin": (fingerprints["berlin"], 60),
        "oslo": (fingerprints["oslo"], 90),
    }
    assert any("berlin" in words for words in tree["decisions"])
    assert any("oslo" in words for words in tree["decisions"])


def test_a_query_over_two_sites_equals_the_pooled_answer_without_small_groups(place):
    sql = "SELECT sex, count(*) AS n, avg(age) AS mean, min(dose) AS low, max(dose) AS high, var_samp(age) AS spread "
    sql += "FROM patients GROUP BY sex ORDER BY sex"
    view = place.asked("query", sql, "--purpose", PURPOSE)
    files = [str(place.path / "data" / f"{name}.parquet") for name in ("berlin", "oslo")]
    with duckdb.connect() as engine:
        pooled = engine.execute(sql.replace("patients", f"read_parquet({files})")).fetchall()
    assert [row[0] for row in pooled] == ["f", "m", "x"]  # x is one patient at each site: no site tells of it
    assert view["result"]["columns"] == ["sex", "n", "mean", "low", "high", "spread"]
    for told, known in zip(view["result"]["rows"], pooled[:2], strict=True):
        assert told[:2] == list(known[:2])
        assert told[2:] == pytest.approx(known[2:], rel=1e-12)
    assert view["result"]["suppressed"] is False  # that there is such a group, of one patient, is not told either


def test_a_model_is_exported_and_another_version_of_it_is_erased(place):
    folder = place.path / "taken"
    told = place.asked("models", "export", "risk@1", "--out", str(folder))
    (model,) = place.asked("models")["models"]
    assert told == {"model": model, "folder": str(folder)}
    assert sha256((folder / "model.safetensors").read_bytes()) == model["weights"]
    assert "is there already" in place.atoll("models", "export", "risk@1", "--out", str(folder), code=Invalid.exit_code)
    view = place.asked("run", place.job())
    assert view["result"]["model"] == "risk@2"
    said = place.atoll("models", "erase", "risk", "--yes", code=Invalid.exit_code)
    assert "'risk' means risk@2 now; name the version to erase" in said
    assert "add --yes" in place.atoll("models", "erase", "risk@2", "--json", code=Invalid.exit_code)
    assert place.asked("models", "erase", "risk@2", "--yes") == {"erased": "risk@2", "aliases": []}
    assert place.asked("models")["models"] == [model]
    assert "risk@2 was erased by local" in place.atoll("deploy", "risk@2", code=NotFound.exit_code)
    assert place.asked("models", "show", "risk@2")["erased"].startswith("erased by local")


def test_predictions_stay_at_their_site_as_a_dataset(place):
    job = write(place, "answers", kind="predict", model="risk@1", data={"dataset": "patients"}, output="risks")
    view = place.asked("run", job)
    assert view["result"]["metrics"] == {"rows": 150.0}
    for name, rows in (("berlin", 60), ("oslo", 90)):
        entry = Catalogue(place.path / "sites" / name).entry("risks")
        assert (entry.dataset.rows, entry.dataset.purposes) == (rows, (PURPOSE,))
        assert all(0 < risk < 1 for risk in pq.read_table(entry.path)["risk"].to_pylist())
    crossed = place.asked("audit", "traffic", view["run"])
    assert {row["kind"] for row in crossed if row["direction"] == "out"} == {"metric"}
    place.seen("site.connected", 4)  # both sites have told of their new dataset
    mean = place.asked("query", "SELECT avg(risk) AS mean FROM risks", "--purpose", PURPOSE)
    assert 0 < mean["result"]["rows"][0][0] < 1


def test_a_registered_model_is_evaluated_where_the_data_lie(place):
    (model,) = place.asked("models")["models"]
    job = write(place, "again", kind="evaluate", model="risk@1", data={"dataset": "patients"})
    view = place.asked("run", job)
    assert view["result"]["metrics"] == model["metrics"]
    assert set(view["result"]["by_site"]) == {"berlin", "oslo"}


def test_without_a_hub_the_command_deploy_is_the_server_until_ctrl_c(place, eventually):
    assert place.started[4].end() == 128 + signal.SIGTERM  # `hub start`, after the commands that made two sites
    command = place.start("deploy", "risk@1", "--json")
    assert eventually(lambda: "until Ctrl-C" in command.said), command.said
    view = json.loads(command.out.read_text())
    assert httpx.get(f"{view['url']}/health", trust_env=False).status_code == 200
    assert command.end(signal.SIGINT) == 0
    assert "Traceback" not in command.said
    assert place.empty()
