"""The site's side of a run: what workers say is held to their orders, and whatever breaks costs no training."""

import json

import numpy as np
import pytest

from atoll.data.batches import split
from atoll.data.statistics import column_sums
from atoll.errors import TaskFailed, Unavailable
from atoll.policy.defaults import SITE_POLICY
from atoll.runtime.errand import Errand
from atoll.spec.document import WORDS_LIMIT
from atoll.spec.event import Totals
from atoll.spec.order import Reply
from tests.unit.places import (
    AGES,
    BATCH,
    DIGEST,
    PROFILE,
    ROWS,
    SIGNATURE,
    SIZE,
    STEPS,
    WEIGHTS,
    assign,
    eventually,
    honest,
    job,
    until_closed,
    update,
)

ZERO = "sha256:" + 64 * "0"
NO_METRICS = (
    SITE_POLICY + '\n@id("lyon.metrics")\nforbid (principal, action, resource) when { context.kind == "metric" };'
)


# --- a round


def test_a_round_brings_its_update_with_what_the_worker_did(lyon, errand):
    errand.assign(assign())
    parcel, vector = lyon.hub.wait_taken()
    assert np.array_equal(vector, update())
    answer = parcel.answer
    assert (answer.site, answer.position, answer.examples, answer.loss) == ("lyon", 2, STEPS * BATCH, 0.5)
    assert lyon.hub.given == ["weights", "code"]
    assert [(decided.run, decided.action) for decided in lyon.decisions()] == [("run", "plan"), ("run", "open")]
    (crossed,) = lyon.crossings("update")
    assert (crossed.crossing.bytes, crossed.crossing.rows) == (4 * SIZE, STEPS * BATCH)


def test_an_update_that_a_broken_link_held_up_is_sent_again_and_neither_trained_nor_counted_twice(lyon, errand):
    lyon.hub.broken = 3  # weights and code come in, and the update goes out, at a second try each
    errand.assign(assign())
    lyon.hub.wait_taken()
    assert len(lyon.workers.did("train")) == 1
    for kind in ("update", "model", "code"):
        assert [crossed.crossing.bytes > 0 for crossed in lyon.crossings(kind)] == [True]


def test_rules_that_change_between_two_tries_hold_for_the_second(lyon, errand):
    lyon.workers.answers["train"] = lambda order, group: (setattr(lyon.hub, "broken", 10**6), honest(order))[1]
    errand.assign(assign())
    assert eventually(lambda: lyon.crossings("update"))
    lyon.policy = SITE_POLICY + '\n@id("lyon.closed")\nforbid (principal, action == Action::"cross", resource);'
    assert "lyon.closed" in lyon.hub.wait("refusal").words
    assert [crossed.decision.allowed for crossed in lyon.crossings("update")] == [True, False]
    assert lyon.hub.taken == []


def test_an_update_that_another_agent_kept_is_sent_without_training(lyon, errand):
    errand.assign(assign())
    lyon.hub.wait_taken()
    errand.end(keep=True)
    assert errand.wait(20)
    again = Errand(lyon.place, "run")
    again.assign(assign(epoch=1))
    _, vector = lyon.hub.wait_taken(2)
    again.end(keep=True)
    assert again.wait(20)
    assert np.array_equal(vector, update())
    assert len(lyon.workers.did("train")) == 1


def test_an_assignment_that_is_out_of_date_neither_counts_nor_takes_the_place_of_the_one_under_way(lyon, errand):
    lyon.hub.broken = 3
    errand.assign(assign(position=4, epoch=1))
    errand.assign(assign(position=3, epoch=1))
    errand.assign(assign(position=9, epoch=0))
    parcel, _ = lyon.hub.wait_taken()
    assert (parcel.answer.position, parcel.answer.epoch) == (4, 1)
    assert (lyon.runs / "run" / "epoch").read_text() == "1"
    errand.assign(assign(position=5, epoch=1))
    assert lyon.hub.wait_taken(2)[0].answer.position == 5
    assert [one for one in lyon.hub.heard_ if one.kind == "failure"] == []


