"""Gradients across a mesh: what the backward pass left to be summed, and the norm of all of it, each number once."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from atoll.inner.mesh import Mesh
from atoll.inner.whole import gradient_of, here

_BUCKET = 1 << 22  # numbers in one sum


def sum_over(mesh: Mesh, axis: str, parameters: Iterable[torch.nn.Parameter], times: float = 1.0) -> None:
    """Sum gradients over an axis whose ranks hold the same parameters and saw different tokens, ``times`` a number.

    Those of parameters that are cut along the axis are whole already. One that no rank has stays away.
    """
    group = mesh.axis(axis).get_group()
    for bucket in _buckets(p for p in parameters if p.requires_grad and not _cut_along(p, axis)):
        there = torch.tensor([float(p.grad is not None) for p in bucket])
        dist.all_reduce(there, group=group)
        taken = [p for p, ranks in zip(bucket, there.tolist(), strict=True) if ranks]
        for parameter in taken:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [here(gradient_of(p)) for p in taken]
        if not parts:
            continue
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        for part, made in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(made.view(part.shape) * times)


def clip(mesh: Mesh, parameters: Iterable[torch.nn.Parameter], most: float) -> float:
    """Scale all gradients so that their joint L2 norm over the mesh is at most ``most``; return what it was.

    A part that several ranks hold counts as a share at each, so that one sum over all ranks gives the whole.
    """
    gradients = [(p, gradient_of(p)) for p in parameters if p.grad is not None]
    total = torch.zeros(1, dtype=torch.float64)
    for parameter, gradient in gradients:
        total += here(gradient).double().square().sum().cpu() / copies(mesh, parameter)
    norm = float(mesh.sum(total).sqrt())
    if norm > most:
        for _, gradient in gradients:
            here(gradient).mul_(most / norm)
    return norm


def copies(mesh: Mesh, parameter: torch.Tensor) -> float:
    """Return how many ranks hold the same part of a parameter, and with it the same gradient."""
    parts = mesh.layout.pipeline if mesh.device is not None else 1
    if isinstance(parameter, DTensor):
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            parts *= 1 if placement.is_replicate() else size
    return mesh.ranks / parts


def _cut_along(parameter: torch.Tensor, axis: str) -> bool:
    return isinstance(parameter, DTensor) and axis in (parameter.device_mesh.mesh_dim_names or ())


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += here(parameter).numel()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
