"""The hub's desk before strangers and liars: a site speaks for itself, for its own runs, and only while it is asked."""

import threading

import numpy as np
import pytest

from atoll.errors import AtollError, Denied, Invalid, LinkLost, NotFound, Unavailable
from atoll.outer.wire import encode
from atoll.policy.defaults import HUB_POLICY
from atoll.runtime.brought import checked
from atoll.runtime.machine import AssignTo, Merge
from atoll.runtime.state import State
from atoll.spec.event import Answer, Cancelled, ColumnSums, Crossed, Group, Planned, Restarted, Submitted
from atoll.spec.job import parse_job
from atoll.spec.message import Assign, Done, Failure, Notice, Parcel, Refusal
from atoll.spec.plan import Layout, Plan
from atoll.spec.sync import Sync
from tests.unit.houses import JOB, SIGNATURE, House, source, vector


def untouched(offset):
    raise AssertionError("a byte was taken")
    yield


# --- what sites bring


def test_an_update_is_stored_journalled_and_counted_before_its_receipt(house):
    house.run()
    house.bring("ada", house.parcel("run", "ada", examples=30))
    [kept] = house.conductor.states["run"].arrived
    assert (kept.site, kept.examples, kept.bytes) == ("ada", 30, 32)
    assert house.files("run").spool.holds((kept.position, "ada"), kept.update)
    crossing = house.crossings()[-1].crossing
    assert (crossing.kind, crossing.site, crossing.bytes, crossing.digest) == ("update", "ada", 32, kept.update)


def test_an_update_that_comes_again_gets_a_receipt_and_counts_once(house):
    house.run()
    parcel = house.parcel("run", "ada")
    house.bring("ada", parcel)
    house.desk.take("ada", parcel, untouched)
    assert len(house.conductor.states["run"].arrived) == 1


def test_an_update_of_an_epoch_or_a_stage_that_is_over_is_not_taken_and_fails_nothing(house):
    house.run()
    early = house.parcel("run", "ada", position=0)
    house.conductor.record(Restarted(run="run"))
    stale = house.parcel("run", "ada", epoch=0)
    for parcel in (early, stale):
        house.desk.take("ada", parcel, untouched)
    state = house.conductor.states["run"]
    assert (state.phase, state.arrived) == ("running", ())


def test_an_update_for_a_run_that_is_over_gets_a_receipt_and_one_that_waits_is_asked_for_again(house):
    house.run()
    parcel = house.parcel("run", "ada")
    house.conductor.here.clear()
    with pytest.raises(LinkLost, match="waits to be resumed"):
        house.desk.take("ada", parcel, untouched)
    house.conductor.record(Cancelled(run="run", user="ada"))
    house.desk.take("ada", parcel, untouched)
    assert house.conductor.here == set()


def test_nobody_answers_for_another_for_an_unknown_run_or_with_another_parcel(house):
    house.run()
    with pytest.raises(Denied, match="mallory: answers for 'ada'"):
        house.desk.take("mallory", house.parcel("run", "ada"), untouched)
    with pytest.raises(Denied, match="mallory: answers for 'ada'"):
        house.desk.heard("mallory", Done(run="run", answer=house.answer("run", "ada")))
    unknown = house.parcel("run", "ada").model_copy(update={"run": "other"})
    with pytest.raises(NotFound, match="there is no run 'other'"):
        house.desk.take("ada", unknown, untouched)
    for parcel in (Parcel(run="run", purpose="update", size=8), Parcel(run="run", purpose="code", size=8)):
        with pytest.raises(Invalid, match="is an update with its answer"):
            house.desk.take("ada", parcel, untouched)
    house.desk.take("mallory", house.parcel("run", "mallory"), untouched)  # has no part in it
    assert house.conductor.states["run"].arrived == ()


@pytest.mark.parametrize("change", [{"size": 9}, {"size": 1 << 40}, {"size": 0}, {"wire": ("int8",)}])
def test_an_update_of_another_size_or_wire_than_the_plans_is_refused_unread(house, change):
    house.run()
    parcel = house.parcel("run", "ada").model_copy(update=change)
    with pytest.raises(Invalid, match="where the plan has 8"):
        house.desk.take("ada", parcel, untouched)


