"""A small GPT that reads and writes Python, byte by byte: no tokenizer, 256 symbols."""

import numpy as np
import torch
from torch import nn

from atoll import Mean, Rows


class GPT(nn.Module):
    def __init__(self, context: int, width: int, layers: int, heads: int):
        super().__init__()
        self.symbol = nn.Embedding(256, width)
        self.place = nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        for weight in (self.symbol.weight, self.place.weight, self.head.weight):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, length) -> (batch, length, 256)
        past = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.symbol(x) + self.place.weight[: x.shape[1]]
        return self.head(self.blocks(h, mask=past, is_causal=True))


class Coder:
    def __init__(self, context: int = 64, width: int = 192, layers: int = 2, heads: int = 6):
        self.context, self.shape = context, (context, width, layers, heads)

    def model(self) -> nn.Module:
        return GPT(*self.shape)

    def examples(self, rows: Rows) -> dict[str, np.ndarray]:
        size, windows = self.context + 1, []  # every byte but a window's first is predicted from those before it
        for text in rows.table["text"].to_pylist():
            code = np.frombuffer(text.encode().rjust(size), dtype=np.uint8)  # a short text, or prompt, is one window
            windows.append(code[: len(code) // size * size].reshape(-1, size))
        return {"x": np.concatenate(windows)}

    def loss(self, model, batch):
        x = batch["x"].long()
        return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def predict(self, model, batch):
        x = batch["x"].long()
        for _ in range(40):  # the likeliest next byte, forty times
            x = torch.cat([x, model(x[:, -self.context :])[:, -1:].argmax(-1)], dim=1)
        return {"completion": [bytes(row[-40:].tolist()).decode(errors="replace") for row in x]}

    def metrics(self, model, batch):
        parts = batch["x"].split(32)
        return {"loss": Mean(sum(self.loss(model, {"x": part}).item() * len(part) for part in parts), len(batch["x"]))}
