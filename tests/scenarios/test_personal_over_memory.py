"""Layers that stay at their sites, in whole runs over the memory channel with real workers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.catalogue import Catalogue
from atoll.errors import Invalid
from atoll.inner.checkpoint import read_tensors
from atoll.journal import Journal
from atoll.registry.blobs import Blobs
from atoll.registry.weights import load
from atoll.spec.model import Bundle, Deployment
from atoll.spec.user import LOCAL
from tests import memory
from tests.laws.net import task
from tests.undeployed import NothingDeployed

HEAD = ("2.weight", "2.bias")
BODY = 4 * 6 + 6
BUNDLE = Bundle(files={"task.py": task(columns=4, hidden=6)})


def rows(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 4))
    slope = 3.0 if seed else -3.0  # what ada's and bob's heads must not agree on
    return pa.table({**{f"x{i}": column for i, column in enumerate(x.T)}, "y": slope * x[:, 0]})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("personal")


@pytest.fixture(scope="module")
def hub(home):
    with memory.world(home, {"ada": rows(0), "bob": rows(1), "cyd": rows(2)}, NothingDeployed()) as made:
        yield made


@pytest.fixture(scope="module")
def trained(hub):
    fields = {"name": "net", "task": {"file": "task.py", "name": "Net"}, "steps": 60, "batch": 16}
    data = {"dataset": memory.DATASET, "sites": ["ada", "bob"]}
    optimiser = {"kind": "sgd", "rate": 0.05}
    sync = {"preset": "fedavg", "period": 20, "keep_local": ["2.*"]}
    return memory.finished(
        hub, memory.job("train", **fields, data=data, optimiser=optimiser, layout={"data": 1}, sync=sync), BUNDLE
    )


@pytest.fixture(scope="module")
def model(hub, trained):
    return hub.model(trained.result.model)


def test_the_model_says_what_stayed_and_does_not_have_it(hub, home, model):
    assert model.keep_local == ("2.*",)
    assert [spec.name for spec in model.signature] == ["0.weight", "0.bias"]
    vector, _ = load(Blobs(home / "hub" / "blobs").get(model.weights), model.signature)
    assert len(vector) == BODY
    assert "not in it, for each site keeps its own: 2.*" in str(hub.lineage(model.reference).branch())


@pytest.mark.parametrize("site", ["ada", "bob"])
def test_nothing_that_stayed_ever_crossed(hub, home, trained, site):
    """By the site's own journal, which the agent writes before a byte leaves, and by what the hub heard."""
    journal = Journal(home / "sites" / site / "journal.db", site)
    crossings = [entry.event.crossing for entry in journal.entries(kinds=("crossing",), run=trained.run)]
    journal.close()
    tensors = [one for one in crossings if one.kind in ("update", "model", "data")]
    assert {one.bytes for one in tensors} == {4 * BODY}
    assert [one.kind for one in tensors if one.direction == "out"] == ["model"] * (site == "ada") + ["update"] * 3
    answers = [entry.event.answer for entry in hub._journal.entries(kinds=("run.answered",), run=trained.run)]
    assert {spec.name for answer in answers for spec in answer.signature} == {"0.weight", "0.bias"}


def test_each_site_has_its_own_and_they_differ(home, model):
    own = {}
    for site in ("ada", "bob"):
        own[site], _ = read_tensors(home / "sites" / site / "personal" / f"{model.lineage.run}.safetensors")
        assert set(own[site]) == set(HEAD)
    assert (own["ada"]["2.weight"] - own["bob"]["2.weight"]).abs().max() > 0.1


def test_a_job_about_the_model_scores_with_the_sites_own(hub, trained, model):
    """As the run itself did at its end; with each other's heads they would be wrong altogether."""
    data = {"dataset": memory.DATASET, "sites": ["ada", "bob"], "evaluate": ["ada", "bob"]}
    view = memory.finished(hub, memory.job("evaluate", model=model.reference, data=data), None)
    assert view.result.by_site == trained.result.by_site
    assert max(one["error"] for one in view.result.by_site.values()) < 1.5


def test_a_site_answers_rows_with_its_own(hub, home, model):
    data = {"dataset": memory.DATASET, "sites": ["ada"]}
    asked = memory.job("predict", model=model.reference, data=data, output="answers")
    assert memory.finished(hub, asked, None).result.metrics == {"rows": 60.0}
    entry = Catalogue(home / "sites" / "ada").entry("answers")
    found = np.array(pq.read_table(entry.path)["y"])
    assert np.corrcoef(found, np.array(rows(0)["y"]))[0, 1] > 0.9


def test_a_site_that_has_none_says_so(hub, model):
    data = {"dataset": memory.DATASET, "sites": ["cyd"], "evaluate": ["cyd"]}
    view = memory.ended(hub, memory.job("evaluate", model=model.reference, data=data), None)
    assert view.state == "failed"
    assert "this site has no tensors of its own (2.*) for the model" in view.words
    assert view.error == "NotFound"


def test_it_is_not_deployed(hub, model):
    with pytest.raises(Invalid, match=r"stayed at its sites \(2\.\*\), so no replica has the whole model; submit a"):
        hub.deploying.deploy(Deployment(name="net", model=model.reference), LOCAL)


def test_who_does_not_train_has_nothing_to_evaluate_with(hub):
    fields = {"name": "net", "task": {"file": "task.py", "name": "Net"}, "steps": 20, "layout": {"data": 1}}
    data = {"dataset": memory.DATASET, "sites": ["ada"], "evaluate": ["cyd"]}
    sync = {"preset": "fedavg", "keep_local": ["2.*"]}
    view = memory.ended(hub, memory.job("train", **fields, data=data, sync=sync), BUNDLE)
    assert "data.evaluate: cyd: does not train, so it has no tensors of its own" in view.words


def test_a_name_that_no_tensor_has_is_told_with_the_nearest(hub):
    fields = {"name": "net", "task": {"file": "task.py", "name": "Net"}, "steps": 20, "layout": {"data": 1}}
    data = {"dataset": memory.DATASET, "sites": ["ada"]}
    view = memory.ended(hub, memory.job("train", **fields, data=data, sync={"keep_local": ["2.wieght"]}), BUNDLE)
    assert "sync.keep_local: no tensor's name fits '2.wieght'; did you mean '2.weight'?" in view.words