def test_an_update_that_breaks_half_way_counts_for_nothing(house):
    def breaking(offset):
        raise LinkLost("the stream broke off")
        yield

    house.run()
    with pytest.raises(LinkLost):
        house.desk.take("ada", house.parcel("run", "ada"), breaking)
    spoiled = vector()
    spoiled[3] = np.inf
    frames = [type(frame)(frame.offset, frame.length, spoiled.tobytes()) for frame in encode(vector(), ())]
    with pytest.raises(Invalid, match="not finite"):
        house.desk.take("ada", house.parcel("run", "ada"), source(frames))
    assert house.conductor.states["run"].arrived == ()
    house.bring("ada", house.parcel("run", "ada"))
    assert len(house.conductor.states["run"].arrived) == 1


def test_all_updates_of_a_round_are_merged_together(house):
    house.run()
    for site in ("bob", "ada"):
        house.bring(site, house.parcel("run", site))
    house.settled()
    [*_, last] = [command for command in house.performed if isinstance(command, Merge)]
    assert [answer.site for answer in last.answers] == ["ada", "bob"]


def test_a_site_without_a_part_in_a_run_can_neither_refuse_nor_break_it(house):
    house.run()
    house.desk.heard("mallory", Refusal(run="run", words="no"))
    house.desk.heard("mallory", Failure(run="run", position=1, words="broken"))
    house.desk.heard("mallory", Failure(run="no-such-run", position=1, words="broken"))
    house.settled()
    assert house.conductor.states["run"].phase == "running"
    house.desk.heard("bob", Failure(run="run", position=1, words="loss is nan", error="TaskFailed"))
    house.settled()
    state = house.conductor.states["run"]
    assert (state.words, state.error) == ("bob: loss is nan", "TaskFailed")


def query(house, run="ask", sites=("bob",)):
    """Start a query, and return a function that makes a site's answer to it."""
    job = parse_job(
        {"kind": "query", "name": "ask", "purpose": "care", "sql": "select count(*) from rows", "dataset": "rows"},
        "job",
    )
    house.conductor.record(Submitted(run=run, user="ada", job=job))
    plan = Plan(sites=sites, layouts={site: Layout() for site in sites}, sync=Sync(), rounds=0)
    house.conductor.record(Planned(run=run, plan=plan))
    return lambda rows: Done(run=run, answer=house.answer(run, sites[0], groups=(Group(rows=rows),)))


def test_an_answer_without_tensors_that_comes_twice_at_once_counts_once(tmp_path):
    class Hurried(House):
        done = None

        def perform(self, state, command):
            super().perform(state, command)
            if isinstance(command, AssignTo) and self.done:  # the conductor's thread: nothing is folded meanwhile
                for _ in range(2):
                    self.desk.heard("bob", self.done(40))

    house = Hurried(tmp_path)
    house.connect("bob", "eve")
    house.done = query(house)
    house.desk.heard("bob", house.done(40))
    house.settled()
    house.settled()
    state = house.conductor.states["ask"]
    assert [answer.groups[0].rows for answer in (*state.arrived, *state.merging)] == [40]
    assert len(house.crossings()) == 1
    house.close()


def test_a_stream_that_broke_and_its_repeat_are_one_crossing_though_both_were_whole(house):
    def first(offset):
        yield from encode(vector(), ())
        repeat = threading.Thread(target=house.bring, args=("ada", parcel))
        repeat.start()
        repeat.join()  # while the first one ends, the second has come and gone

    house.run()
    parcel = house.parcel("run", "ada")
    before = len(house.crossings())
    house.desk.take("ada", parcel, first)  # a receipt: the very same counts already
    assert len(house.crossings()) - before == 1
    assert len(house.conductor.states["run"].arrived) == 1


# --- numbers that a site tells of itself


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"examples": 0}, "ada: examples: 0: stage 'train' has 1 to 32 there"),
        ({"examples": 33}, "ada: examples: 33: stage 'train' has 1 to 32 there"),
        ({"examples": 1 << 62}, "stage 'train' has 1 to 32 there"),
        ({"loss": 1e300}, r"ada: loss: 1e\+300: must be a finite number"),
    ],
)
def test_an_update_that_claims_what_its_round_cannot_give_is_refused_unread(house, more, words):
    house.run()
    with pytest.raises(Invalid, match=words):
        house.desk.take("ada", house.parcel("run", "ada", **more), untouched)
    assert house.conductor.states["run"].arrived == ()


def test_the_last_round_gives_no_more_examples_than_it_has_steps(house):
    house.run(period=60)  # of 100 steps: the second round has 40
    for site in ("ada", "bob"):
        house.bring(site, house.parcel("run", site, examples=60 * 32))
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    with pytest.raises(Invalid, match="stage 'train' has 1 to 1280 there"):
        house.desk.take("ada", house.parcel("run", "ada", examples=60 * 32), untouched)
    house.bring("ada", house.parcel("run", "ada", examples=40 * 32))
    assert len(house.conductor.states["run"].arrived) == 1


