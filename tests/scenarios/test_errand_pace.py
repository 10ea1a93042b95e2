"""A site's pace on its way: told while it trains, kept with the round's answer, heeded in the next one's shares."""

import pytest

from atoll.errors import TaskFailed
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.errand import Errand
from atoll.runtime.reports import Reports
from atoll.spec.order import Reply
from atoll.spec.pace import Pace
from atoll.spec.plan import Layout
from atoll.spec.privacy import PrivateSteps
from atoll.spec.sync import Sync
from tests.unit.places import BATCH, STEPS, assign, honest, job

NO_METRICS = (
    SITE_POLICY + '\n@id("lyon.metrics")\nforbid (principal, action, resource) when { context.kind == "metric" };'
)
SLOW = Pace(steps=50, examples_per_second=40.0, step_seconds=(1.0, 3.0), loss=0.5, nodes=("alpha", "beta"))


def paced(order, group):
    return honest(order).model_copy(update={"pace": SLOW})


@pytest.fixture
def lyon(lyon):
    lyon.workers.answers["train"] = paced
    return lyon


def two(position=2, **compute):
    return assign(position=position, layout=Layout(data=2), job=job(batch=16, compute=compute))


def test_a_rounds_answer_has_its_pace_and_names_who_is_slow_and_no_other_machine(lyon, errand):
    errand.assign(two())
    answer = lyon.hub.wait_taken()[0].answer
    slow = "rank 1 on beta takes 3.0 times the median for an example"
    assert answer.pace == SLOW.model_copy(update={"nodes": (), "straggler": slow})


def test_the_next_rounds_batches_are_cut_by_what_this_one_took(lyon, errand):
    errand.assign(two())
    lyon.hub.wait_taken()
    errand.assign(two(3))
    lyon.hub.wait_taken(2)
    first, second = lyon.workers.did("train")
    assert first.shares == ()
    assert second.shares == (11, 5)


def test_shares_outlive_the_agent(lyon, errand):
    errand.assign(two())
    lyon.hub.wait_taken()
    errand.end(keep=True)
    assert errand.wait(20)
    again = Errand(lyon.place, "run")
    again.assign(two(3))
    lyon.hub.wait_taken(2)
    again.end(keep=True)
    assert again.wait(20)
    assert lyon.workers.did("train")[-1].shares == (11, 5)


def test_shares_that_the_job_wants_even_stay_so_and_the_slow_rank_is_told(lyon, errand):
    errand.assign(two(shares="even"))
    assert lyon.hub.wait_taken()[0].answer.pace.straggler.startswith("rank 1 on beta")
    errand.assign(two(3, shares="even"))
    lyon.hub.wait_taken(2)
    assert [order.shares for order in lyon.workers.did("train")] == [(), ()]


def test_an_owner_who_lets_no_metric_out_lets_no_pace_out(lyon, errand):
    lyon.policy = NO_METRICS
    errand.assign(two())
    assert lyon.hub.wait_taken()[0].answer.pace is None


def test_workers_that_tell_no_pace_change_nothing(lyon, errand):
    lyon.workers.answers["train"] = lambda order, group: Reply(**honest(order).model_dump(exclude_unset=True))
    errand.assign(two())
    assert lyon.hub.wait_taken()[0].answer.pace is None
    assert list((lyon.runs / "run").glob("balance-*")) == []


# --- told while it trains


def progressed(lyon, count):
    """Return what the hub is told of a step, each time by reports that have told nothing yet."""
    for step in range(1, count + 1):
        Reports(lyon.place).progress(assign(), "training", step, STEPS, SLOW)
    return [message for message in lyon.hub.heard_ if message.kind == "progress"]


def test_progress_has_a_pace_and_the_journal_one_crossing_of_it(lyon):
    found = progressed(lyon, 3)
    assert [message.step for message in found] == [1, 2, 3]
    assert {message.pace for message in found} == {SLOW.model_copy(update={"nodes": ()})}
    (crossed,) = lyon.crossings("metric")
    assert (crossed.crossing.rows, crossed.crossing.round, crossed.crossing.run) == (BATCH, None, "run")
    assert crossed.crossing.bytes == len(found[0].model_dump_json())


def test_progress_without_a_pace_is_told_where_no_metric_may_leave(lyon):
    lyon.policy = NO_METRICS
    assert [(message.step, message.pace) for message in progressed(lyon, 2)] == [(1, None), (2, None)]
    assert [crossed.decision.allowed for crossed in lyon.crossings("metric")] == [False]


WIRE = [{"kind": "clip", "value": 1.0}, {"kind": "noise", "value": 1.0}]
PRIVACY = {"noise": 2.0, "delta": 1e-3, "accountant": "rdp"}


@pytest.mark.parametrize(
    "noised",
    [assign(sync=Sync(period=STEPS, merge="mean", wire=WIRE)), assign(job=job(privacy=PRIVACY))],
    ids=["on the wire", "in each step"],
)
def test_beside_noise_no_pace_is_told_nor_kept_with_the_answer(lyon, errand, noised):
    Reports(lyon.place).progress(noised, "training", 1, STEPS, SLOW)
    (said,) = [message for message in lyon.hub.heard_ if message.kind == "progress"]
    assert (said.step, said.pace) == (1, None)
    errand.assign(noised)
    answer = lyon.hub.wait_taken()[0].answer
    assert (answer.loss, answer.pace) == (None, None)
    assert lyon.crossings("metric") == []


def test_beside_noise_a_failure_is_told_without_its_line_and_without_a_word_of_its_task(lyon):
    failed, known = TaskFailed("task.py: line 8: KeyError"), TaskFailed("loss is nan at step 3 of the run; mend it")
    known.bare = "…; mend it"
    for a in (assign(), assign(sync=Sync(period=STEPS, merge="mean", wire=WIRE)), assign(job=job(privacy=PRIVACY))):
        Reports(lyon.place).ended(a, failed)
        Reports(lyon.place).ended(a, known)
    open_, open_known, *hidden = [said.words for said in lyon.hub.heard_ if said.kind == "failure"]
    assert (open_, open_known) == (f"lyon: {failed}", f"lyon: {known}")
    unsaid = "lyon: the task failed at 'train'; its job hides the data: why is in the site's log alone"
    assert hidden == [unsaid, "lyon: …; mend it"] * 2


def test_progress_is_told_without_a_pace_when_the_dataset_is_gone(lyon):
    lyon.place.catalogue.remove("rows")
    assert [(message.step, message.pace) for message in progressed(lyon, 1)] == [(1, None)]
    assert lyon.crossings("metric") == []


def test_a_broken_link_costs_no_training(lyon):
    lyon.gate.hang_up()
    assert progressed(lyon, 1) == []


def test_workers_are_told_how_private_steps_are_taken_and_of_how_many_rows(lyon, errand):
    errand.assign(assign(job=job(privacy=PRIVACY)))
    lyon.hub.wait_taken()
    (order,) = lyon.workers.did("train")
    trained = 40  # of 50 rows, a fifth of which is held out
    assert order.private == PrivateSteps(clip=1.0, multiplier=2.0, sampling=BATCH / trained, rows=trained)