def test_a_rank_that_died_between_two_orders_is_replaced(lyon, errand):
    errand.assign(assign())
    lyon.hub.wait_taken()
    started = lyon.workers.started

    def mended(order, group):
        if lyon.workers.started > started:
            return honest(order)
        raise Unavailable("worker: a rank ended by signal SIGKILL")

    lyon.workers.answers["open"] = mended
    errand.assign(assign(position=3))
    lyon.hub.wait_taken(2)
    assert lyon.workers.started == started + 1


# --- a worker's word


def wrong(**reply):
    return lambda order, group: (update().tofile(order.output), Reply(**{"examples": 12, "loss": 0.5, **reply}))[1]


def writes(vector):
    return lambda order, group: (vector.tofile(order.output), Reply(examples=12, loss=0.5))[1]


def spoiled(at, value):
    vector = update()
    vector[at] = value
    return vector


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (wrong(examples=13), "no loss, or not as many examples as 3 steps of 4 can have"),
        (wrong(examples=10**12), "not as many examples as 3 steps"),
        (wrong(loss=None), "no loss"),
        (writes(update()[:-1]), "28 bytes where the model has 32"),
        (writes(np.zeros(10**4, np.float32)), "40000 bytes where the model has 32"),
        (lambda order, group: Reply(examples=12, loss=0.5), "0 bytes where the model has 32"),
        (writes(spoiled(7, np.nan)), "tensor b has nan among its values"),
        (writes(spoiled(2, np.inf)), "tensor w has inf among its values"),
    ],
)
def test_an_update_is_held_to_its_order_before_it_goes_anywhere(lyon, errand, answer, words):
    lyon.workers.answers["train"] = answer
    errand.assign(assign(position=4))
    failure = lyon.hub.wait("failure")
    assert failure.error == "TaskFailed"
    assert failure.words.startswith("lyon: the update of steps 7 to 9 of the run: ")
    assert words in failure.words
    assert lyon.crossings("update") == []
    assert lyon.hub.taken == []


def test_first_weights_are_as_many_as_their_signature_says(lyon, errand):
    errand.assign(assign("initialise"))
    parcel, vector = lyon.hub.wait_taken()
    assert (parcel.answer.signature, parcel.size) == (SIGNATURE, SIZE)
    assert np.array_equal(vector, WEIGHTS)
    for position, (signature, numbers, words) in enumerate(
        [
            (SIGNATURE[:1], WEIGHTS, "lyon: the first weights: 32 bytes where the model has 24"),
            (SIGNATURE, spoiled(6, -np.inf), "lyon: the first weights: tensor b has -inf"),
        ],
        3,
    ):
        lyon.workers.answers["initialise"] = lambda order, group, signature=signature, numbers=numbers: (
            numbers.tofile(order.output),
            Reply(signature=signature),
        )[1]
        errand.assign(assign("initialise", position=position))
        assert lyon.hub.wait("failure", position=position).words.startswith(words)


def test_a_probes_answer_crosses_as_a_metric_that_stands_for_all_rows(lyon, errand):
    errand.assign(assign("probe", position=0))
    assert lyon.hub.wait("done").answer.profile == PROFILE
    (crossed,) = lyon.crossings("metric")
    assert (crossed.crossing.rows, crossed.decision.allowed) == (ROWS, True)
    assert crossed.crossing.bytes > 0


def test_a_probes_answer_that_may_not_leave_is_told_as_none(lyon, errand):
    lyon.policy = NO_METRICS
    errand.assign(assign("probe", position=0))
    assert lyon.hub.wait("done").answer.profile is None
    (crossed,) = lyon.crossings("metric")
    assert not crossed.decision.allowed