def test_an_answer_with_more_rows_than_the_dataset_ends_no_session_and_is_asked_for_again(house):
    done = query(house)
    house.desk.heard("bob", done(51))
    [rejected] = house.happened("run.rejected")
    assert rejected.words == "bob: rows: 51: its dataset has 50; look at what answers for that site"
    assert house.sent["bob"][-1] == Notice(words=f"run ask: not taken: {rejected.words}")
    house.settled()
    assert house.performed[-1] == AssignTo("bob")
    assert house.crossings() == []
    house.desk.heard("bob", done(50))
    house.settled()
    assert [command.answers[0].site for command in house.performed if isinstance(command, Merge)] == ["bob"]


def test_sums_of_more_rows_or_of_other_columns_than_asked_for_are_refused(house):
    def checking(sums):
        table = {"kind": "train", "name": "job", "purpose": "care", "task": {"file": "task.py", "name": "Task"}}
        job = parse_job({**table, "data": {"dataset": "rows", "statistics": ["age"]}}, "job")
        state = State(run="run", job=job, user="ada", phase="running", stages=("measure",))
        known = house.desk.presence.known("bob")
        checked(state, Answer(site="bob", position=0, epoch=0, sums=sums), known)

    many, right = (ColumnSums(count=count, total=1.0, squares=1.0) for count in (51, 50))
    checking({"age": right})
    with pytest.raises(Invalid, match="bob: rows: 51: its dataset has 50"):
        checking({"age": many})
    with pytest.raises(Invalid, match="sums of 'name', which the job's data"):
        checking({"age": right, "name": right})


# --- what sites fetch


def fetch(run, purpose, digest):
    return Parcel(run=run, purpose=purpose, size=0, digest=digest)


def test_weights_go_to_the_runs_sites_and_to_nobody_else(house):
    digest = house.run()
    header, frames = house.desk.give("bob", fetch("run", "weights", digest))
    assert header.size == 8
    assert b"".join(bytes(frame.data) for frame in frames) == vector().tobytes()
    for site, run in (("mallory", "run"), ("ada", "no-such-run")):
        with pytest.raises(Denied, match=f"{site}: has no part in run '{run}'"):
            house.desk.give(site, fetch(run, "weights", digest))


def test_weights_of_another_run_are_not_given_under_ones_own(house):
    secret = house.run("other", sites=("bob",))
    assert house.desk.give("bob", fetch("other", "weights", secret))
    house.bring("bob", house.parcel("other", "bob"))
    secret = house.merge("other", house.files("other").put_weights(vector(seed=9), SIGNATURE))
    house.run("run", sites=("ada",))
    with pytest.raises(LinkLost, match="its next assignment names others"):
        house.desk.give("ada", fetch("run", "weights", secret))


def test_what_is_fetched_again_after_a_broken_link_or_from_the_next_hub_is_one_crossing(house, tmp_path):
    digest = house.run()
    code = house.conductor.states["run"].code
    before = len(house.crossings())
    for _ in range(3):
        house.desk.give("bob", fetch("run", "weights", digest))
        house.desk.give("bob", fetch("run", "code", code))
    house.desk.give("ada", fetch("run", "weights", digest))
    given = [(one.crossing.site, one.crossing.kind, one.crossing.bytes) for one in house.crossings()[before:]]
    assert given == [("bob", "model", 32), ("bob", "code", 11), ("ada", "model", 32)]
    house.close()
    again = House(tmp_path)
    again.connect("bob")
    again.desk.give("bob", fetch("run", "weights", digest))
    assert len(again.crossings()) == before + 3
    again.close()


def test_who_asks_a_buffer_for_an_old_version_is_assigned_the_new_one(house):
    old = house.run(wait={"kind": "buffer", "count": 1})
    house.bring("ada", house.parcel("run", "ada"))
    house.merge("run", house.files("run").put_weights(vector(seed=2), SIGNATURE))
    house.settled()
    house.performed.clear()
    with pytest.raises(LinkLost, match="its next assignment names others"):
        house.desk.give("bob", fetch("run", "weights", old))
    house.settled()
    assert house.performed == [AssignTo("bob")]


