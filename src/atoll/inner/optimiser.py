"""Inner optimisers by document, and their state as named tensors."""

import inspect
from collections.abc import Callable, Mapping, Sequence

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


def make(optimiser: Optimiser, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the torch optimiser that the document names, for what is trained of a model."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rate, decay, fused = optimiser.rate, optimiser.weight_decay, _fusible([parameter for _, parameter in trained])
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
    """Return the per-parameter state (moments, step counts), named ``<name>.<parameter's name>``; not copied."""
    return {
        f"{kind}.{name}": value
        for name, parameter in _named(optimiser).items()
        for kind, value in optimiser.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def room(optimiser: torch.optim.Optimizer, name: str, kind: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor for what `state` names so, of this shape, in parts as its parameter is; it has no values yet.

    Raises `Corrupt` when it is another optimiser's.
    """
    parameter = _named(optimiser).get(name.partition(".")[2])
    if parameter is None or (shape and tuple(shape) != tuple(parameter.shape)):
        raise Corrupt(f"optimiser: its state has a tensor {name[:40]!r} that fits no parameter; begin the run anew")
    if shape:
        return torch.empty_like(parameter.detach(), dtype=kind)
    return torch.empty((), dtype=kind, device=parameter.device if optimiser.defaults.get("fused") else None)


def put_state(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser state as `room` made it, in place of what it has; not copied."""
    optimiser.state.clear()
    parameters = _named(optimiser)
    for name, value in tensors.items():
        kind, _, of = name.partition(".")
        optimiser.state[parameters[of]][kind] = value


def _named(optimiser: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    (group,) = optimiser.param_groups
    return dict(zip(group["param_names"], group["params"], strict=True))
