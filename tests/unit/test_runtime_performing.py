"""What a run's commands become: assignments that name the planned data, and a model whose lineage is the plan's.

Each test writes the journal of a run that a hub left behind, and has a new hub resume it.
"""

import time

import numpy as np
import pytest

from atoll.journal import Journal
from atoll.policy.defaults import HUB_POLICY
from atoll.registry.blobs import Blobs
from atoll.registry.weights import save
from atoll.runtime.files import RunFiles
from atoll.runtime.hub import Hub
from atoll.spec.document import sha256
from atoll.spec.event import Answer, Answered, Merged, Planned, Result, Submitted
from atoll.spec.fleet import Dataset, Fleet, Site
from atoll.spec.message import Ask, Assign, Decisions, Hello, Refusal
from atoll.spec.model import TensorSpec
from atoll.spec.plan import Layout, Plan
from atoll.spec.policy import Decision
from atoll.spec.sync import Sync
from atoll.spec.user import LOCAL
from tests.undeployed import NothingDeployed
from tests.unit.places import eventually
from tests.unit.runs import train_job

SIGNATURE = (TensorSpec(name="w", shape=(8,)),)
PLANNED, LATER = sha256(b"the rows planned with"), sha256(b"other rows of the same name")
JOB = train_job()


def rows(fingerprint=PLANNED, **columns):
    return Dataset(name="rows", rows=50, columns=columns, fingerprint=fingerprint, purposes=("care",))


def site(name, *datasets):
    return Site(name=name, datasets=datasets)


FLEET = Fleet(sites=(site("ada", rows(age="int64", chol="null")), site("bob", rows(age="int64", chol="double"))))


class Left:
    """The home of a hub that died in a run of one round, and the hub that goes on with it."""

    def __init__(self, home):
        self.home, self.hub = home, None
        (home / "hub").mkdir()

    def policy(self, text):
        (self.home / "hub" / "policy.cedar").write_text(text)

    def leave(self, *merged, fleet=FLEET, evaluators=(), layouts=None, rounds=1, **wait):
        """Journal a run whose stages were merged with these sites' answers, one tuple for each stage."""
        files = RunFiles(self.home / "hub" / "runs" / "run")
        weights = files.put_weights(np.arange(8, dtype=np.float32), SIGNATURE)
        code = Blobs(self.home / "hub" / "blobs").put(b"code")
        names = ("ada", "bob")
        sync = Sync.model_validate({"wait": wait})
        layouts = layouts or {name: Layout() for name in names}
        plan = Plan(sites=names, evaluators=evaluators, layouts=layouts, sync=sync, rounds=rounds)
        events = [
            Submitted(run="run", user="ana", roles=("scientist",), job=JOB, code=code),
            Planned(run="run", plan=plan, fleet=fleet),
        ]
        for position, sites in enumerate(merged):
            place = {"position": position, "epoch": 0, "version": max(0, position - 1)}
            events += [Answered(run="run", answer=Answer(site=name, **place)) for name in sites]
            told = {"weights": weights, "signature": SIGNATURE} if position < 2 else {"result": Result()}
            events.append(Merged(run="run", position=position, sites=sites, **told))
        with Journal(self.home / "hub" / "journal.db", "hub") as journal:
            journal.append(*events, actor="hub")
        return self

    def resume(self):
        self.hub = Hub(self.home, NothingDeployed())
        assert self.hub.resume() == ["run"]
        return self.hub

    def ended(self):
        """Return the run's view once it is over."""
        late = time.monotonic() + 20
        while time.monotonic() < late:
            view = self.hub.run("run")
            if view.state in ("finished", "failed"):
                return view
            time.sleep(0.005)
        raise AssertionError(f"the run did not end: {self.hub.run('run')}")

    def connect(self, name, *datasets):
        """Begin a session of a site; return what the hub sends it, which comes in another thread."""
        sent = []
        self.hub._desk.opened(name, sent.append)
        self.hub._desk.heard(name, Hello(site=site(name, *datasets)))
        return sent


@pytest.fixture
def left(tmp_path):
    made = Left(tmp_path)
    yield made
    if made.hub is not None:
        made.hub.close()


def sent_of(kind, sent, count=1):
    late = time.monotonic() + 20
    while time.monotonic() < late:
        found = [message for message in sent if isinstance(message, kind)]
        if len(found) >= count:
            return found
        time.sleep(0.005)
    raise AssertionError(f"no {kind.__name__} among {sent}")


def decided(home, action):
    with Journal(home / "hub" / "journal.db", "hub", read_only=True) as journal:
        return [e.event for e in journal.entries(kinds=("decision",)) if e.event.action == action]


# --- lineage


def test_a_model_published_with_no_site_connected_has_the_lineage_of_its_plan(left):
    hub = left.leave(("ada",), ("ada", "bob")).resume()
    assert left.ended().state == "finished"
    model = hub.model("job")
    assert [(s.site, s.dataset, s.fingerprint, s.rows) for s in model.lineage.sources] == [
        ("ada", "rows", PLANNED, 50),
        ("bob", "rows", PLANNED, 50),
    ]
    assert model.columns == {"age": "int64", "chol": "double"}
    assert hub.lineage("job").doubts == ()


