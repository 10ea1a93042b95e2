"""A user all the way: name and roles reach a site's own rules and journal, and two people promote a model."""

import pytest

from atoll.errors import Denied, Unapproved, Unavailable
from atoll.journal import Journal
from atoll.policy.defaults import HUB_POLICY, SITE_POLICY
from atoll.runtime.hub import Hub
from atoll.spec.job import parse_job
from atoll.spec.model import Deployment
from atoll.spec.run import DeploymentView
from atoll.spec.user import User
from tests.scenarios.worlds import BATCH, BUNDLE, STEPS, started
from tests.undeployed import NothingDeployed
from tests.unit.people import ADA, BOB, TWO
from tests.unit.places import eventually

ONLY_SCIENTISTS = """
@id("bonn.scientists") forbid (principal, action, resource is Dataset)
unless { principal.roles.contains("scientist") };
"""


class Starting(NothingDeployed):
    """A deployer whose replicas answer nobody."""

    def __init__(self):
        self.fails, self.names = "no port", []

    def start(self, deployment, model, bundle, weights, columns, pretrained=None):
        if self.fails:
            return DeploymentView(name=deployment.name, model="", url="", state="failed", words=self.fails)
        self.names.append(deployment.model)
        return DeploymentView(name=deployment.name, model=deployment.model, url="", state="answering")

    def stop(self, name):
        return DeploymentView(name=name, model="", url="", state="stopped")


def job(name="job"):
    fields = {"kind": "train", "name": name, "purpose": "care", "steps": STEPS, "batch": BATCH, "layout": {"data": 1}}
    fields |= {"task": {"file": "task.py", "name": "Task"}, "data": {"dataset": "rows"}}
    return parse_job({**fields, "sync": {"preset": "fedavg", "period": STEPS}}, "job")


def test_sites_decide_about_who_really_asked_and_a_model_is_promoted_by_two(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "policy.cedar").write_text(HUB_POLICY + TWO)
    with started(tmp_path, ["ada", "bonn"]) as world:
        (tmp_path / "sites" / "bonn" / "policy.cedar").write_text(SITE_POLICY + ONLY_SCIENTISTS)
        for user in (ADA, BOB):
            world.hub.users.put(user, "local")
        assert eventually(lambda: len(world.hub.fleet().sites) == 2)
        alone = world.end(world.hub.submit(job("by-an-operator"), BUNDLE, BOB))
        assert alone.plan.sites == ("ada",)
        run = world.hub.submit(job(), BUNDLE, ADA)
        view = world.end(run)
        assert (view.state, view.user, view.plan.sites) == ("finished", "ada", ("ada", "bonn"))
        with Journal(tmp_path / "sites" / "bonn" / "journal.db", "bonn", read_only=True) as journal:
            asked = [entry.event.request for entry in journal.entries(kinds=("decision",), run=run)]
        assert {(request.user, request.roles, request.projects) for request in asked} == {
            ("ada", ("scientist",), ("default",))
        }
        reference = view.result.model
        with pytest.raises(Unapproved, match="needs the approval of another operator"):
            world.hub.holdings.promote(reference, "champion", ADA)
        assert world.hub.aliases()["job"] == {}
        with pytest.raises(Denied):
            world.hub.holdings.promote(reference, "champion", User(name="vic", roles=("viewer",)))
    started_here = Starting()
    again = Hub(tmp_path, started_here)  # what waits outlives the hub
    try:
        [waiting] = again.approvals.views()
        assert again.approve(waiting.approval, waiting.digest, BOB).state == "approved"
        assert again.aliases()["job"] == {"champion": 1}
        with pytest.raises(Unapproved):
            again.deploying.deploy(Deployment(name="answers", model="job@champion"), ADA)
        asked = again.approvals.views()[-1]
        with pytest.raises(Unavailable, match="no port"):
            again.approve(asked.approval, asked.digest, BOB)
        assert (again.approvals.views()[-1].state, started_here.names) == ("waiting", [])
        started_here.fails = ""
        assert again.approve(asked.approval, asked.digest, BOB).state == "approved"
        assert started_here.names == ["job@1"], "as it was when it was asked for"
        again.deploying.undeploy("answers", ADA)
    finally:
        again.close()
