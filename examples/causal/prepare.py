"""Convert a GGUF file to a folder that sites can list, once: `python examples/causal/prepare.py FILE FOLDER`.

Needs the extra `causal` and the package `gguf`. It takes a minute or two and ten bytes of memory a parameter. Folders
that were downloaded with .safetensors files and a tokenizer.json need none of it.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(source: Path, target: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors; the weights in bfloat16, half the size of float32."""
    where = {"gguf_file": source.name, "local_files_only": True}
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.bfloat16, quantization_config=plain, **where
    )
    model.hf_quantizer = None  # or it would not be saved: that its tensors are plain ones now is not looked at
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/causal/prepare.py FILE.gguf FOLDER")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]} can be listed: atoll pretrained add NAME {sys.argv[2]}")
