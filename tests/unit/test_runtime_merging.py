"""What a stage's answers become: with sites that did not answer in time, and in how much memory, after what breaks."""

import resource
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from atoll.errors import Corrupt, TaskFailed, Unavailable
from atoll.outer.merge import Update, merge
from atoll.outer.optimiser import State as OuterState
from atoll.outer.optimiser import pseudo_gradient, step
from atoll.outer.wire import CHUNK, encode
from atoll.runtime.files import RunFiles
from atoll.runtime.machine import Merge
from atoll.runtime.merging import merged
from atoll.spec.event import Answer, ColumnSums, Expired, Totals
from atoll.spec.model import TensorSpec
from atoll.spec.sync import Bound, Outer
from atoll.spec.wire import Transform
from tests.unit.runs import QUORUM, ZERO, answer, fold, plan, running, train_job, training
from tests.unit.runs import merged as told
from tests.unit.vectors import noise


def combined(state, commands, tmp_path):
    [merge] = [command for command in commands if isinstance(command, Merge)]
    return merged(state, merge.answers, RunFiles(tmp_path))


def sums(mean):
    return {"age": ColumnSums(count=2, total=2 * mean, squares=2 * mean * mean)}


def deadline(state):
    return Expired(run="run", position=state.position)


def test_statistics_and_metrics_are_of_those_who_answered_and_name_all_who_did_not(tmp_path):
    state, _ = running(plan("abc", rounds=1, evaluators="abc", **QUORUM), job=train_job(statistics=["age"]))
    state, commands = fold(state, answer(state, "a", sums=sums(1.0)), answer(state, "b", sums=sums(3.0)))
    assert commands == []
    state, commands = fold(state, deadline(state))
    measured = combined(state, commands, tmp_path)
    assert (measured.sites, measured.result.missing) == (("a", "b"), ("c",))
    assert (measured.statistics["age"].count, measured.statistics["age"].mean) == (4, 2.0)

    state, _ = fold(state, measured, answer(state, "a", position=1))
    state, _ = fold(state, told(state, weights=ZERO))
    state, _ = fold(state, *(answer(state, site) for site in "abc"))
    state, _ = fold(state, told(state, weights=ZERO))
    error = {"error": Totals(total=3.0, count=2)}
    state, commands = fold(state, answer(state, "c", totals=error), deadline(state))
    result = combined(state, commands, tmp_path).result
    assert (result.metrics, result.by_site) == ({"error": 1.5}, {"c": {"error": 1.5}})
    assert result.missing == ("c", "a", "b")  # c was silent when sums were asked for


def test_when_everybody_answered_nobody_is_named(tmp_path):
    state, _ = running(plan("ab", rounds=1, evaluators="ab"), job=train_job(statistics=["age"]))
    state, commands = fold(state, answer(state, "a", sums=sums(1.0)), answer(state, "b", sums=sums(3.0)))
    assert combined(state, commands, tmp_path).result is None


# --- a train round


SIZE = 2 * CHUNK + 3  # two spans, which are handed out
SIGNATURE = (TensorSpec(name="w", shape=(SIZE,)),)


def vector(seed):
    return noise(SIZE, seed)


class Rounds:
    """A run in its first train round, with its files: `begin` on the weights and outer state that it has by now."""

    def __init__(self, folder, **sync):
        made = plan("ab")
        made = made.model_copy(update={"sync": made.sync.model_copy(update=sync)})
        self.state, _ = training(made)
        self.folder, self.files = folder, RunFiles(folder)
        self.state = replace(self.state, weights=self.files.put_weights(vector(0), SIGNATURE), signature=SIGNATURE)

    def bring(self, sites, position=1, scales=()):
        answers = []
        for number, site in enumerate(sites, start=1):
            sent = vector(number) * np.float32(scales[number - 1] if scales else 1)
            digest, _ = self.files.spool.receive((position, site), lambda at, sent=sent: encode(sent, ()), (), SIZE)
            answers.append(Answer(site=site, position=position, epoch=0, examples=number, loss=0.5, update=digest))
        return answers

    def merge(self, answers, files=None):
        made = merged(self.state, answers, files or self.files)
        self.state = replace(self.state, weights=made.weights, outer=made.outer)
        return made


def expected(outer, sites, rounds):
    vectors = [vector(number) for number in range(1, sites + 1)]
    updates = [
        Update(str(number), number, lambda at, sent=sent: sent[at : at + CHUNK])
        for number, sent in enumerate(vectors, start=1)
    ]
    weights, state = vector(0), OuterState()
    for _ in range(rounds):
        weights, state = step(outer, weights, pseudo_gradient("delta", merge("weighted_mean", SIZE, updates)), state)
    return weights


