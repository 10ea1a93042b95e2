"""SCAFFOLD's control variates at one site: what turns its steps towards everybody's, and its own for the next round."""

from pathlib import Path

import numpy as np
import torch

from atoll.errors import Corrupt
from atoll.inner import checkpoint
from atoll.inner.vector import load_vector
from atoll.inner.whole import part, whole
from atoll.spec.message import Train
from atoll.spec.model import Signature, elements

_ENTRY = "control"


class Control:
    """Karimireddy et al. (2020): each local step follows g + c - c_i, and the site's c_i of the next round is the mean
    of this round's g, the raw gradients.

    For plain SGD of one rate that mean is the paper's option II, c_i - c + (start - end) / (steps x rate), because the
    steps add up to rate x the sum of (g + c - c_i). As a mean of gradients it holds for every inner optimiser. They are
    averaged over a site's ranks before they come here, so all ranks compute the same. A buffer, or a parameter that is
    not trained, has no gradient and a control of zero.
    """

    def __init__(self, model: torch.nn.Module, signature: Signature, common: np.ndarray, own: np.ndarray) -> None:
        """``common`` is the hub's c and ``own`` the site's c_i: flat float32, in the order of ``signature``."""
        self.sum = torch.zeros(own.size, dtype=torch.float64)  # of raw gradients, so far
        self._own, self._turn = own, torch.from_numpy(common - own)
        self._places: list[tuple[torch.nn.Parameter, slice]] = []
        parameters, start = dict(model.named_parameters(remove_duplicate=False)), 0
        for spec in signature:
            parameter = parameters.get(spec.name)
            if parameter is not None and parameter.requires_grad:
                self._places.append((parameter, slice(start, start + spec.size)))
            start += spec.size

    @classmethod
    def ordered(cls, order: Train, model: torch.nn.Module, signature: Signature) -> "Control":
        """Return the control of a round: the hub's lies behind the weights, under whose ``signature`` it is."""
        assert order.weights is not None, "no round with control is begun ahead of its weights"
        size = elements(signature)
        common = load_vector(Path(order.weights), order.signature)[size:]
        own = read_control(Path(order.control_in), size) if order.control_in is not None else np.zeros_like(common)
        return cls(model, signature, common, own)

    def apply(self) -> None:
        """Take the gradients of a step into account, then add c - c_i to them."""
        for parameter, place in self._places:
            turn = self._turn[place].reshape(parameter.shape)
            if parameter.grad is not None:
                self.sum[place] += whole(parameter.grad).reshape(-1).double()
                parameter.grad.add_(part(turn, parameter))
            elif turn.any():  # this batch leaves it out, and others do not
                parameter.grad = part(turn.to(parameter.dtype, copy=True), parameter)

    def after(self, steps: int) -> np.ndarray:
        """Return c_i as it is after a round of so many steps."""
        return (self.sum.numpy() / steps).astype(np.float32)

    def change(self, steps: int) -> np.ndarray:
        """Return by how much c_i has changed, which the hub is told."""
        return self.after(steps) - self._own


def read_control(path: Path, size: int) -> np.ndarray:
    """Return the site's c_i. Raises `Corrupt` for one that is not what was written."""
    found = checkpoint.read_tensors(path)[0].get(_ENTRY)
    if found is None or found.dtype != torch.float32 or found.shape != (size,):
        raise Corrupt(f"{path.name}: holds no control variates of {size} numbers; submit the job again")
    return found.numpy()


def write_control(path: Path, control: np.ndarray) -> None:
    checkpoint.write_tensors(path, {_ENTRY: torch.from_numpy(control)}, {})
