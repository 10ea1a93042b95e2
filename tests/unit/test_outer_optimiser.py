"""The outer optimiser against the papers' recurrences, and what it refuses; that it is torch's own is a law."""

import numpy as np
import pytest

from atoll.errors import Invalid, TaskFailed
from atoll.outer.optimiser import State, from_arrays, pseudo_gradient, step, to_arrays
from atoll.outer.wire import CHUNK
from atoll.spec.sync import Outer

START = np.random.default_rng(0).normal(size=30).astype(np.float32)
GRADIENTS = [np.random.default_rng(i).normal(size=30).astype(np.float32) for i in range(1, 21)]


def ours(outer, gradients=GRADIENTS):
    weights, state = START, State()
    for gradient in gradients:
        weights, state = step(outer, weights, gradient, state)
    return weights, state


def test_yogi_follows_its_recurrence():
    outer = Outer(kind="yogi", rate=0.05, beta2=0.9, epsilon=1e-3)
    weights, first, second = START.astype(np.float64), 0.0, np.zeros(30)
    for number, gradient in enumerate(GRADIENTS, start=1):
        square = gradient.astype(np.float64) ** 2
        first = 0.9 * first + 0.1 * gradient
        second = np.where(second < square, second + 0.1 * square, second - 0.1 * square)
        weights = weights - 0.05 * first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.9**number)) + 1e-3)
    np.testing.assert_allclose(ours(outer)[0], weights, rtol=2e-6, atol=2e-6)


def test_yogi_and_adam_part_only_after_the_first_step():
    adam, yogi = (Outer(kind=kind, rate=0.05, beta2=0.9) for kind in ("adam", "yogi"))
    np.testing.assert_allclose(ours(adam, GRADIENTS[:1])[0], ours(yogi, GRADIENTS[:1])[0], rtol=1e-6)
    assert np.abs(ours(adam)[0] - ours(yogi)[0]).max() > 1e-3


def test_rate_one_adds_the_mean_delta():
    delta = GRADIENTS[0]
    weights, _ = step(Outer(), START, pseudo_gradient("delta", delta), State())
    np.testing.assert_array_equal(weights, START + delta)
    np.testing.assert_array_equal(pseudo_gradient("gradient", delta), delta)


def test_a_step_leaves_its_arguments_alone():
    outer = Outer(kind="adam")
    weights, state = ours(outer)
    before = weights.copy(), {name: moment.copy() for name, moment in state.moments.items()}
    step(outer, weights, GRADIENTS[0], state)
    np.testing.assert_array_equal(weights, before[0])
    assert state.step == len(GRADIENTS)
    for name, moment in state.moments.items():
        np.testing.assert_array_equal(moment, before[1][name])


def test_windows_do_not_show_in_the_result():
    outer, rng = Outer(kind="yogi", rate=0.1), np.random.default_rng(5)
    weights, gradient = (rng.normal(size=CHUNK + 9).astype(np.float32) for _ in range(2))
    whole, _ = step(outer, weights, gradient, State())
    part, _ = step(outer, weights[CHUNK - 5 :], gradient[CHUNK - 5 :], State())
    np.testing.assert_array_equal(whole[CHUNK - 5 :], part)


@pytest.mark.parametrize("outer", [Outer(), Outer(momentum=0.9), Outer(kind="adam"), Outer(kind="adagrad")])
def test_a_stored_state_goes_on_to_the_same_bits(outer):
    weights, state = ours(outer, GRADIENTS[:7])
    state = from_arrays({name: array.copy() for name, array in to_arrays(state).items()})
    for gradient in GRADIENTS[7:]:
        weights, state = step(outer, weights, gradient, state)
    np.testing.assert_array_equal(weights, ours(outer)[0])
    assert state.step == len(GRADIENTS)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"step": np.array(3)},
        {"step": np.array([3.0])},
        {"step": np.array([-1])},
        {"step": np.array([1]), "third": START},
        {"step": np.array([1]), "first": START.astype(np.float64)},
        {"step": np.array([1]), "first": START.reshape(5, 6)},
        {"step": np.array([1]), "first": np.array([np.nan], np.float32)},
    ],
)
def test_arrays_that_are_no_state_are_refused(arrays):
    with pytest.raises(Invalid, match="optimiser state"):
        from_arrays(arrays)


@pytest.mark.parametrize(
    "state",
    [
        State(1),
        State(0, {"first": START, "second": START}),
        State(1, {"momentum": START}),
        State(1, {"first": START[:3], "second": START[:3]}),
    ],
)
def test_a_state_of_another_optimiser_or_model_is_refused(state):
    with pytest.raises(Invalid, match="optimiser state"):
        step(Outer(kind="adam"), START, GRADIENTS[0], state)


def test_a_gradient_of_another_model_is_refused():
    with pytest.raises(Invalid, match="does not fit"):
        step(Outer(), START, START[:4], State())


@pytest.mark.parametrize("outer", [Outer(rate=1e30), Outer(kind="adam")])
def test_weights_that_would_not_be_finite_fail_the_run(outer):
    with pytest.raises(TaskFailed, match=r"not finite after outer step 1; lower sync\.outer\.rate"):
        step(outer, START, np.full(30, 1e25, np.float32), State())