def test_a_metric_stands_for_no_more_rows_than_are_held_out(lyon, errand):
    lyon.workers.answers["evaluate"] = lambda order, group: Reply(
        examples=500, totals={"loss": Totals(total=9.0, count=500)}
    )
    errand.assign(assign("evaluate"))
    assert lyon.hub.wait("done").answer.examples == 500  # a task may cut one row into many examples
    assert lyon.crossings("metric")[0].crossing.rows == len(split(ROWS, 0.2, 0)[1])


def test_where_no_row_is_held_out_there_is_no_metric(lyon, errand):
    nothing = job("evaluate", data={"dataset": "rows", "holdout": 0.0})
    errand.assign(assign("evaluate", job=nothing))
    assert "where no row is held out" in lyon.hub.wait("failure").words
    lyon.workers.answers["evaluate"] = lambda order, group: Reply()
    errand.assign(assign("evaluate", job=nothing, position=3))
    assert lyon.hub.wait("done").answer.totals == {}


def test_predictions_are_counted_in_their_file_and_never_replace_an_owners_dataset(lyon, errand):
    errand.assign(assign("predict", job=job("predict", output="risks")))
    assert lyon.hub.wait("done").answer.examples == ROWS
    assert lyon.place.catalogue.entry("risks").dataset.purposes == ("care",)
    errand.assign(assign("predict", job=job("predict", output="rows"), position=3))
    assert "'rows' is the job's own source" in lyon.hub.wait("failure").words


def test_what_a_worker_says_at_length_is_cut(lyon, errand):
    def fails(order, group):
        raise TaskFailed("x" * 2 * WORDS_LIMIT)

    lyon.workers.answers["train"] = fails
    errand.assign(assign())
    assert len(lyon.hub.wait("failure").words) == WORDS_LIMIT


# --- what needs no worker


def test_sums_are_computed_without_a_worker_and_those_of_few_rows_stay(lyon, errand):
    errand.assign(assign("measure", position=0))
    sums = lyon.hub.wait("done").answer.sums
    train, _ = split(ROWS, 0.2, 0)
    expected = column_sums(lyon.place.catalogue.table("rows"), ["age"], train)["age"]
    assert sums["age"] == expected
    assert expected.count == len(train)
    assert (sums["rare"].count, sums["rare"].total) == (0, 0.0)  # three rows have it, and ten must
    assert lyon.workers.started == 0
    assert [decided.action for decided in lyon.decisions()] == ["plan", "open"]
    assert lyon.crossings("query")[0].crossing.rows == len(train)


@pytest.mark.parametrize("work", ["measure", "query", "probe", "train"])
def test_a_dataset_that_is_another_than_planned_is_refused_before_it_is_opened(lyon, errand, work):
    errand.assign(assign(work, fingerprint=ZERO))
    refusal = lyon.hub.wait("refusal")
    assert refusal.words.startswith("lyon refuses: dataset 'rows' is sha256:")
    assert refusal.words.endswith("submit the job again")
    assert (lyon.decisions(), lyon.workers.started) == ([], 0)


@pytest.mark.parametrize("work", ["measure", "query", "train"])
def test_a_file_that_changed_since_it_was_added_is_not_used(lyon, errand, work):
    lyon.write([*AGES, 99.0])
    errand.assign(assign(work, fingerprint=lyon.dataset.fingerprint))
    failure = lyon.hub.wait("failure")
    assert (failure.error, failure.words) == (
        "Corrupt",
        "lyon: dataset 'rows': its file changed since it was added; add it again",
    )
    assert (lyon.hub.taken, lyon.workers.did("open")) == ([], [])


def test_a_missing_column_is_told_by_the_field_that_names_it(lyon, errand):
    errand.assign(assign("measure", job=job(data={"dataset": "rows", "statistics": ["aeg"]})))
    assert lyon.hub.wait("failure").words == "lyon: data.statistics: there is no column 'aeg'; did you mean 'age'?"


# --- a full disk