def test_code_goes_to_those_who_were_given_work_with_it(house):
    house.run()
    code = house.conductor.states["run"].code
    _, frames = house.desk.give("bob", fetch("run", "code", code))
    assert b"".join(frame.data for frame in frames) == b"code of run"
    other = house.blobs.put(b"code of somebody else")
    for site, digest in (("mallory", code), ("bob", other)):
        with pytest.raises(Denied, match="belongs to no work that it was given"):
            house.desk.give(site, fetch("run", "code", digest))


def test_code_of_a_run_that_is_planned_anew_is_asked_for_again_by_the_probe_of_the_new_hub(house):
    code = house.blobs.put(b"code of planning")
    house.conductor.record(Submitted(run="planning", user="ada", job=JOB, code=code))
    with pytest.raises(LinkLost, match="run planning is being planned"):
        house.desk.give("bob", fetch("planning", "code", code))


def test_who_is_quicker_than_its_own_hello_to_a_hub_that_began_anew_tries_again(house, tmp_path):
    digest = house.run()
    house.close()
    again = House(tmp_path)
    again.conductor.record(Restarted(run="run"))
    again.desk.opened("bob", [].append)
    parcel = again.parcel("run", "bob")
    with pytest.raises(LinkLost, match="has not said yet what it is"):
        again.desk.give("bob", fetch("run", "weights", digest))
    with pytest.raises(LinkLost, match="has not said yet what it is"):
        again.bring("bob", parcel)
    assert again.happened("run.rejected", "run.broken") == []
    again.connect("bob")
    again.bring("bob", parcel)
    assert [event.answer.site for event in again.happened("run.answered")] == ["ada", "bob"]
    again.close()


def test_a_probe_opens_its_own_code_only_and_only_while_it_lasts(house):
    code, other = house.blobs.put(b"probed"), house.blobs.put(b"other")
    house.desk.questions.expect_probe("plan-1", "mallory", code)
    assert house.desk.give("mallory", fetch("plan-1", "code", code))
    for site, digest in (("mallory", other), ("ada", code)):
        with pytest.raises(Denied):
            house.desk.give(site, fetch("plan-1", "code", digest))
    house.desk.questions.abandon("the plan is made", run="plan-1")
    with pytest.raises(Denied):
        house.desk.give("mallory", fetch("plan-1", "code", code))


def test_what_is_fetched_is_named_by_its_digest_and_a_probe_is_bounded(house):
    with pytest.raises(Invalid, match="named by its digest"):
        house.desk.give("ada", Parcel(run="run", purpose="weights", size=0))
    _, frames = house.desk.give("ada", Parcel(run="probe", purpose="probe", size=1 << 50))
    assert sum(len(frame.data) for frame in frames) == 8 << 20


# --- probes, and the hub's own rules


def test_a_probe_ends_with_its_answer_its_refusal_its_failure_or_its_site(house):
    def probe():
        return house.desk.questions.expect_probe("plan-1", "bob", None)

    answer = Answer(site="bob", position=0, epoch=0)
    waiting = probe()
    house.desk.heard("bob", Done(run="plan-1", answer=answer))
    assert waiting.result(0) == answer
    waiting = probe()
    house.desk.heard("bob", Refusal(run="plan-1", words="bob refuses"))
    assert isinstance(waiting.exception(0), Denied)
    waiting = probe()
    house.desk.heard("bob", Failure(run="plan-1", position=0, words="no torch", error="TaskFailed"))
    assert isinstance(waiting.exception(0), AtollError)
    waiting = probe()
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    assert isinstance(waiting.exception(0), Unavailable)


def test_a_crossing_that_the_hubs_rules_forbid_is_journalled_and_takes_no_byte(tmp_path):
    forbid = 'forbid (principal, action == Action::"cross", resource) when { context.kind == "update" };'
    house = House(tmp_path, HUB_POLICY + f'\n@id("hub.none")\n@reason("no updates today")\n{forbid}\n')
    house.connect("ada", "bob")
    house.run()
    with pytest.raises(Denied, match="no updates today"):
        house.desk.take("ada", house.parcel("run", "ada"), untouched)
    refused = house.crossings()[-1]
    assert isinstance(refused, Crossed)
    assert (refused.crossing.site, refused.decision.allowed) == ("ada", False)
    assert house.conductor.states["run"].arrived == ()
    house.close()


def test_an_assignment_to_a_site_that_is_away_is_no_error(house):
    house.desk.closed("bob", house.sent["bob"].append, "killed")
    assign = Assign(run="run", epoch=0, position=0, work="train", job=JOB, sync=Sync())
    house.desk.presence.send("bob", assign)
    house.desk.presence.send("ada", assign)
    assert assign not in house.sent["bob"]
    assert house.sent["ada"][-1] == assign
