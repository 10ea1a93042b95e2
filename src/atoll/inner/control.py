"""SCAFFOLD's control variates at one site: what turns its steps towards everybody's, and its own for the next round."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from atoll.errors import Corrupt
from atoll.inner import checkpoint
from atoll.inner.held import Held, held
from atoll.inner.mesh import Mesh
from atoll.inner.summed import Summed
from atoll.inner.vector import load_vector
from atoll.inner.whole import gradient_of, here
from atoll.spec.model import Signature, elements
from atoll.spec.order import Train

_ENTRY = "control"


class Control:
    """Karimireddy et al. (2020): each local step follows g + c - c_i, and the site's c_i of the next round is the mean
    of this round's g, the raw gradients.

    For plain SGD of one rate that mean is the paper's option II, c_i - c + (start - end) / (steps x rate), because the
    steps add up to rate x the sum of (g + c - c_i). As a mean of gradients it holds for every inner optimiser. They are
    averaged over a site's ranks before they come here, so ranks that hold the same compute the same. A buffer, or a
    parameter that is not trained, has no gradient and a control of zero.
    """

    def __init__(self, model: torch.nn.Module, signature: Signature, common: np.ndarray, own: np.ndarray) -> None:
        """``common`` is the hub's c and ``own`` the site's c_i: flat float32, in the order of ``signature``.

        Of both are kept, as of the sums, those that lie at this rank.
        """
        self.summed = Summed(model, signature)  # raw gradients, so far
        turn, at = torch.from_numpy(common - own), 0
        self._own = {one.name: one.of(torch.from_numpy(own)).clone() for one in held(self.summed.tensors, signature)}
        self._turn = {one.name: one.of(turn).clone() for one in held(self.summed.tensors, signature)}
        self._turned = set[str]()  # whatever lies here, at all ranks the same
        for spec in signature:
            if turn[at : at + spec.size].any():
                self._turned.add(spec.name)
            at += spec.size

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
        self.summed.add()
        for name, parameter in self.summed.parameters.items():
            if parameter.grad is None and name in self._turned:  # this batch leaves it out, and others do not
                parameter.grad = torch.zeros_like(parameter.detach())
            if parameter.grad is not None:
                here(gradient_of(parameter)).add_(self._turn[name])

    def after(self, steps: int, mesh: Mesh) -> Iterator[Held]:
        """Yield what lies here of c_i as it is after a round of so many steps."""
        return self.summed.means(steps, mesh)

    def change(self, steps: int, mesh: Mesh) -> Iterator[Held]:
        """Yield by how much that has changed, which the hub is told."""
        return (replace(one, value=one.value - self._own[one.name]) for one in self.after(steps, mesh))


def read_control(path: Path, size: int) -> np.ndarray:
    """Return the site's c_i. Raises `Corrupt` for one that is not what was written."""
    found = checkpoint.read_tensors(path)[0].get(_ENTRY)
    if found is None or found.dtype != torch.float32 or found.shape != (size,):
        raise Corrupt(f"{path.name}: holds no control variates of {size} numbers; submit the job again")
    return found.numpy()


def write_control(path: Path, size: int, control: Iterable[Held], mesh: Mesh) -> None:
    """Write a c_i of so many numbers: all ranks together, each what it has of it."""
    checkpoint.write_tensors(path, {}, {}, mesh, flat={_ENTRY: (size, control)})