def test_a_full_disk_is_waited_for_and_nothing_fails(lyon, errand):
    (lyon.runs / "run").mkdir(parents=True)
    full = lyon.runs / "run" / "update-2.json.part"
    full.symlink_to("/dev/full")  # whatever is written here finds no space left
    errand.assign(assign())
    assert lyon.hub.wait("progress", state="waiting: no disk space").position == 2
    full.unlink(missing_ok=True)
    lyon.hub.wait_taken()
    assert [one for one in lyon.hub.heard_ if one.kind == "failure"] == []


def test_weights_that_find_no_room_are_fetched_again_and_leave_no_part_behind(lyon, errand):
    (lyon.runs / "run").mkdir(parents=True)
    part = lyon.runs / "run" / f"weights-{DIGEST.removeprefix('sha256:')}.f32.part"
    part.symlink_to("/dev/full")
    errand.assign(assign())
    lyon.hub.wait_taken()
    lyon.hub.wait("progress", state="waiting: no disk space")
    assert lyon.hub.given == ["weights", "weights", "code"]
    assert len(lyon.crossings("model")) == 1
    assert not part.is_symlink()


def test_another_mistake_of_the_disk_ends_the_run_without_telling_where_its_files_are(lyon, errand):
    (lyon.home / "code").write_text("a file where a folder belongs")
    errand.assign(assign())
    failure = lyon.hub.wait("failure")
    assert failure.error == "Unavailable"
    assert str(lyon.home) not in failure.words
    assert failure.words.endswith("mend the site's disk and submit the job again")


def test_a_fault_of_ours_is_told_without_its_words(lyon, errand):
    lyon.workers.answers["train"] = lambda order, group: (_ for _ in ()).throw(ValueError("row 7: Alice"))
    errand.assign(assign())
    words = lyon.hub.wait("failure").words
    assert words.startswith("lyon: fault in the agent (ValueError)")
    assert "Alice" not in words


# --- the end


def test_ending_returns_at_once_and_the_folder_goes_when_the_work_has_ended(lyon):
    lyon.workers.answers["train"] = until_closed
    errand = Errand(lyon.place, "run")
    errand.assign(assign())
    assert eventually(lambda: lyon.workers.did("train"))
    lyon.workers.may_close.clear()
    errand.end(keep=False)
    assert eventually(lambda: lyon.workers.closed)
    assert not errand.ended
    assert (lyon.runs / "run").is_dir()
    lyon.workers.may_close.set()
    assert errand.wait(20)
    assert not (lyon.runs / "run").exists()
    assert [one.kind for one in lyon.hub.heard_ if one.kind in ("failure", "refusal")] == []


def test_a_run_that_is_given_again_while_it_ends_begins_when_that_is_over(lyon):
    lyon.workers.answers["train"] = until_closed
    first = Errand(lyon.place, "run")
    first.assign(assign())
    assert eventually(lambda: lyon.workers.did("train"))
    lyon.workers.may_close.clear()
    first.end(keep=False)
    second = Errand(lyon.place, "run", before=first)
    lyon.workers.answers["train"] = honest
    second.assign(assign())
    assert eventually(lambda: lyon.workers.closed)
    assert lyon.hub.taken == []
    lyon.workers.may_close.set()
    lyon.hub.wait_taken()
    assert first.ended
    kept = json.loads((lyon.runs / "run" / "update-2.json").read_text())
    assert (kept["weights"], kept["examples"]) == (DIGEST, 12)
    second.end(keep=False)
    assert second.wait(20)
    assert not lyon.runs.joinpath("run").exists()


def test_workers_are_there_for_the_next_run_as_soon_as_the_last_one_was_told_to_end(lyon):
    errands = []
    for number in range(10):
        errands.append(Errand(lyon.place, f"run-{number}"))
        errands[-1].assign(assign(run=f"run-{number}"))
        lyon.hub.wait_taken(number + 1)
        errands[-1].end(keep=False)
    assert all(errand.wait(20) for errand in errands)
    assert (lyon.workers.started, lyon.workers.closed) == (1, 0)
    assert list(lyon.runs.iterdir()) == []
