"""Atoll's reference GPT: a decoder, dense or a mixture of experts, which carries the plan of its spread over ranks.

It knows nothing of ranks itself. `atoll.inner.parallelize` reads the plan: names of its modules by pattern, ``*`` for a
number, in the manner of transformers' `tp_plan`. Another model that carries such a plan is spread in the same way.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from atoll.errors import TaskFailed


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a GPT. ``experts`` 0 is the dense one; of others each token goes to its best ``chosen``."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int  # the most positions of a sequence
    experts: int = 0
    chosen: int = 2


class Attend(nn.Module):
    """Causal attention of q, k, v, each ``(batch, heads, positions, head width)``; a module so that it has a name."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    """Multi-head attention, whose number of heads here follows from how wide its matrices are."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._head = shape.width // shape.heads
        self.query, self.key, self.value, self.out = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))
        self.attend = Attend()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, positions, _ = x.shape
        q, k, v = (
            matrix(x).view(batch, positions, -1, self._head).transpose(1, 2)
            for matrix in (self.query, self.key, self.value)
        )
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, positions, -1))


class Dense(nn.Module):
    """The two-layer perceptron of a dense block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x)))


class Experts(nn.Module):
    """Perceptrons side by side: each takes its own tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = 4 * shape.width
        self.up = nn.Parameter(torch.randn(shape.experts, inner, shape.width) * 0.02)
        self.down = nn.Parameter(torch.randn(shape.experts, shape.width, inner) * 0.02)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Take tokens ``(tokens, width)`` in order of their experts and ``counts``, how many are for each expert."""
        parts = x.split(counts.tolist())
        made = [functional.gelu(part @ self.up[n].T) @ self.down[n].T for n, part in enumerate(parts)]
        return torch.cat(made)


class Sparse(nn.Module):
    """A mixture of experts (Shazeer et al., 2017), without a limit to an expert's tokens: none is dropped."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._chosen, self._experts = shape.chosen, shape.experts
        self.router = nn.Linear(shape.width, shape.experts, bias=False)
        self.experts = Experts(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        share, chosen = self.router(tokens).softmax(-1).topk(self._chosen, dim=-1)
        share = (share / share.sum(-1, keepdim=True)).reshape(-1, 1)
        chosen = chosen.reshape(-1)
        order = chosen.argsort(stable=True)
        owner = order // self._chosen
        made = self.experts(tokens[owner], torch.bincount(chosen, minlength=self._experts))
        return torch.zeros_like(tokens).index_add(0, owner, (made * share[order]).to(tokens.dtype)).view(x.shape)


class Block(nn.Module):
    """Attention and a perceptron, each beside a residual connection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.inner = Sparse(shape) if shape.experts else Dense(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x))
        return x + self.inner(self.between(x))


class Embed(nn.Module):
    """Tokens and their learned positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.length, shape.width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))


class GPT(nn.Module):
    """Tokens ``(batch, positions)`` to logits ``(batch, positions, vocabulary)``."""

    # How it is spread; see `atoll.inner.parallelize`.
    tp_plan: ClassVar[Mapping[str, str]] = {
        "blocks.*.attention.query": "colwise",
        "blocks.*.attention.key": "colwise",
        "blocks.*.attention.value": "colwise",
        "blocks.*.attention.out": "rowwise",
        "blocks.*.inner.up": "colwise",
        "blocks.*.inner.down": "rowwise",
        "head": "colwise_gather_output",
    }
    context_plan: ClassVar[Mapping[str, str]] = {
        "embed": "split",
        "blocks.*.attention.attend": "attend",
        "head": "gather",
    }
    expert_plan: ClassVar[Mapping[str, str]] = {"blocks.*.inner.experts": "grouped"}

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if shape.width % shape.heads:
            raise TaskFailed(f"width: {shape.width}: is no multiple of {shape.heads} heads; change either")
        if shape.experts and shape.chosen > shape.experts:
            raise TaskFailed(f"chosen: {shape.chosen}: there are {shape.experts} experts; lower it")
        self.heads, self.layers, self.chosen = shape.heads, shape.layers, shape.chosen
        self.pipeline_widths = (shape.width, shape.vocabulary)
        self.embed: nn.Module | None = Embed(shape)
        self.blocks = nn.ModuleDict({str(number): Block(shape) for number in range(shape.layers)})
        self.norm: nn.Module | None = nn.LayerNorm(shape.width)
        self.head: nn.Module | None = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))

    def pipeline_split(self, stages: int) -> list[nn.Module]:
        """Return the model as consecutive stages, whose tensors are this model's own and bear the same names.

        Between two of them goes a tensor ``(batch, positions, pipeline_widths[0])``; the last gives ``(batch,
        positions, pipeline_widths[1])``. Raises `TaskFailed` for more stages than there are layers.
        """
        layers = len(self.blocks)
        if stages > layers:
            raise TaskFailed(f"layout.pipeline: {stages} stages of {layers} layers; set it so that each has one")
        ends = [number * layers // stages for number in range(stages + 1)]
        return [self._part(first, last) for first, last in pairwise(ends)]

    def _part(self, first: int, last: int) -> nn.Module:
        part = copy.copy(self)
        part.__dict__["_modules"] = dict(self._modules)
        part.blocks = nn.ModuleDict({str(n): self.blocks[str(n)] for n in range(first, last)})
        if first:
            part.embed = None
        if last < len(self.blocks):
            part.norm = part.head = None
        return part
