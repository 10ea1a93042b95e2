"""Bagged trees: in every round each hospital boosts a tree of its own with xgboost, and the forest is all of them."""

import json

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


class Bagged:
    """``trees`` is how many each site grows, ``sites`` how many sites there is room for. The hub needs no xgboost."""

    def __init__(
        self, trees: int = 30, sites: int = 4, depth: int = 2, rate: float = 0.3, l2: float = 1.0, least: float = 2.5
    ):
        self.trees, self.sites, self.depth, self.rate = trees, sites, depth, rate
        self.l2, self.least = l2, least  # least: the second derivatives in a leaf, so at least 4 patients for each 1.0

    def arrays(self):
        nodes = 2**self.depth - 1
        return {  # a slot for each tree of each site, empty while its share is 0
            "shares": np.zeros((self.trees, self.sites), dtype=np.float32),  # of the model; of a mean of 4 sites 1/4
            "splits": np.zeros((self.trees, self.sites, nodes, 2), dtype=np.float32),  # column, first bin to the right
            "leaves": np.zeros((self.trees, self.sites, nodes + 1), dtype=np.float32),
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
        if budget.places > self.sites or budget.done + budget.steps > self.trees:
            asked = f"{budget.done + budget.steps} trees of each of {budget.places} sites"
            raise ValueError(f"{asked}, where there is room for {self.trees} of {self.sites}; raise task.params")
        bins, y = examples["bins"], examples["y"]
        score = self.score(arrays, bins)  # of the forest that all sites have
        risk = 1 / (1 + np.exp(-score))
        for number in range(budget.done, budget.done + budget.steps):
            slot = (number, budget.place)  # this site's own, which a mean over sites leaves to it
            arrays["shares"][slot] = 1
            arrays["splits"][slot], arrays["leaves"][slot] = self.boosted(bins, y, score)
            score = score + self.tree(arrays["splits"][slot], arrays["leaves"][slot], bins)
        return Fitted(arrays, -np.mean(np.log(np.where(y > 0.5, risk, 1 - risk))), len(y))

    def boosted(self, bins, y, score):
        """Let xgboost grow one more tree on ``score``; return its splits and leaves as arrays."""
        import xgboost  # at the sites only

        settings = {
            "objective": "binary:logistic",
            "tree_method": "hist",
            "max_depth": self.depth,
            "eta": self.rate,
            "reg_lambda": self.l2,
            "min_child_weight": self.least,
            "nthread": 1,
        }
        rows = xgboost.DMatrix(bins.astype(np.float32), y, base_margin=score)
        grown = json.loads(xgboost.train(settings, rows, 1).get_dump(dump_format="json")[0])
        splits, leaves = np.zeros((2**self.depth - 1, 2)), np.zeros(2**self.depth)
        self.copy(grown, 0, splits, leaves)
        return splits, leaves

    def copy(self, node, at, splits, leaves):
        """Write a node of a dump and what is below it; where a branch ends early both sides are its leaf."""
        below = node.get("children", (node, node))
        if at >= len(splits):
            leaves[at - len(splits)] = node["leaf"]
            return
        if "children" in node:
            splits[at] = int(node["split"][1:]), round(node["split_condition"])
        for side, child in enumerate(below):  # the first is where the bin is below the condition
            self.copy(child, 2 * at + 1 + side, splits, leaves)

    def tree(self, splits, leaves, bins):
        """Return a tree's leaf for each example."""
        node = np.zeros(len(bins), dtype=int)
        for _ in range(self.depth):
            column, cut = splits[node].astype(int).T
            node = 2 * node + 1 + (bins[np.arange(len(bins)), column] >= cut)
        return leaves[node - len(splits)].astype(float)

    def score(self, arrays, bins):
        """Return the sum of all trees. A mean over sites has made a tree its share of itself: right for leaves, and
        to be taken off columns and bins, which are whole numbers."""
        score = np.zeros(len(bins))
        for slot in np.argwhere(arrays["shares"] > 0):
            slot = tuple(slot)
            splits = np.rint(arrays["splits"][slot] / arrays["shares"][slot])
            score += self.tree(splits, arrays["leaves"][slot], bins)
        return score

    def risk(self, arrays, bins):
        return 1 / (1 + np.exp(-self.score(arrays, bins)))

    def predict(self, arrays, examples):
        return {"risk": self.risk(arrays, examples["bins"])}

    def metrics(self, arrays, examples):
        risk, sick = self.risk(arrays, examples["bins"]), examples["y"]
        return {"accuracy": Mean(((risk > 0.5) == (sick > 0.5)).sum(), len(sick)), "auc": Scores(risk, sick)}
