"""Which digit is it? A small convolutional network on 8 x 8 grey values."""

import numpy as np
from torch import nn

from atoll import Mean, Rows


class Digits:
    def __init__(self, channels: int = 16):
        self.channels = channels

    def model(self) -> nn.Module:
        c = self.channels
        return nn.Sequential(
            nn.Conv2d(1, c, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(c, 2 * c, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * c * 4 * 4, 10),
        )

    def examples(self, rows: Rows) -> dict[str, np.ndarray]:
        pixels = np.array(rows.table["pixels"].to_pylist(), dtype=np.float32) / 16
        examples: dict[str, np.ndarray] = {"x": pixels.reshape(-1, 1, 8, 8)}
        if "digit" in rows.table.column_names and not rows.table["digit"].null_count:  # a new image has none
            examples["y"] = np.array(rows.table["digit"].to_pylist(), dtype=np.int64)
        return examples

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    def predict(self, model, batch):
        chances = model(batch["x"]).softmax(-1)
        return {"digit": chances.argmax(-1), "chance": chances.amax(-1)}

    def metrics(self, model, batch):
        right = (self.predict(model, batch)["digit"] == batch["y"]).sum().item()
        return {"accuracy": Mean(right, len(batch["y"]))}
