"""A folder's causal model as transformers builds it, and an adapter by peft: nothing but verified bytes is loaded.

Only safetensors and JSON are read, no code of a folder is run, and no network is asked for what a folder lacks.
"""

import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from atoll.errors import Invalid, TaskFailed, Unavailable
from atoll.spec.document import Document
from atoll.spec.pretrained import Pretrained

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when one of the libraries is imported
_MEND = "install it where workers run: pip install 'atoll[causal]'"


class Lora(Document):
    """An adapter of low rank beside some of the linear layers (Hu et al., 2021)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = Field(default=0.0, ge=0, lt=1)  # drawn anew for each step, as a function of (seed, step, rank)
    targets: str | tuple[str, ...] = "all-linear"  # ends of modules' names, such as [q_proj, v_proj]


def table(files: Pretrained, name: str) -> dict[str, Any]:
    """Return what a JSON file of the folder says; raise `Invalid` for anything but a table."""
    try:
        found = json.loads(files.read(name))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Invalid(f"pretrained: {name} is no table in JSON; mend the folder and add it again")
    return found


def tokenizer(files: Pretrained) -> Any:
    """Return the `tokenizers.Tokenizer` of the folder, which cuts nothing off and adds nothing to fill up."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise Unavailable(f"atoll.tasks.CausalLM needs {error.name}; {_MEND}") from None
    made = Tokenizer.from_buffer(files.read("tokenizer.json"))
    made.no_truncation()
    made.no_padding()
    return made


def causal_model(files: Pretrained, config: Mapping[str, Any]) -> nn.Module:
    """Return the folder's model, in float32 whatever its files hold, all of it to be trained.

    Raises `TaskFailed` for a model that transformers does not know as a causal one, and unless the files hold every
    tensor of it; `Corrupt` when they are not those that were listed.
    """
    try:
        import transformers  # takes seconds
    except ImportError as error:
        raise Unavailable(f"atoll.tasks.CausalLM needs {error.name}; {_MEND}") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if "quantization_config" in config:
        raise TaskFailed("pretrained: config.json says quantization_config; convert the weights to plain ones first")
    said = {name: value for name, value in config.items() if name != "auto_map"}  # which would name code to run
    try:
        known = transformers.AutoConfig.for_model(**said)
        kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(known)]
    except (KeyError, ValueError, TypeError):
        words = f"pretrained: config.json says model_type {str(config.get('model_type'))[:60]!r}"
        raise TaskFailed(f"{words}, of which transformers {transformers.__version__} knows no causal model") from None
    made, told = kind.from_pretrained(
        None,
        config=known,
        state_dict=_tensors(files),
        dtype=torch.float32,
        attn_implementation="sdpa" if kind._supports_sdpa else "eager",  # a name in config.json might be one of code
        ignore_mismatched_sizes=True,  # they are told here, and in a sentence
        output_loading_info=True,
    )
    lacking = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if lacking:
        raise TaskFailed(f"pretrained: {len(lacking)} tensors are not there as config.json wants them: {lacking[0]}")
    return made


def adapt(model: nn.Module, lora: Lora) -> None:
    """Put adapters beside linear layers, in place. All else is frozen, and no part of the model's state any more."""
    try:
        import peft
    except ImportError as error:
        raise Unavailable(f"atoll.tasks.CausalLM needs {error.name}; {_MEND}") from None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    scale: Any = lora.alpha  # which peft only divides by the rank: it need not be the int that it is declared as
    wanted = peft.LoraConfig(
        r=lora.rank, lora_alpha=scale, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft says of transformers' newest release is not the user's to mend
            peft.inject_adapter_in_model(wanted, model)
    except ValueError as error:
        if lora.dropout and "lora_dropout" in str(error):
            raise TaskFailed(
                f"task.params.lora.dropout: {lora.dropout}: the targets take in experts, before which peft drops "
                "nothing; set it to 0, or targets to other layers, such as [q_proj, v_proj]"
            ) from None
        known = ", ".join(sorted(linear))
        raise TaskFailed(f"task.params.lora.targets: {targets!r} fits no layer; there is {known}") from None
    model.register_state_dict_post_hook(_leave_what_is_trained)


def _leave_what_is_trained(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    trained = {f"{prefix}{name}" for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name in state.keys() - trained:
        del state[name]


def _tensors(files: Pretrained) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in sorted(name for name in files.files if name.endswith(".safetensors")):
        try:
            found |= safetensors.torch.load(files.read(name))
        except safetensors.SafetensorError as error:
            raise TaskFailed(f"pretrained: {name} is no safetensors file ({error}); convert it again") from None
    return found
