"""Weights given out as a change: the sites rebuild the hub's very bits, and what is lost is not lost for good."""

import numpy as np
import pytest

from atoll.errors import Invalid, TaskFailed
from atoll.outer.advance import Advance
from atoll.outer.down import follow, in_changes, take
from atoll.outer.merge import Update
from atoll.outer.optimiser import State, from_arrays, to_arrays
from atoll.outer.wire import CHUNK, Chunk
from atoll.spec.sync import Outer, Sync
from atoll.spec.wire import Transform
from tests.unit.vectors import noise

SIZE = CHUNK + 5
START = noise(SIZE).copy()
START[:4] = (0.0, -0.0, 1e-45, 0.0)  # of which bits may differ where numbers do not
INT8, INT4, BFLOAT16, ZSTD = (Transform(kind=kind) for kind in ("int8", "int4", "bfloat16", "zstd"))
TOPK = Transform(kind="topk", share=0.05)
DOWNS = [(INT8,), (INT4,), (BFLOAT16,), (ZSTD,), (TOPK,), (TOPK, INT4, ZSTD)]
FRAGMENTS = {"period": 4, "fragments": 4, "keep_optimiser": True}


def name(transforms):
    return "+".join(step.kind for step in transforms) or "none"


def update(seed, size):
    vector = noise(size, seed, 1e-2).copy()
    vector[:3] = 0
    return Update("ada", 1.0, lambda at: vector[at : at + CHUNK].copy())


def round_of(sync, weights, state, threads=2):
    """Return the hub's weights and state after a round, and the chunks of the change."""
    low, high = sync.span(weights.size, state.step)
    chunks = []
    made = Advance(sync, weights, [update(state.step, high - low)], state)
    for _ in made.pieces(threads, chunks.append):
        pass
    return made.weights, made.state, chunks


def followed(sync, weights, version, chunks):
    """Rebuild at a site: from weights of `version`, in which each chunk's window is another one."""
    low, high = sync.span(weights.size, version)
    after = weights.copy()
    for chunk in chunks:
        place = slice(low + chunk.offset, low + chunk.offset + chunk.length)
        after[place] = follow(weights[place], chunk, sync.down, high - low)
    return after


def same_bits(one, other):
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize("fields", [{}, FRAGMENTS], ids=["whole", "fragments"])
@pytest.mark.parametrize("down", [*DOWNS, ()], ids=name)
def test_sites_rebuild_the_hubs_bits_round_after_round(down, fields):
    sync = Sync(down=down, outer=Outer(rate=0.7, momentum=0.9, nesterov=True), **fields)
    at_hub, at_site, state = START, START, State()
    for version in range(3):
        at_hub, state, chunks = round_of(sync, at_hub, state)
        at_site = followed(sync, at_site, version, chunks)
        assert same_bits(at_site, at_hub)
    assert not same_bits(at_hub, START)


@pytest.mark.parametrize("down", [(INT8,), (TOPK, INT4)], ids=name)
def test_the_change_and_the_residual_do_not_depend_on_threads(down):
    sync, found = Sync(down=down), []
    for threads in (1, 2):
        weights, state = noise(3 * CHUNK + 5), State()  # of two spans, which are handed out
        for _ in range(2):
            weights, state, chunks = round_of(sync, weights, state, threads)
        found.append((weights.tobytes(), state.residual.tobytes(), [bytes(chunk.data) for chunk in chunks]))
    assert found[0] == found[1]


@pytest.mark.parametrize("down", [(INT8,), (INT4,), (TOPK, INT4)], ids=name)
def test_what_a_step_loses_on_its_way_is_the_residual_and_the_next_step_brings_it(down):
    plain, sync = Sync(), Sync(down=down)
    ideal, weights, state, residual = START, START, State(), np.zeros(SIZE, np.float32)
    for version in range(4):
        before = weights
        weights, state, _ = round_of(sync, weights, state)
        ideal = round_of(plain, before, State(version))[0]
        np.testing.assert_allclose(weights + state.residual, ideal + residual, atol=2e-6)
        residual = state.residual.copy()
    assert residual.any()


def test_a_state_from_its_file_goes_on_to_the_same_bits():
    sync = Sync(down=(INT4,), outer=Outer(kind="adam", rate=0.1))
    weights, state, _ = round_of(sync, START, State())
    stored = {key: array.copy() for key, array in to_arrays(state).items()}
    assert set(stored) == {"step", "first", "second", "residual"}
    expected = round_of(sync, weights, state)[0]
    assert same_bits(round_of(sync, weights, from_arrays(stored))[0], expected)


def test_without_feedback_nothing_is_kept():
    sync = Sync(down=(INT8.model_copy(update={"feedback": False}),))
    weights, state, chunks = round_of(sync, START, State())
    assert state.residual is None
    assert same_bits(followed(sync, START, 0, chunks), weights)


def test_only_a_sync_with_fragments_or_a_way_down_gives_changes():
    assert not in_changes(Sync())
    assert in_changes(Sync(down=(ZSTD,)))
    assert in_changes(Sync(**FRAGMENTS))


def test_a_residual_that_does_not_belong_to_the_sync_is_refused():
    with pytest.raises(Invalid, match="feeds nothing back"):
        Advance(Sync(), START, [update(0, SIZE)], State(1, residual=START))
    for residual, words in ((None, "none where"), (START[:7], "7 elements where")):
        with pytest.raises(Invalid, match=words):
            Advance(Sync(down=(INT8,)), START, [update(0, SIZE)], State(1, residual=residual))


def test_a_step_or_weights_that_are_not_finite_are_told_at_the_hub():
    ends = np.array([-3e38, 3e38], np.float32)
    with pytest.raises(TaskFailed, match="not finite"):
        take((INT8,), 0, (ends, -ends), None)
    after = np.array([3e38, 3.4e38], np.float32)  # a step that the rounding takes over the edge
    with pytest.raises(TaskFailed, match=r"lower sync\.outer\.rate"):
        take((INT4,), 0, (np.array([3e38, 3e38], np.float32), after), np.array([0, 3e37], np.float32))


def test_a_site_takes_no_chunk_of_another_place_size_or_encoding_and_no_infinite_weights():
    [chunk] = [take((INT8,), 0, (START[:9], START[9:18].copy()), None)]
    for bad in (
        Chunk(CHUNK, 9, chunk.data, chunk.scales),
        Chunk(0, 8, chunk.data, chunk.scales),
        Chunk(0, 9, bytes(36)),
        Chunk(0, 9, chunk.data, np.float32(np.nan).tobytes()),
    ):
        with pytest.raises(Invalid):
            follow(START[:9], bad, (INT8,), 9)
    huge = np.array([2e36], np.float32)  # 127 of which are finite, and not on top of others
    with pytest.raises(Invalid, match="not finite"):
        follow(np.full(9, 3e38, np.float32), Chunk(0, 9, bytes([127] * 9), huge.tobytes()), (INT8,), 9)
