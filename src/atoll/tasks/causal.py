"""Fine-tuning of a causal language model of transformers from a folder at each site, by LoRA or whole.

The folder is what `task.pretrained` names. By LoRA its tensors are frozen and no part of the model's state, so that
only the adapter is exchanged, kept and registered.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import nn

from atoll.errors import TaskFailed
from atoll.spec.document import Document, near_miss, parse
from atoll.spec.pretrained import Pretrained
from atoll.spec.task import Mean, Rows
from atoll.tasks.pretrained import Lora, adapt, causal_model, table, tokenizer

_NOTHING = -1  # in the place of a token: to the right of a text's end, to the left of a short prompt
_ROOM = 256 << 20  # bytes that the scores of one piece may take where there is no gradient


class _Options(Document):
    column: str
    block: int = Field(ge=2)
    new: PositiveInt


class CausalLM:
    """A task as it is: name the class in a file beside the job, and the folder by ``task.pretrained``.

    An example is ``block`` tokens of the column's texts, which are joined with an end-of-text token after each; so a
    job's `batch` counts blocks. Metrics are the mean loss in nats a token, and the perplexity. What is predicted for
    a text is its ``completion`` by the likeliest ``new`` tokens, of which the last ``block`` tokens are read.
    """

    def __init__(
        self,
        pretrained: Pretrained | None = None,
        column: str = "text",
        block: int = 256,
        lora: Mapping[str, Any] | None = None,
        full: bool = False,
        new: int = 40,
    ) -> None:
        """``lora`` are the options of `Lora`; with ``full`` every tensor is trained, and exchanged, instead."""
        if pretrained is None:
            raise TaskFailed("task.pretrained: CausalLM needs a folder's digest; `atoll pretrained list` shows them")
        if full and lora is not None:
            raise TaskFailed("task.params: lora and full: true exclude each other; remove one")
        options = parse(_Options, {"column": column, "block": block, "new": new}, "task.params")
        self._files, self._column, self._block, self._new = pretrained, options.column, options.block, options.new
        self._lora = None if full else parse(Lora, dict(lora or {}), "task.params.lora")
        self._config = table(pretrained, "config.json")
        self._tokenizer: Any = None
        self._check_length()

    # --- what a task is

    def model(self) -> nn.Module:
        """Return the folder's model in float32, frozen below a new adapter unless all of it is trained."""
        made = causal_model(self._files, self._config)
        if self._lora is not None:
            adapt(made, self._lora)
        return made

    def examples(self, rows: Rows) -> dict[str, np.ndarray]:
        """Return blocks of the texts as int32 of shape (blocks, block); to predict, a prompt for each row."""
        if self._column not in rows.table.column_names:
            near = near_miss(self._column, rows.table.column_names)
            raise TaskFailed(f"task.params.column: the dataset has no {self._column!r}{near}")
        texts = ["" if text is None else str(text) for text in rows.table[self._column].to_pylist()]
        return {"tokens": self._prompts(texts) if rows.asked else self._blocks(texts)}

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean loss over the batch's tokens but each block's first."""
        total, count = _summed(model, batch["tokens"])
        return total / max(count, 1)

    def metrics(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, Mean]:
        total, count = 0.0, 0
        for piece in self._pieces(batch["tokens"]):
            found, counted = _summed(model, piece)
            total, count = total + float(found), count + counted
        return {"loss": Mean(total, count), "perplexity": Mean(total, count, power=True)}

    def predict(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
        from transformers import GenerationConfig

        ends = self._ends()
        asked = GenerationConfig(
            max_new_tokens=self._new, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
        )
        told: list[str] = []
        for piece in self._pieces(batch["tokens"]):
            there = piece != _NOTHING
            ids = piece.clamp(min=0).long()
            found = cast("Any", model).generate(ids, attention_mask=there.long(), generation_config=asked)
            told += self._reader().decode_batch(found[:, piece.shape[1] :].tolist())
        return {"completion": told}

    # --- text to tokens

    def _blocks(self, texts: Sequence[str]) -> np.ndarray:
        ends, reader = self._ends()[:1], self._reader()
        joined: list[int] = []
        for text in filter(None, texts):
            ids = reader.encode(text).ids
            joined += ids if ids[-1:] == ends else [*ids, *ends]
        if len(joined) < 2:
            raise TaskFailed(f"task.params.column: {self._column!r} holds no text; name the column that does")
        if len(joined) % self._block == 1:
            joined.pop()  # alone in a block it would predict nothing
        self._check_tokens(joined)
        blocks = np.full((-(-len(joined) // self._block), self._block), _NOTHING, dtype=np.int32)
        blocks.reshape(-1)[: len(joined)] = joined
        return blocks

    def _prompts(self, texts: Sequence[str]) -> np.ndarray:
        reader, empty = self._reader(), self._ends()[:1] or [0]
        prompts = np.full((len(texts), self._block), _NOTHING, dtype=np.int32)
        for row, text in zip(prompts, texts, strict=True):
            ids = (reader.encode(text).ids or empty)[-self._block :]
            self._check_tokens(ids)
            row[-len(ids) :] = ids
        return prompts

    def _reader(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = tokenizer(self._files)
        return self._tokenizer

    def _ends(self) -> list[int]:
        """Return the tokens that end a text, the one to write first."""
        found = self._config.get("eos_token_id")
        ends = found if isinstance(found, list) else [found]
        return [end for end in ends if isinstance(end, int)]

    def _check_tokens(self, ids: Sequence[int]) -> None:
        known = self._config.get("vocab_size")
        if isinstance(known, int) and max(ids) >= known:
            raise TaskFailed(f"pretrained: tokenizer.json makes token {max(ids)} where config.json knows {known}")

    def _check_length(self) -> None:
        most = self._config.get("max_position_embeddings", self._config.get("n_positions"))
        if isinstance(most, int) and self._block + self._new > most:
            raise TaskFailed(
                f"task.params: block {self._block} and new {self._new} are more than the {most} places that the model "
                f"knows; set block to {max(most - self._new, 2)} at most, or lower new"
            )

    def _pieces(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        known = self._config.get("vocab_size")
        scores = 4 * tokens.shape[1] * (known if isinstance(known, int) else 1 << 17)
        return iter(tokens.split(max(1, _ROOM // scores)))


def _summed(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of losses over the blocks' tokens but the first of each, and how many these are."""
    goals = tokens[:, 1:].long()
    scores = model(input_ids=tokens[:, :-1].clamp(min=0).long(), use_cache=False).logits.float()
    total = nn.functional.cross_entropy(scores.flatten(0, 1), goals.flatten(), ignore_index=_NOTHING, reduction="sum")
    return total, int((goals != _NOTHING).sum())
