"""The outer optimiser: from the merged update of a round to the next version of the weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from atoll.errors import Invalid, TaskFailed
from atoll.outer.room import PIECE, room
from atoll.spec.sync import Outer

Moments = dict[str, np.ndarray]

_PIECE = 1 << 15  # elements at a time where there are moments: the rules ask the system for room


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What the optimiser remembers: steps taken, and float32 moments of the weights' shape, 4 bytes an element each.

    `residual` is one more where steps are encoded on their way down with feedback: what they have lost so far.
    """

    step: int = 0
    moments: Moments = field(default_factory=dict[str, np.ndarray])
    residual: np.ndarray | None = None


def pseudo_gradient(
    exchange: Literal["gradient", "delta"], merged: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Return what the optimiser descends along: the mean gradient itself, or minus the mean of new - start, in `out`
    where that is given."""
    return merged if exchange == "gradient" else np.negative(merged, out=out)


def step(outer: Outer, weights: np.ndarray, gradient: np.ndarray, state: State) -> tuple[np.ndarray, State]:
    """Return the next weights (float32, same shape) and state; the arguments are left as they were.

    sgd follows torch.optim.SGD (dampening 0, the first momentum buffer is the gradient) and adam torch.optim.Adam.
    yogi (Zaheer et al., 2018) and adagrad are FedOpt's (Reddi et al., 2021, algorithm 2) with the bias correction of
    Adam; adagrad with beta1 = 0 is torch.optim.Adagrad. Arithmetic is in float64, in windows; weights and moments are
    rounded to float32 once a step.

    Raises `Invalid` for shapes or a state that do not belong together, `TaskFailed` when a result is not finite.
    """
    if weights.ndim != 1 or gradient.shape != weights.shape:
        raise Invalid(
            f"gradient: shape {gradient.shape} does not fit weights of {weights.shape}; send the whole vector"
        )
    new = np.empty(weights.shape, np.float32)
    after = taken_over(outer, weights.shape, State(state.step, {n: m.copy() for n, m in state.moments.items()}))
    step_window(outer, after.step, (weights, gradient, new), after.moments)
    return new, after


def taken_over(outer: Outer, shape: tuple[int, ...], state: State) -> State:
    """Return the state after the next step, in the memory of `state`, for `step_window` to fill.

    Raises `Invalid` for a state that is not this optimiser's, or not of weights of this shape.
    """
    names = _moment_names(outer)
    _check_state(state, names, shape, outer.kind)
    # Zeros, for a step may be of a part only; the system gives them as they are touched.
    return State(state.step + 1, state.moments or {name: np.zeros(shape, np.float32) for name in names})


def step_window(outer: Outer, number: int, arrays: tuple[np.ndarray, np.ndarray, np.ndarray], moments: Moments) -> None:
    """Take step `number` for windows of (weights, gradient, new weights), all float32 of one shape.

    The new weights and moments are written in place; at step 1 moments have no value yet. Elements do not know of each
    other, so any cut into windows gives the same bits, and threads may do one each. Raises `TaskFailed` when a result
    is not finite.
    """
    weights, gradient, new = arrays
    size = _PIECE if moments else PIECE
    for start in range(0, weights.size, size):
        place = slice(start, min(start + size, weights.size))
        along, wide = room.first[: place.stop - start], room.second[: place.stop - start]
        np.copyto(along, gradient[place])
        np.copyto(wide, weights[place])
        old = {name: moment[place].astype(np.float64) for name, moment in moments.items()} if number > 1 else {}
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and told below
            change, updated = _RULES[outer.kind](outer, along, old, number)
            for name, moment in moments.items():
                moment[place] = updated[name]
            change *= outer.rate  # in place, which a moment may share: it is stored
            wide -= change
            new[place] = wide
        if not all(np.isfinite(array[place]).all() for array in (new, *moments.values())):
            raise TaskFailed(f"weights: not finite after outer step {number}; lower sync.outer.rate ({outer.rate})")


def to_arrays(state: State) -> dict[str, np.ndarray]:
    """Return the state as named arrays, for a safetensors file: `step` (int64, shape (1,)), moments, residual."""
    residual = {} if state.residual is None else {"residual": state.residual}
    return {"step": np.array([state.step], np.int64), **state.moments, **residual}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> State:
    """Read back what `to_arrays` gave; raise `Invalid` for arrays that no state has."""
    moments = dict(arrays)
    number = moments.pop("step", None)
    if number is None or number.shape != (1,) or number.dtype != np.int64 or number[0] < 0:
        raise Invalid("optimiser state: step must be one int64 of at least 0; restore the stored file")
    for name, moment in moments.items():
        if name not in ("momentum", "first", "second", "residual"):
            raise Invalid(f"optimiser state: {name!r}: there is none; there is momentum, first, second, residual")
        if moment.ndim != 1 or moment.dtype != np.float32 or not np.isfinite(moment).all():
            raise Invalid(f"optimiser state: {name} must be a flat vector of finite float32; restore the stored file")
    residual = moments.pop("residual", None)
    return State(int(number[0]), moments, residual)


def _sgd(outer: Outer, gradient: np.ndarray, moments: Moments, number: int) -> tuple[np.ndarray, Moments]:
    if not outer.momentum:
        return gradient, {}
    buffer = gradient if number == 1 else outer.momentum * moments["momentum"] + gradient
    change = gradient + outer.momentum * buffer if outer.nesterov else buffer
    return change, {"momentum": buffer}


def _adam(outer: Outer, gradient: np.ndarray, moments: Moments, number: int) -> tuple[np.ndarray, Moments]:
    second = moments.get("second", 0.0) * outer.beta2 + (1 - outer.beta2) * np.square(gradient)
    return _scaled(outer, gradient, moments, second, number)


def _yogi(outer: Outer, gradient: np.ndarray, moments: Moments, number: int) -> tuple[np.ndarray, Moments]:
    square = np.square(gradient)
    old = moments.get("second", np.zeros_like(gradient))
    return _scaled(outer, gradient, moments, old - (1 - outer.beta2) * np.sign(old - square) * square, number)


def _adagrad(outer: Outer, gradient: np.ndarray, moments: Moments, number: int) -> tuple[np.ndarray, Moments]:
    second = moments.get("second", 0.0) + np.square(gradient)
    return _scaled(outer, gradient, moments, second, number)


def _scaled(
    outer: Outer, gradient: np.ndarray, moments: Moments, second: np.ndarray, number: int
) -> tuple[np.ndarray, Moments]:
    """Divide the bias-corrected first moment by the root of the second (adagrad's is a plain sum: no correction)."""
    first = moments.get("first", 0.0) * outer.beta1 + (1 - outer.beta1) * gradient
    correction = 1.0 if outer.kind == "adagrad" else 1 - outer.beta2**number
    size = np.sqrt(second) / math.sqrt(correction) + outer.epsilon
    return first / (1 - outer.beta1**number) / size, {"first": first, "second": second}


_RULES: dict[str, Callable[[Outer, np.ndarray, Moments, int], tuple[np.ndarray, Moments]]] = {
    "sgd": _sgd,
    "adam": _adam,
    "yogi": _yogi,
    "adagrad": _adagrad,
}


def _moment_names(outer: Outer) -> tuple[str, ...]:
    if outer.kind != "sgd":
        return ("first", "second")
    return ("momentum",) if outer.momentum else ()


def _check_state(state: State, names: tuple[str, ...], shape: tuple[int, ...], kind: str) -> None:
    held = tuple(sorted(state.moments))
    if held != (names if state.step else ()):
        raise Invalid(f"optimiser state: holds {held} after step {state.step}, {kind} needs {names}; start a new run")
    for name, moment in state.moments.items():
        if moment.shape != shape:
            raise Invalid(f"optimiser state: {name} has shape {moment.shape}, weights {shape}; use the run's own state")
