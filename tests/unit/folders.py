"""A causal model small enough for a test, saved as its users have it: a folder of safetensors and JSON."""

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path

import pytest

# Looked for and not imported: that takes seconds, which collecting the tests has no need of.
NEEDED = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("peft")),
    reason="the extra `causal` is not installed here: pip install -e '.[causal]'",
)
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs. "


def save(folder: Path, kind: str = "llama", seed: int = 0, **fields) -> Path:
    """Write a random model of two layers and a tokenizer of bytes, with 256 for the end of a text."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.manual_seed(seed)
    ends = {"bos_token_id": 256, "eos_token_id": 256, "vocab_size": 257}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind == "llama":
        made = LlamaForCausalLM(LlamaConfig(**{**ends, **sizes, **fields}))
    elif kind == "mixtral":
        made = MixtralForCausalLM(MixtralConfig(**{**ends, **sizes, "num_local_experts": 4, **fields}))
    else:
        made = GPT2LMHeadModel(GPT2Config(**{**ends, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}))
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress
        made.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({**{sign: at for at, sign in enumerate(alphabet)}, "<end>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