def test_lineage_tells_the_data_planned_with_also_when_a_site_has_others_by_now(left):
    hub = left.leave(("ada",), ("ada", "bob"), evaluators=("ada",)).resume()
    left.connect("bob", rows(LATER, other="int64"))
    sent = left.connect("ada", rows(LATER, other="int64"))
    [assign, *_] = sent_of(Assign, sent)
    assert (assign.work, assign.fingerprint) == ("evaluate", PLANNED)
    done = Answer(site="ada", position=assign.position, epoch=assign.epoch, version=assign.version, examples=5)
    hub._conductor.post(Answered(run="run", answer=done))
    assert left.ended().state == "finished"
    assert {source.fingerprint for source in hub.model("job").lineage.sources} == {PLANNED}
    assert set(hub.model("job").columns) == {"age", "chol"}


def test_a_site_whose_answers_were_never_merged_is_no_source(left):
    hub = left.leave(("ada",), ("ada",), kind="buffer", count=1).resume()
    assert left.ended().state == "finished"
    assert [source.site for source in hub.model("job").lineage.sources] == ["ada"]
    assert hub.model("job").columns == {"age": "int64", "chol": "null"}


def test_a_journal_from_before_plans_had_a_fleet_names_no_data_rather_than_todays(left):
    hub = left.leave(("ada",), ("ada", "bob"), fleet=Fleet()).resume()
    assert left.ended().state == "finished"
    assert (hub.model("job").lineage.sources, hub.model("job").columns) == ((), {})


# --- assignments


def test_an_assignment_names_the_data_planned_with_and_a_refusal_of_others_registers_nothing(left):
    hub = left.leave(("ada",)).resume()
    sent = left.connect("ada", rows(LATER))
    [assign, *_] = sent_of(Assign, sent)
    assert (assign.work, assign.fingerprint) == ("train", PLANNED)
    hub._desk.heard("ada", Refusal(run="run", words="ada refuses: 'rows' is another dataset than the plan's"))
    view = left.ended()
    assert (view.state, view.error) == ("failed", "Denied")
    assert view.words == "ada refuses: 'rows' is another dataset than the plan's"
    assert hub.models() == []


def test_each_site_is_assigned_its_own_layout(left):
    left.leave(("ada",), layouts={"ada": Layout(data=2), "bob": Layout(data=3)}).resume()
    told = {name: sent_of(Assign, left.connect(name, rows()))[0].layout.ranks for name in ("ada", "bob")}
    assert told == {"ada": 2, "bob": 3}


@pytest.mark.parametrize(
    ("merged", "expected"),
    [
        ([], {"ada": None, "bob": None}),  # of ada only the first weights, which are no update
        ([("ada",)], {"ada": 1, "bob": None}),
        ([("ada",), ("bob",)], {"ada": 1, "bob": 2}),
        ([("ada",), ("bob",), ("ada",)], {"ada": 3, "bob": 2}),
    ],
)
def test_a_site_is_told_which_of_its_updates_was_merged_last(left, merged, expected):
    left.leave(("ada",), *merged, rounds=4, kind="buffer", count=1).resume()
    assigned = {name: sent_of(Assign, left.connect(name, rows()))[0] for name in ("ada", "bob")}
    assert {one.position for one in assigned.values()} == {1 + len(merged)}
    assert {name: one.counted for name, one in assigned.items()} == expected


def test_a_site_is_told_its_place_and_how_many_there_are_and_no_other_name(left):
    left.leave(("ada",), ("ada", "bob"), rounds=4).resume()
    told = {name: sent_of(Assign, left.connect(name, rows()))[0] for name in ("ada", "bob")}
    assert {name: (one.place, one.places) for name, one in told.items()} == {"ada": (0, 2), "bob": (1, 2)}
    assert "bob" not in told["ada"].model_dump_json()


def test_a_run_planned_without_a_fleet_assigns_no_fingerprint(left):
    left.leave(("ada",), fleet=Fleet()).resume()
    assert sent_of(Assign, left.connect("ada", rows(LATER)))[0].fingerprint is None


# --- release


def test_a_model_leaves_its_run_by_the_hubs_rules_and_the_decision_is_journalled_with_the_run(left):
    left.leave(("ada",), ("ada", "bob")).resume()
    assert left.ended().state == "finished"
    [asked] = decided(left.home, "release")
    assert (asked.run, asked.decision.allowed, asked.decision.rules) == ("run", True, ("hub.results-model",))
    assert asked.subject.startswith("job@1")


FREEZE = """
@id("hub.freeze")
@reason("no model is registered before the audit")
forbid (principal, action == Action::"release", resource)%s;
"""


