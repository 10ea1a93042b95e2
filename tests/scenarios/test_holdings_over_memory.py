"""What becomes of a model that is registered: it is taken along whole, it is erased for good, and rules say by whom."""

import hashlib
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file

from atoll.console.client import Client
from atoll.console.exports import export
from atoll.console.host import Address, serve
from atoll.errors import Denied, Invalid, NotFound, Unapproved, Unavailable
from atoll.journal import Journal
from atoll.policy.defaults import HUB_POLICY
from atoll.registry.blobs import Blobs
from atoll.runtime.hub import Hub
from atoll.runtime.record import what_was_live
from atoll.spec.job import parse_job
from atoll.spec.model import Deployment
from atoll.spec.run import DeploymentView
from atoll.spec.user import LOCAL
from tests.scenarios.worlds import BATCH, BUNDLE, SIZE, STEPS, WAIT, started
from tests.undeployed import NothingDeployed
from tests.unit.people import ADA, BOB
from tests.unit.places import eventually

BY_TWO = """
@id("hub.erase-by-two") @approval("operator")
permit (principal, action == Action::"erase", resource) when { principal.roles.contains("scientist") };
"""


class Answering(NothingDeployed):
    """A deployer whose replicas answer nobody."""

    def __init__(self):
        self.found, self.may_answer = {}, threading.Event()
        self.may_answer.set()

    def start(self, deployment, model, bundle, weights, columns, pretrained=None):
        view = DeploymentView(name=deployment.name, model=deployment.model, url="", state="starting")
        self.found[deployment.name] = view
        assert self.may_answer.wait(WAIT)
        self.found[deployment.name] = view.model_copy(update={"state": "answering"})
        return self.found[deployment.name]

    def stop(self, name):
        return self.found.pop(name)

    def views(self):
        return tuple(self.found.values())


def job():
    fields = {"kind": "train", "name": "heart", "purpose": "care", "steps": STEPS, "batch": BATCH}
    fields |= {"task": {"file": "task.py", "name": "Task"}, "data": {"dataset": "rows"}, "layout": {"data": 1}}
    return parse_job({**fields, "sync": {"preset": "fedavg", "period": STEPS}}, "job")


