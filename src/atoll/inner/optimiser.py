"""Inner optimisers by document, and their state as safetensors: no pickle, even of our own."""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors.torch
import torch

from atoll.errors import Corrupt
from atoll.spec.job import Optimiser


def _eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Return ``kind`` without the guard around its step that only torch.compile needs.

    The guard imports torch._dynamo with the first step: 1.4 s of processor in every worker (torch 2.13, November 2026).
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        plain = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        if not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)  # where torch remembers what it made of the method
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(inspect.unwrap(kind.step))})


_SGD, _ADAM, _ADAMW = (_eager(kind) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW))


def make(optimiser: Optimiser, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the torch optimiser that the document names."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    rate, decay = optimiser.rate, optimiser.weight_decay
    match optimiser.kind:
        case "sgd":
            return _SGD(trained, lr=rate, momentum=optimiser.momentum, weight_decay=decay)
        case "adam":
            return _ADAM(trained, lr=rate, weight_decay=decay)
        case "adamw":
            return _ADAMW(trained, lr=rate, weight_decay=decay)


def save_state(optimiser: torch.optim.Optimizer, path: Path) -> None:
    """Write the per-parameter state (moments, step counts) to ``path``, whole or not at all."""
    tensors = {
        f"{index}.{name}": value.contiguous()
        for index, state in optimiser.state_dict()["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    part = path.with_suffix(".part")
    part.write_bytes(safetensors.torch.save(tensors))
    os.replace(part, path)


def load_state(optimiser: torch.optim.Optimizer, path: Path) -> None:
    """Read back what `save_state` wrote. Raises `Corrupt` when it does not fit the optimiser."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for key, value in safetensors.torch.load(path.read_bytes()).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        document = optimiser.state_dict()
        optimiser.load_state_dict({"state": state, "param_groups": document["param_groups"]})
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise Corrupt(f"{path.name}: the optimiser's state cannot be read ({error}); the run must begin anew") from None
