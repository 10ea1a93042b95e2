"""A round's step, fused: the bits of merge and step one after the other, whatever the threads, in little memory."""

import threading
import tracemalloc

import numpy as np
import pytest

from atoll.errors import Invalid, TaskFailed
from atoll.outer.advance import Advance
from atoll.outer.merge import Update, merge
from atoll.outer.optimiser import State, pseudo_gradient, step
from atoll.outer.wire import CHUNK
from atoll.spec.sync import Outer, Sync
from tests.unit.vectors import noise

SIZE = 4 * CHUNK + 5  # three spans, the last one with a short window
START = noise(SIZE)
VECTORS = [noise(SIZE, seed, 1e-2) for seed in range(1, 4)]
OUTERS = {
    "sgd": Outer(),
    "momentum": Outer(rate=0.7, momentum=0.9, nesterov=True),
    "adam": Outer(kind="adam", rate=0.1),
}


def updates(vectors=VECTORS):
    return [
        Update(f"s{i}", 10.0 + i, lambda offset, vector=vector: vector[offset : offset + CHUNK])
        for i, vector in enumerate(vectors)
    ]


def advanced(sync, state=None, threads=2, given=None):
    made = Advance(sync, START, given or updates(), state or State())
    pieces = list(made.pieces(threads))
    assert np.array_equal(np.concatenate(pieces), made.weights)
    return made


@pytest.mark.parametrize(
    ("rule", "outer"), [("weighted_mean", "sgd"), ("mean", "momentum"), ("mean", "adam"), ("median", "sgd")]
)
def test_two_rounds_are_those_of_merge_and_step_bit_for_bit_with_any_number_of_threads(rule, outer):
    sync = Sync(merge=rule, outer=OUTERS[outer])
    merged = pseudo_gradient("delta", merge(rule, SIZE, updates(), sync.trim))
    state, made = State(), {1: None, 2: None, 3: None}
    for _ in range(2):
        expected, state = step(sync.outer, START, merged, state)
        for threads, before in made.items():
            made[threads] = found = advanced(sync, before.state if before else None, threads)
            assert np.array_equal(found.weights, expected)
            assert found.state.step == state.step
            assert set(found.state.moments) == set(state.moments)
            for name, moment in state.moments.items():
                assert np.array_equal(found.state.moments[name], moment)


def test_exchanged_gradients_are_gone_down_along_as_they_are():
    sync = Sync(exchange="gradient", outer=Outer(rate=0.5))
    expected, _ = step(sync.outer, START, merge("weighted_mean", SIZE, updates()), State())
    np.testing.assert_array_equal(advanced(sync).weights, expected)


def test_pieces_come_in_order_and_are_finished_when_they_come():
    let = threading.Event()

    def window(offset):
        assert offset < 4 * CHUNK or let.wait(20)
        return VECTORS[0][offset : offset + CHUNK]

    made = Advance(Sync(), START, [Update("slow", 1.0, window)], State())
    found = []
    for piece in made.pieces(2):
        found.append(piece.copy())
        if len(found) == 2:
            let.set()  # the last span is merged only now that two are here
    np.testing.assert_array_equal(np.concatenate(found), advanced(Sync(), given=updates(VECTORS[:1])).weights)


def test_an_update_that_cannot_be_merged_ends_it_and_no_thread_is_left():
    def window(offset):
        return VECTORS[0][offset : offset + CHUNK - (offset == 2 * CHUNK)]

    before = threading.active_count()
    made = Advance(Sync(), START, [*updates(), Update("lyon", 1.0, window)], State())
    with pytest.raises(Invalid, match="update of lyon"):
        list(made.pieces(3))
    assert threading.active_count() == before


def test_who_stops_taking_pieces_leaves_no_thread_behind():
    before = threading.active_count()
    pieces = Advance(Sync(), START, updates(), State()).pieces(2)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_weights_that_are_not_finite_any_more_are_told():
    with pytest.raises(TaskFailed, match="lower sync"):
        advanced(Sync(outer=Outer(rate=1e30)), given=updates([np.full(SIZE, 1e10, np.float32)]))


@pytest.mark.parametrize(
    ("sync", "given", "state"),
    [
        (Sync(), [], State()),
        (Sync(), updates(), State(1, {"momentum": START})),
        (Sync(outer=OUTERS["momentum"]), updates(), State(1, {"momentum": START[:5]})),
    ],
)
def test_what_does_not_belong_together_is_refused_at_once(sync, given, state):
    with pytest.raises(Invalid):
        Advance(sync, START, given, state)


def test_beside_weights_and_moments_memory_is_a_few_windows_however_many_updates():
    def peak(count):
        vectors = [VECTORS[i % 3] for i in range(count)]
        tracemalloc.start()
        made = Advance(Sync(), START, updates(vectors), State())
        for _ in made.pieces(2):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = (min(peak(count) for _ in range(3)) for count in (2, 16))  # threads of other tests add to a peak
    assert many < START.nbytes + 2 * 12 * 4 * CHUNK  # the weights after, and for each thread about twelve windows
    assert many < few + 4 * CHUNK