@pytest.fixture
def held(tmp_path):
    """A hub with three models, of which the second has the first one's weights, its client, and what it deploys."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "policy.cedar").write_text(HUB_POLICY + BY_TWO)
    deployer = Answering()
    with started(tmp_path, ["ada"], deployer) as world:
        for version in (1, 2, 3):
            if version == 3:
                world.aim("ada", np.ones(SIZE, np.float32))
            assert world.end(world.hub.submit(job(), BUNDLE, LOCAL)).state == "finished"
        server = serve(world.hub, "secret")
        with Client(Address(server.url, "secret", embedded=False, close=lambda: None)) as client:
            yield world.hub, client, deployer
        server.close()


def test_a_model_is_taken_along_whole_and_others_can_read_it(held, tmp_path):
    hub, client, _ = held
    seen = []
    model = export(client, "heart@3", tmp_path / "out" / "heart", lambda done, size: seen.append((done, size)))
    folder = tmp_path / "out" / "heart"
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS",
        "code",
        "lineage.json",
        "model.json",
        "model.safetensors",
    ]
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0
    data = (folder / "model.safetensors").read_bytes()
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == model.weights
    assert seen[-1] == (len(data), len(data))
    assert [tuple(array.shape) for array in load_file(folder / "model.safetensors").values()]
    assert (folder / "code" / "task.py").read_text() == BUNDLE.files["task.py"]
    assert list((tmp_path / "out").iterdir()) == [folder], "nothing half done is left beside it"
    with pytest.raises(Invalid, match="is there already"):
        export(client, "heart@3", folder)
    with pytest.raises(Denied, match=r"hub\.export"):
        hub.holdings.weights("heart@3", ADA)
    with Journal(hub.home / "hub" / "journal.db", "hub", read_only=True) as journal:
        asked = [entry.event for entry in journal.entries(kinds=("decision",)) if entry.event.action == "export"]
    assert {(event.request.user, event.subject, event.decision.allowed) for event in asked} == {
        ("local", "heart@3", True),
        ("ada", "heart@3", False),
    }


def test_an_erased_model_is_gone_with_its_weights_and_names_and_its_lineage_stays(held):
    hub, client, deployer = held
    blobs, weights = Blobs(hub.home / "hub" / "blobs"), {model.version: model.weights for model in client.models()}
    assert weights[1] == weights[2] != weights[3]
    client.promote("heart@3", "champion")
    hub.deploying.deploy(Deployment(name="ward", model="heart@champion"), LOCAL)
    with pytest.raises(Invalid, match=r"heart@3 answers as 'ward'; stop it first: atoll undeploy ward"):
        client.erase("heart@3")
    client.undeploy("ward")
    data = blobs.get(weights[3])
    client.erase("heart@3")
    assert [model.version for model in client.models()] == [1, 2]
    assert client.aliases() == {"heart": {}}
    assert not blobs.has(weights[3])
    with pytest.raises(NotFound, match=r"heart@3 was erased by local on .* UTC; its lineage is kept"):
        client.model("heart@3")
    assert client.model("heart").version == 2
    tree = client.lineage("heart@3")
    assert tree.erased.startswith("erased by local on ")
    assert np.isfinite(list(tree.model.metrics.values())).all()
    client.erase("heart@1")
    assert blobs.has(weights[2]), "another version has the very same"
    client.erase("heart@2")
    assert not blobs.has(weights[2])
    with pytest.raises(NotFound, match="all versions of 'heart' were erased"):
        client.model("heart")
    assert what_was_live(hub.home, float("inf")) == []
    blobs.put(data)  # as if the hub had been killed before it removed them
    hub.close()
    again = Hub(hub.home, deployer)
    try:
        assert not blobs.has(weights[3])
        assert again.models() == []
    finally:
        again.close()


def test_what_starts_is_ended_by_nobody_who_may_not_end_it_later(held):
    hub, client, deployer = held
    deployer.may_answer.clear()
    with ThreadPoolExecutor(1) as other:
        deploying = other.submit(hub.deploying.deploy, Deployment(name="ward", model="heart@3"), LOCAL)
        assert eventually(lambda: hub.deploying.views())
        with pytest.raises(Denied, match=r"hub\.models"):
            hub.deploying.undeploy("ward", ADA)
        with pytest.raises(Invalid, match="heart@3 answers as 'ward'; stop it first"):
            client.erase("heart@3")
        deployer.may_answer.set()
        assert deploying.result().state == "answering"
    with pytest.raises(NotFound, match="deployment: there is no 'wart'; did you mean 'ward'"):
        hub.deploying.undeploy("wart", LOCAL)


def test_a_replica_that_cannot_be_journalled_answers_nobody(held, monkeypatch):
    hub, _, deployer = held
    append = hub._journal.append

    def full(*events, actor):
        if any(event.kind == "deployment.started" for event in events):
            raise Unavailable("journal: no space left")
        return append(*events, actor=actor)

    monkeypatch.setattr(hub._journal, "append", full)
    with pytest.raises(Unavailable, match="no space left"):
        hub.deploying.deploy(Deployment(name="ward", model="heart@3"), LOCAL)
    assert (deployer.found, hub.deploying.views()) == ({}, [])
    monkeypatch.undo()
    assert hub.deploying.deploy(Deployment(name="ward", model="heart@3"), LOCAL).state == "answering"


def test_where_a_rule_wants_two_for_an_erasure_it_waits_for_the_second(held):
    hub, _, _ = held
    for user in (ADA, BOB):
        hub.users.put(user, "local")
    with pytest.raises(Unapproved, match="needs the approval of another operator"):
        hub.holdings.erase("heart@3", ADA)
    with pytest.raises(Denied):
        hub.holdings.erase("heart@3", BOB)
    [waiting] = hub.approvals.views()
    assert waiting.words.startswith("erase heart@3: ")
    assert [model.version for model in hub.models()] == [1, 2, 3]
    assert hub.approve(waiting.approval, waiting.digest, BOB).state == "approved"
    assert [model.version for model in hub.models()] == [1, 2]
