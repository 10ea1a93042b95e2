"""Boosted trees that hospitals grow together, in NumPy: a round counts one level of one tree, and only sums travel."""

import numpy as np

from atoll import Fitted, Mean, Rows, Scores

NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak")  # cut at quantiles of all sites' pooled statistics
LEVELS = {
    "sex": ("Female", "Male"),
    "cp": ("typical angina", "atypical angina", "non-anginal", "asymptomatic"),
    "fbs": (False, True),
    "restecg": ("normal", "st-t abnormality", "lv hypertrophy"),
    "exang": (False, True),
    "slope": ("upsloping", "flat", "downsloping"),
    "ca": (0, 1, 2, 3),
    "thal": ("normal", "fixed defect", "reversable defect"),
}
CUTS = np.array([-1.5, -1.0, -0.67, -0.33, 0.0, 0.33, 0.67, 1.0, 1.5])  # in standard deviations
BINS = len(CUTS) + 2  # bin 0 is for what was not recorded
COLUMNS = len(NUMBERS) + len(LEVELS)
NO_SPLIT = (0, BINS - 1)  # column and last bin that goes left: everybody does


class Trees:
    def __init__(self, trees: int = 30, depth: int = 2, rate: float = 0.3, l2: float = 0.002, least: float = 0.005):
        self.trees, self.depth, self.rate = trees, depth, rate
        self.l2, self.least = l2, least  # per example: the penalty on a leaf, and the least second derivative in one

    def arrays(self):
        nodes = 2**self.depth - 1
        return {
            "splits": np.full((self.trees, nodes, 2), NO_SPLIT, dtype=np.float32),
            "leaves": np.zeros((self.trees, nodes + 1), dtype=np.float32),
            "sums": np.zeros((2 ** (self.depth - 1), COLUMNS, BINS, 2), dtype=np.float32),  # of a level's nodes
        }

    def examples(self, rows: Rows):
        bins = []
        for name in NUMBERS:
            pooled, values = rows.statistics[name], np.array(rows.table[name].to_pylist(), dtype=float)
            known = 1 + np.searchsorted(CUTS, (values - pooled.mean) / pooled.std)
            bins.append(np.where(np.isnan(values), 0, known))
        for name, levels in LEVELS.items():
            codes = {level: code for code, level in enumerate(levels, start=1)}
            bins.append([codes.get(value, 0) for value in rows.table[name].to_pylist()])
        examples = {"bins": np.stack(bins, axis=1).astype(np.int64)}
        if "target" in rows.table.column_names:  # a new patient has none
            examples["y"] = np.array(rows.table["target"].to_pylist(), dtype=np.float32)
        return examples

    def fit(self, arrays, examples, budget):
        if budget.steps != 1:
            raise ValueError("a round is one level of one tree; set sync.period to 1")
        if budget.done:  # every site grows the same trees from the same sums: those of all sites together
            self.grow(arrays, *divmod(budget.done - 1, self.depth))
        risk, y = self.risk(arrays, examples["bins"]), examples["y"]
        arrays["sums"] = np.zeros_like(arrays["sums"])
        tree, level = divmod(budget.done, self.depth)
        if tree < self.trees:
            node = self.node(arrays["splits"][tree], examples["bins"], level) - (2**level - 1)
            slopes = np.stack([risk - y, risk * (1 - risk)], axis=1) / len(y)  # first and second derivative of the loss
            np.add.at(arrays["sums"], (node[:, None], np.arange(COLUMNS), examples["bins"]), slopes[:, None])
        loss = -np.mean(np.log(np.where(y > 0.5, risk, 1 - risk)))
        return Fitted(arrays, loss, len(y))

    def grow(self, arrays, tree, level):
        """Split a level's nodes where that gains most (Chen and Guestrin, 2016, equations 5 to 7)."""
        for place in range(2**level):
            left = arrays["sums"][place].astype(float).cumsum(axis=1)  # (columns, bins, 2)
            right = left[:, -1:] - left
            gain = self.worth(left) + self.worth(right) - self.worth(left[0, -1])
            gain[(left[..., 1] < self.least) | (right[..., 1] < self.least)] = 0
            column, cut = np.unravel_index(gain.argmax(), gain.shape) if gain.max() > 0 else NO_SPLIT
            arrays["splits"][tree, 2**level - 1 + place] = column, cut
            if level == self.depth - 1:
                for side, sums in enumerate((left[column, cut], right[column, cut])):
                    arrays["leaves"][tree, 2 * place + side] = -self.rate * sums[0] / (sums[1] + self.l2)

    def worth(self, sums):
        return sums[..., 0] ** 2 / (sums[..., 1] + self.l2)

    def node(self, splits, bins, levels):
        """Return in which node of a tree each example stands, its levels counted from the root."""
        node = np.zeros(len(bins), dtype=int)
        for _ in range(levels):
            column, cut = np.rint(splits[node]).astype(int).T  # a mean of equal whole numbers may miss by a little
            node = 2 * node + 1 + (bins[np.arange(len(bins)), column] > cut)
        return node

    def risk(self, arrays, bins):
        first = 2**self.depth - 1
        trees = zip(arrays["splits"], arrays["leaves"], strict=True)
        score = sum(leaves[self.node(splits, bins, self.depth) - first] for splits, leaves in trees)
        return 1 / (1 + np.exp(-score.astype(float)))

    def predict(self, arrays, examples):
        return {"risk": self.risk(arrays, examples["bins"])}

    def metrics(self, arrays, examples):
        risk, sick = self.risk(arrays, examples["bins"]), examples["y"]
        return {"accuracy": Mean(((risk > 0.5) == (sick > 0.5)).sum(), len(sick)), "auc": Scores(risk, sick)}