@pytest.mark.parametrize("condition", ["", ' when { context.purpose == "care" }', ' when { resource.name == "job" }'])
def test_a_model_that_may_not_leave_its_run_ends_it_in_the_rules_words_and_is_not_registered(left, condition):
    left.policy(HUB_POLICY + FREEZE % condition)
    hub = left.leave(("ada",), ("ada", "bob")).resume()
    view = left.ended()
    assert (view.state, view.error) == ("failed", "Denied")
    assert "no model is registered before the audit" in view.words
    assert "hub.freeze" in view.words
    assert hub.models() == []
    [asked] = decided(left.home, "release")
    assert (asked.run, asked.decision.allowed) == ("run", False)


def test_a_rule_about_other_models_lets_this_one_out(left):
    left.policy(HUB_POLICY + FREEZE % ' when { resource.name == "other" }')
    left.leave(("ada",), ("ada", "bob")).resume()
    assert left.ended().state == "finished"


# --- a store without room


def block(home):
    """Put a file where the folder of the model's blob is to be; return its path."""
    digest = sha256(save(np.arange(8, dtype=np.float32), SIGNATURE))
    path = home / "hub" / "blobs" / digest[7:9]
    path.write_bytes(b"in the way")
    return path


def test_a_model_that_cannot_be_kept_for_as_long_as_the_run_has_patience_ends_it_in_words(left):
    left.leave(("ada",), ("ada", "bob"), patience=0.1)
    block(left.home)
    left.resume()
    view = left.ended()
    assert (view.state, view.error) == ("failed", "Unavailable")
    assert view.words.endswith("make the store usable and try again; it was tried for 0.1 s (sync.wait.patience)")
    assert left.hub.models() == []


def test_a_run_goes_on_once_its_model_can_be_kept(left):
    left.leave(("ada",), ("ada", "bob"))
    path = block(left.home)
    hub = left.resume()
    assert eventually(lambda: "make the store usable" in hub.run("run").words)
    assert hub.run("run").state == "running"
    path.unlink()
    assert left.ended().state == "finished"
    assert hub.model("job").version == 1


# --- the plan


def test_a_plan_waits_for_the_sites_that_were_there_when_its_job_was_submitted(left):
    with Journal(left.home / "hub" / "journal.db", "hub") as journal:
        submitted = Submitted(
            run="run", user="ana", roles=("scientist",), job=JOB, code=sha256(b"code"), holders=("ada", "bob")
        )
        journal.append(submitted, actor="ana")
    Blobs(left.home / "hub" / "blobs").put(b"code")
    left.resume()
    ada = left.connect("ada", rows())
    time.sleep(0.1)  # nothing tells that nothing is asked; in a hub that does not wait it is asked within this time
    assert not [message for message in ada if isinstance(message, Ask)]
    bob = left.connect("bob", rows())
    for number in (1, 2):  # a site that leaves in the middle is waited for, and all are asked again
        asked = sent_of(Ask, ada, number)[-1]
        allowed = tuple(Decision(allowed=True, party="ada") for _ in asked.requests)
        left.hub._desk.heard("ada", Decisions(number=asked.number, decisions=allowed))
        sent_of(Ask, bob)
        left.hub._desk.closed("bob", bob.append, "the link broke")
        bob = left.connect("bob", rows())
    assert left.hub.run("run").state == "planning"
    left.hub.cancel("run", LOCAL)


def test_runs_whose_plans_wait_for_sites_keep_no_other_from_its_merges(left):
    left.leave(("ada",), ("ada", "bob"))
    waiting = [f"run-{number}" for number in range(12)]
    with Journal(left.home / "hub" / "journal.db", "hub") as journal:
        submitted = {"user": "ana", "job": JOB, "code": sha256(b"code"), "holders": ("oslo",)}
        journal.append(*(Submitted.model_validate({"run": run, **submitted}) for run in waiting), actor="ana")
    left.hub = Hub(left.home, NothingDeployed())
    assert set(left.hub.resume()) == {"run", *waiting}
    assert left.ended().state == "finished"
    assert {left.hub.run(run).state for run in waiting} == {"planning"}


# --- under a quorum


def test_metrics_without_a_site_that_did_not_answer_in_time_say_so_in_the_result_and_the_lineage(left):
    wait = {"kind": "quorum", "count": 1, "deadline": 0.05}
    hub = left.leave(("ada",), ("ada", "bob"), evaluators=("ada", "bob"), **wait).resume()
    sent = left.connect("ada", rows())
    [assign, *_] = sent_of(Assign, sent)
    done = Answer(site="ada", position=assign.position, epoch=assign.epoch, version=assign.version, examples=5)
    hub._conductor.post(Answered(run="run", answer=done))
    view = left.ended()
    assert (view.state, view.result.missing, list(view.result.by_site)) == ("finished", ("bob",), ["ada"])
    assert hub.lineage("job").origin.missing == ("bob",)
    assert [source.site for source in hub.model("job").lineage.sources] == ["ada", "bob"]
