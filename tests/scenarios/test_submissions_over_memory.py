"""What was submitted is what runs: under its own name, and about the version of the model that was meant then."""

import pytest

from atoll.errors import Invalid
from atoll.policy.defaults import HUB_POLICY
from atoll.runtime.hub import Hub
from atoll.spec.document import canonical
from atoll.spec.event import EVENT, Published, Submitted
from atoll.spec.job import parse_job
from atoll.spec.model import Bundle
from atoll.spec.policy import Decision
from atoll.spec.user import Submission
from tests.undeployed import NothingDeployed
from tests.unit.people import ADA, BOB
from tests.unit.runs import model, query_job

AGREED = HUB_POLICY.replace('@id("hub.submit")\n', '@id("hub.submit")\n@approval("operator")\n')


@pytest.fixture
def hub(tmp_path):
    made = Hub(tmp_path, NothingDeployed())
    for user in (ADA, BOB):
        made.users.put(user, "local")
    yield made
    made.close()


@pytest.fixture
def agreed(hub):
    """The hub, where an operator must agree to each job."""
    (hub.home / "hub" / "policy.cedar").write_text(AGREED)
    return hub


def publish(hub, version):
    """Register a version of the model `job`, of code of its own."""
    code = hub._blobs.put(canonical(Bundle(files={"t.py": f"x = {version}"})))
    made = model().model_copy(update={"version": version, "code": code})
    hub._conductor.record(Published(run=f"r-{version}", model=made))
    return made


def about(reference, kind="evaluate"):
    fields = {"kind": kind, "name": "check", "purpose": "care", "model": reference, "data": {"dataset": "rows"}}
    return parse_job(fields, "job")


def champion(hub, version):
    aliased = {"kind": "model.aliased", "model": "job", "alias": "champion", "version": version, "user": "local"}
    hub._conductor.record(EVENT.validate_python(aliased))


@pytest.mark.parametrize("kind", ["evaluate", "predict"])
@pytest.mark.parametrize("reference", ["job", "job@champion"])
def test_a_run_is_about_the_version_that_was_meant_when_it_was_submitted(hub, reference, kind):
    first = publish(hub, 1)
    champion(hub, 1)
    run = hub.submit(about(reference, kind), None, ADA, "run")
    publish(hub, 2)
    champion(hub, 2)
    state = hub._conductor.states[run]
    assert (state.job, state.code) == (about("job@1", kind), first.code)
    assert hub.submit(about(reference, kind), None, ADA, "run") == run, (
        "sent twice is one run, whatever it means by now"
    )
    with pytest.raises(Invalid, match="'run' is a run of another job"):
        hub.submit(about("job@2", kind), None, ADA, "run")
    later = hub._conductor.states[hub.submit(about(reference, kind), None, ADA)]
    assert later.job.model == "job@2"


def test_what_was_approved_is_the_version_that_was_shown(agreed):
    first = publish(agreed, 1)
    run = agreed.submit(about("job"), None, ADA)
    [asked] = agreed.approvals.views()
    assert (asked.wanted.job.model, asked.wanted.code) == ("job@1", first.code)
    publish(agreed, 2)
    assert agreed.submit(about("job"), None, ADA, run) == run
    agreed.approve(asked.approval, asked.digest, BOB)
    state = agreed._conductor.states[run]
    assert (state.job.model, state.code) == ("job@1", first.code)


def test_a_request_that_an_older_hub_kept_without_a_version_is_asked_for_again(agreed):
    code = publish(agreed, 1).code
    wanted = Submission(run="run", job=about("job"), code=code)
    asked = agreed.approvals.keep(ADA, wanted, Decision(allowed=False, party="hub", approvers=("operator",)))
    with pytest.raises(Invalid, match="'job' names no version, as 'job@1' does; reject this and ask for it again"):
        agreed.approve(asked.approval, asked.digest, BOB)
    assert "run" not in agreed._conductor.states


def test_a_request_that_waits_under_a_name_takes_the_place_of_no_run(agreed):
    agreed.submit(query_job(), None, ADA, "run")
    [asked] = agreed.approvals.views()
    with pytest.raises(Invalid, match="'run' is a run of another job"):
        agreed.submit(query_job(), None, BOB, "run")
    agreed._conductor.record(Submitted(run="run", user="local", job=about("job@1")))
    begun = agreed._conductor.states["run"]
    with pytest.raises(Invalid, match="'run' has begun as another job; reject this, and ask under another name"):
        agreed.approve(asked.approval, asked.digest, BOB)
    assert agreed._conductor.states["run"].job == begun.job
    assert agreed.approvals.views()[0].state == "waiting"
    assert agreed.approvals.reject(asked.approval, asked.digest, BOB).state == "rejected"
