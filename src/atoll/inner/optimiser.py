"""Inner optimisers by document, and their state as named tensors."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from atoll.errors import Corrupt
from atoll.inner.whole import part
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
    rate, decay, fused = optimiser.rate, optimiser.weight_decay, _fusible(trained)
    match optimiser.kind:
        case "sgd":
            return _SGD(trained, lr=rate, momentum=optimiser.momentum, weight_decay=decay)
        case "adam":
            return _ADAM(trained, lr=rate, weight_decay=decay, fused=fused)
        case "adamw":
            return _ADAMW(trained, lr=rate, weight_decay=decay, fused=fused)


def _fusible(trained: Sequence[torch.nn.Parameter]) -> bool:
    """Whether one kernel can take Adam's step for all of them: in 5 ms instead of 18 for 10 M numbers on 2 cores.

    Torch (2.13) has it for real numbers on processors and NVIDIA's accelerators, and not for tensors of which some
    are cut over a mesh and others are not, or over other meshes; for SGD, not for any that are cut.
    """
    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
    return bool(trained) and plain and len({getattr(p, "device_mesh", None) for p in trained}) == 1


def state(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the per-parameter state (moments, step counts), named ``<parameter's number>.<name>``; not copied."""
    return {
        f"{index}.{name}": value
        for index, of_one in optimiser.state_dict()["state"].items()
        for name, value in of_one.items()
        if isinstance(value, torch.Tensor)
    }


def put_state(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser the state that `state` returned. Raises `Corrupt` when it is another optimiser's."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        fits = number.isdecimal() and int(number) < len(parameters)
        if not fits or (value.ndim and value.shape != parameters[int(number)].shape):
            raise Corrupt(f"optimiser: its state has a tensor {key[:40]!r} that fits no parameter; begin the run anew")
        found.setdefault(int(number), {})[name] = part(value, parameters[int(number)]) if value.ndim else value
    optimiser.load_state_dict({"state": found, "param_groups": optimiser.state_dict()["param_groups"]})


def put_parts(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser its state of which each tensor is this rank's part, as its parameter is cut."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise Corrupt(f"optimiser: its state has a tensor {key[:40]!r} of no parameter; begin the run anew")
        parameter = parameters[int(number)].detach()
        if value.ndim and hasattr(parameter, "to_local"):
            cut = torch.empty_like(parameter)
            cut.to_local().copy_(value)  # pyright: ignore[reportAttributeAccessIssue]
            value = cut
        found.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": found, "param_groups": optimiser.state_dict()["param_groups"]})
