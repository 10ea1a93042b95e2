"""What a step takes of a model in floating point operations, and what a device can do at most: the two halves of MFU.

Per token: 2 operations forward and 2 backward for each parameter that is multiplied with, 2 more for each that is
trained (6 in all; Kaplan et al., 2020, "Scaling laws", section 2.1), and of attention 12 x layers x width x positions
(Chowdhery et al., 2022, "PaLM", appendix B). What is looked up in a table is not multiplied, and is left out; of a
mixture's experts those count that a token goes to. What checkpointing computes anew does not count: it is no progress.
"""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from atoll.inner.plans import blocks, mixtures, plan_of
from atoll.inner.whole import Staged

if TYPE_CHECKING:
    from atoll.inner.pipelined import Pipeline

Precision = Literal["float32", "bfloat16"]
_ENOUGH = 0.02  # seconds of one product, by which a processor is known
_SIDES = (256, 512, 1024)  # of the square matrices
# Dense, in operations a second: bfloat16, and float32 without tensor cores. By the data sheets of NVIDIA (V100 2017,
# A100 2020, A10 2021, H100 2022, L4, L40S and H200 2023) and AMD (MI300X 2023). A part of a device (MIG) has none.
_PEAKS: tuple[tuple[str, float | None, float], ...] = (
    (r"\bH200\b", 989.4e12, 66.9e12),
    (r"\bH100 PCIe\b", 756e12, 51e12),
    (r"\bH100\b", 989.4e12, 66.9e12),
    (r"\bA100\b", 312e12, 19.5e12),
    (r"\bL40S\b", 362e12, 91.6e12),
    (r"\bL4\b", 121e12, 30.3e12),
    (r"\bA10\b", 125e12, 31.2e12),
    (r"\bV100\b", None, 15.7e12),
    (r"\bMI300X\b", 1307.4e12, 163.4e12),
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_measured: dict[Precision, float] = {}  # a processor does not change while a process lives


@dataclass(frozen=True, slots=True)
class Load:
    """What of a batch was this rank's share."""

    examples: int
    tokens: int | None  # None: its arrays hold none
    positions: int  # of one example; 1 where it has no tokens
    flat: bool  # whether each weight is used once for a token, or an example where there are none


def load_of(batch: Mapping[str, torch.Tensor]) -> Load:
    """Measure a share of a batch. Its tokens are its largest array of integers that has two or more dimensions."""
    examples = len(next(iter(batch.values())))
    found = [values for values in batch.values() if values.ndim > 1 and values.dtype in _INTEGERS]
    if not found:
        return Load(examples, None, 1, all(values.ndim < 3 for values in batch.values()))
    most = max(found, key=torch.numel)
    return Load(examples, most.numel(), most.shape[-1], True)


@dataclass(frozen=True, slots=True)
class Demand:
    """Operations that a model needs, forward and backward: for a token, and for a token and each of its positions."""

    token: float
    position: float
    device: torch.device

    def of(self, load: Load) -> float | None:
        """Return the operations for a share of a batch; None where a weight is used we do not know how often."""
        if not load.flat:
            return None
        tokens = load.examples if load.tokens is None else load.tokens
        return tokens * (self.token + self.position * (load.positions if load.tokens is not None else 0))


def demand(model: nn.Module) -> Demand:
    """Return what a model needs; of one in stages, what the stages here do. A cut parameter counts as the whole."""
    parts = list(cast("Pipeline", model).stages.values()) if isinstance(model, Staged) else [model]
    parameter = next(model.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return Demand(sum(map(_of_token, parts)), sum(map(_of_position, parts)), device)


def _of_token(model: nn.Module) -> float:
    chosen = _chosen(model)
    total = 0.0
    for parameter in _multiplied(model):
        total += parameter.numel() * (6 if parameter.requires_grad else 4) * chosen.get(id(parameter), 1.0)
    return total


def _multiplied(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield each parameter once, but for tables that nothing but a look-up uses."""
    told: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in told and not isinstance(module, nn.Embedding):
                told.add(id(parameter))
                yield parameter


def _chosen(model: nn.Module) -> dict[int, float]:
    """Return of experts' parameters, by their identity, the share that a token meets."""
    chosen = plan_of(model, "chosen") or getattr(plan_of(model, "config"), "num_experts_per_tok", None)
    if not isinstance(chosen, int):
        return {}
    shares = {module: chosen / parameters[0].shape[0] for module, parameters in mixtures(model).items()}
    return {id(parameter): share for module, share in shares.items() for parameter in module.parameters()}


def _of_position(model: nn.Module) -> float:
    """Return 12 x layers x width of what attends, where the model tells: as Atoll's GPT, or by transformers' config."""
    config = plan_of(model, "config")
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if isinstance(layers, int) and isinstance(heads, int):
        width = getattr(config, "hidden_size", 0)
        head = getattr(config, "head_dim", None)
        layers = min(layers, len(blocks(model)) or layers)  # a stage has some of them
        return 12.0 * layers * (heads * head if isinstance(head, int) else width)
    widths = plan_of(model, "pipeline_widths")
    if widths is None or not isinstance(plan_of(model, "heads"), int):
        return 0.0
    return 12.0 * len(blocks(model)) * widths[0]


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the operations that a device does in a second at most: an accelerator's by its name, else as measured.

    A processor is measured once in a process, over as many threads as torch uses, which takes some hundredths of a
    second.
    """
    if device.type == "cpu":
        if precision not in _measured:
            _measured[precision] = _measure(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        return _measured[precision]
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), precision)


def known_peak(name: str, precision: Precision) -> float | None:
    """Return the peak of an accelerator of this name, if it is in the table."""
    if "MIG" in name:
        return None
    found = next(((narrow, plain) for pattern, narrow, plain in _PEAKS if re.search(pattern, name)), None)
    return None if found is None else found[0 if precision == "bfloat16" else 1]


def _measure(kind: torch.dtype) -> float:
    """Time products of matrices by the thread's own clock: what others do on the core lowers no peak."""
    best = 0.0
    for side in _SIDES:
        one, made = torch.ones(side, side, dtype=kind), torch.empty(side, side, dtype=kind)  # nothing is drawn
        seconds = min(_product(one, made) for _ in range(2))
        best = max(best, 2 * side**3 / seconds)
        if seconds > _ENOUGH:
            break
    return best


def _product(one: torch.Tensor, made: torch.Tensor) -> float:
    began = time.thread_time()
    torch.mm(one, one, out=made)
    return max(time.thread_time() - began, 1e-6)
