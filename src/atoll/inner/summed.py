"""Gradients summed over a round, at each rank those of what lies there."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from atoll.inner.held import Held, held
from atoll.inner.mesh import Mesh
from atoll.inner.whole import gradient_of, here
from atoll.spec.model import Signature


class Summed:
    """Sums in float64 of the gradients of what is trained, by parameter and cut as that is.

    They were averaged over a site's ranks before they come here, so of one part all ranks that hold it have the same.
    A buffer has no gradient, and a part of a model that no batch's loss is of has none but zeros.
    """

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        self._signature = signature
        named = dict(model.named_parameters(remove_duplicate=False))
        found = {spec.name: named[spec.name] for spec in signature if spec.name in named}
        self.parameters = {name: parameter for name, parameter in found.items() if parameter.requires_grad}
        self.tensors = {name: torch.zeros_like(p.detach(), dtype=torch.float64) for name, p in self.parameters.items()}

    def add(self, times: float = 1.0) -> None:
        """Add the gradients that are there, so many times."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    here(self.tensors[name]).add_(here(gradient_of(parameter)).double() * times)

    def means(self, count: int, mesh: Mesh) -> Iterator[Held]:
        """Yield what lies here of the mean of so many, in float32."""
        for one in held(self.tensors, self._signature, mesh):
            yield replace(one, value=(one.value / count).float().cpu())
