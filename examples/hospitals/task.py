"""Risk of heart disease from what a hospital recorded, and from what it did not."""

import numpy as np
import torch
from torch import nn

from atoll import Mean, Rows, Scores

NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak")  # standardised by all sites' pooled statistics
LEVELS = {  # anything else counts as not recorded, which is a level of its own
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": (False, True),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "exang": (False, True),
    "slope": ("upsloping", "flat", "downsloping"),
    "ca": (0, 1, 2, 3),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
WIDTH = 2 * len(NUMBERS) + sum(len(levels) + 1 for levels in LEVELS.values())


class Heart:
    def __init__(self, hidden: int = 0, scales: dict | None = None):
        self.hidden = hidden  # 0: logistic regression; else a network with one hidden layer of this width
        self.scales = scales  # mean and deviation of each number, given by the job: then nothing of the data is pooled

    def model(self) -> nn.Module:
        if self.hidden:
            return nn.Sequential(nn.Linear(WIDTH, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))
        model = nn.Linear(WIDTH, 1)
        nn.init.zeros_(model.weight)  # the problem is convex; what no hospital recorded keeps weight 0
        return model

    def examples(self, rows: Rows) -> dict[str, np.ndarray]:
        columns = {name: rows.table[name].to_pylist() for name in (*NUMBERS, *LEVELS)}
        features = []
        for name in NUMBERS:
            mean, std, known = self.scale(name, rows)
            values = np.array(columns[name], dtype=float)  # null becomes nan
            missing = np.isnan(values) | (not known)
            features += [np.where(missing, 0.0, (values - mean) / std), missing]
        for name, levels in LEVELS.items():
            known = [[value == level for level in levels] for value in columns[name]]
            features += [*np.transpose(known), ~np.any(known, axis=1)]
        examples = {"x": np.stack(features, axis=1).astype(np.float32)}
        if "target" in rows.table.column_names:  # a new patient has none
            examples["y"] = np.array(rows.table["target"].to_pylist(), dtype=np.float32)
        return examples

    def scale(self, name: str, rows: Rows) -> tuple[float, float, bool]:
        if self.scales is not None:
            return (*self.scales[name], True)
        pooled = rows.statistics[name]
        return pooled.mean, pooled.std, pooled.count > 0

    def loss(self, model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["y"])

    def predict(self, model, batch):
        return {"risk": torch.sigmoid(model(batch["x"])[:, 0])}

    def metrics(self, model, batch):
        risk, sick = self.predict(model, batch)["risk"], batch["y"]
        right = ((risk > 0.5) == (sick > 0.5)).sum().item()
        return {"accuracy": Mean(right, len(sick)), "auc": Scores(risk.numpy(), sick.numpy())}