@pytest.mark.parametrize("outer", [Outer(), Outer(rate=0.5, momentum=0.9)])
@pytest.mark.parametrize("restart", [False, True])
def test_rounds_are_merged_to_the_bits_of_merge_and_step_also_by_a_hub_that_was_restarted(tmp_path, outer, restart):
    rounds = Rounds(tmp_path, outer=outer)
    answers = rounds.bring("ab")
    for _ in range(2):
        made = rounds.merge(answers, RunFiles(tmp_path) if restart else None)
    assert np.array_equal(RunFiles(tmp_path).vector(made.weights, SIGNATURE), expected(outer, 2, 2))
    assert made.loss == 0.5


@pytest.mark.parametrize(
    ("fields", "odd"),
    [
        ({"merge": "multi_krum", "hostile": 1}, ("e",)),
        ({"merge": "mean", "bound": Bound(times=1.0)}, ("d", "e")),
        ({"merge": "geometric_median"}, ()),
        ({"merge": "median"}, ()),
    ],
)
def test_who_was_found_odd_is_in_the_event_and_a_restarted_hub_finds_the_same(tmp_path, fields, odd):
    rounds = Rounds(tmp_path, **fields)
    answers = rounds.bring("abcde", scales=(1, 1, 1, 1.5, 400))
    before = rounds.state
    made = rounds.merge(answers)
    assert made.outliers == odd
    rounds.state = before
    assert rounds.merge(answers[::-1], RunFiles(tmp_path)).weights == made.weights


def test_a_change_that_cannot_be_written_costs_no_merge(tmp_path):
    rounds = Rounds(tmp_path, outer=Outer(), down=(Transform(kind="int8"),))
    before = rounds.state.weights
    rounds.merge(rounds.bring("ab"))
    whole = rounds.files.changes.find(before, rounds.state.weights)
    assert whole.size == SIZE
    (tmp_path / "1.change").mkdir()
    before, made = rounds.state.weights, rounds.merge(rounds.bring("ab"))
    assert rounds.files.changes.find(before, made.weights) is None
    assert RunFiles(tmp_path).vector(made.weights, SIGNATURE).size == SIZE


def test_first_weights_that_are_not_what_was_journalled_end_the_run(tmp_path):
    state, _ = running(plan("ab"), "a")
    files = RunFiles(tmp_path)
    brought = {"position": 0, "epoch": 0, "signature": SIGNATURE, "update": ZERO}
    files.spool.receive((0, "a"), lambda at: encode(vector(1), ()), (), SIZE)
    with pytest.raises(Corrupt, match="update of a for stage 0 is not what was received"):
        merged(state, [Answer.model_validate({"site": "a", **brought})], files)


def test_a_merge_that_finds_no_room_is_done_again_to_the_same_bits(tmp_path):
    rounds = Rounds(tmp_path, outer=Outer(rate=0.5, momentum=0.9))
    answers = rounds.bring("ab")
    rounds.merge(answers)
    left = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SIZE, limits[1]))  # half way, with the moments stepped in place
    try:
        with pytest.raises(Unavailable, match="free some space and the run goes on"):
            rounds.merge(answers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == left
    made = rounds.merge(answers)
    assert np.array_equal(rounds.files.vector(made.weights, SIGNATURE), expected(Outer(rate=0.5, momentum=0.9), 2, 2))


def test_an_update_that_is_not_what_was_journalled_ends_the_round(tmp_path):
    rounds = Rounds(tmp_path)
    first, second = rounds.bring("ab")
    with pytest.raises(Corrupt, match="update of b for stage 1 is not what was received"):
        rounds.merge([first, second.model_copy(update={"update": ZERO})])


def test_weights_that_would_not_be_finite_leave_no_file(tmp_path):
    rounds = Rounds(tmp_path, outer=Outer(rate=3e38))
    answers = rounds.bring("ab")
    left = sorted(tmp_path.iterdir())
    with pytest.raises(TaskFailed, match="lower sync"):
        rounds.merge(answers)
    assert sorted(tmp_path.iterdir()) == left


def test_a_round_takes_the_memory_of_two_models_and_a_few_windows_however_many_sites(tmp_path):
    def peak(sites):
        rounds = Rounds(tmp_path / str(len(sites)))
        answers = rounds.bring(sites)
        tracemalloc.start()
        rounds.merge(answers)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak("ab"), peak("abcdefgh")
    window = 4 * CHUNK
    assert many < 4 * SIZE + 4 * 12 * window  # the next weights; those before are there; at most four threads
    # Of two threads one may have done it all, and made no room for the other; the six more updates are 24 * SIZE.
    assert many < few + 12 * SIZE
