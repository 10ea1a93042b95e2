"""Trees that each site grows for itself: a mean over sites puts them side by side, and NumPy reads them again."""

from pathlib import Path

import numpy as np
import pytest

from atoll.inner.task import load_task
from atoll.outer.merge import Update, merge
from atoll.spec.order import TaskName
from atoll.spec.task import Budget

FOLDER = Path(__file__).parents[2] / "examples" / "bagging"
LEAF, OTHER = {"nodeid": 3, "leaf": -0.5}, {"nodeid": 4, "leaf": 0.25}
# As xgboost dumps a tree of depth 2 whose right side did not split again.
DUMP = {
    "split": "f12",
    "split_condition": 10,
    "children": [{"split": "f1", "split_condition": 3, "children": [LEAF, OTHER]}, {"nodeid": 2, "leaf": 0.75}],
}


def task(**params):
    name = TaskName(file="task.py", name="Bagged", params=params)
    return load_task(FOLDER, name, "train", "evaluate", "predict")


def patients(rows, seed=0):
    """Bins of 13 columns, of which two make ill."""
    rng = np.random.default_rng(seed)
    bins = rng.integers(0, 11, (rows, 13))
    ill = bins[:, 0] + bins[:, 5] + rng.normal(0, 2, rows) > 10
    return {"bins": bins.astype(np.int64), "y": ill.astype(np.float32)}


def vector(arrays):
    return np.concatenate([array.reshape(-1) for array in arrays.values()]).astype(np.float32)


def put_back(arrays, values):
    start = 0
    for array in arrays.values():
        array[...] = values[start : start + array.size].reshape(array.shape)
        start += array.size


def merged(rule, common, updates, weights):
    """Return the arrays after a round of these sites, merged as the hub does."""
    windows = [
        Update(str(number), weight, lambda offset, values=values: values)
        for number, (values, weight) in enumerate(zip(updates, weights, strict=True))
    ]
    made = {name: array.copy() for name, array in common.items()}
    put_back(made, vector(common) + merge(rule, vector(common).size, windows))
    return made


def test_a_dumped_tree_becomes_arrays_with_its_early_leaf_on_both_sides():
    bagged = task(depth=2)
    splits, leaves = np.zeros((3, 2)), np.zeros(4)
    bagged.copy(DUMP, 0, splits, leaves)
    assert splits.tolist() == [[12, 10], [1, 3], [0, 0]]
    assert leaves.tolist() == [-0.5, 0.25, 0.75, 0.75]
    bins = np.zeros((4, 13), dtype=np.int64)
    bins[:, 12], bins[:, 1] = [9, 9, 10, 10], [2, 3, 0, 9]
    assert bagged.tree(splits, leaves, bins).tolist() == [-0.5, 0.25, 0.75, 0.75]


@pytest.mark.parametrize("rule", ["mean", "weighted_mean"])
def test_a_mean_over_sites_is_the_sum_of_their_trees_by_their_shares(rule):
    bagged, rng, bins = task(trees=2, sites=3), np.random.default_rng(1), patients(200)["bins"]
    common, updates, trees = bagged.arrays(), [], []
    weights = [243.0, 97.0, 160.0]
    for place in range(3):
        arrays = bagged.arrays()
        trees.append((np.stack([rng.integers(0, 13, 3), rng.integers(1, 11, 3)], axis=1), rng.normal(size=4)))
        arrays["shares"][0, place] = 1
        arrays["splits"][0, place], arrays["leaves"][0, place] = trees[-1]
        updates.append(vector(arrays))
    shares = np.array(weights) / 500 if rule == "weighted_mean" else np.full(3, 1 / 3)
    forest = merged(rule, common, updates, weights)
    expected = sum(share * bagged.tree(*tree, bins) for share, tree in zip(shares, trees, strict=True))
    np.testing.assert_allclose(bagged.score(forest, bins), expected, atol=1e-6)
    fewer = merged(rule, common, updates[1:], weights[1:])  # the first one's update did not come
    shares = shares[1:] / shares[1:].sum()
    expected = sum(share * bagged.tree(*tree, bins) for share, tree in zip(shares, trees[1:], strict=True))
    np.testing.assert_allclose(bagged.score(fewer, bins), expected, atol=1e-6)


@pytest.mark.parametrize(("done", "places"), [(2, 2), (1, 3)])
def test_more_trees_or_sites_than_there_is_room_for_are_told(done, places):
    bagged = task(trees=2, sites=2)
    budget = Budget(1, 400, done, done + 1, iter(()), 0, places)
    with pytest.raises(ValueError, match=r"room for 2 of 2; raise task\.params"):
        bagged.fit(bagged.arrays(), patients(50), budget)


def test_the_arrays_predict_what_xgboost_does():
    xgboost = pytest.importorskip("xgboost", reason="the extra `trees` is not installed: xgboost was not tried")
    bagged, examples = task(depth=3, least=1.0), patients(300)
    margin = np.random.default_rng(3).normal(size=300)
    splits, leaves = bagged.boosted(examples["bins"], examples["y"], margin)
    settings = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 3, "eta": bagged.rate, "nthread": 1}
    rows = xgboost.DMatrix(examples["bins"].astype(np.float32), examples["y"], base_margin=margin)
    theirs = xgboost.train(settings, rows, 1).predict(rows, output_margin=True) - margin
    np.testing.assert_allclose(bagged.tree(splits, leaves, examples["bins"]), theirs, atol=1e-5)


def test_sites_that_boost_from_a_common_forest_learn_what_all_have():
    pytest.importorskip("xgboost", reason="the extra `trees` is not installed: xgboost was not tried")
    bagged, sites, unseen = task(trees=10, sites=3), [patients(rows, rows) for rows in (90, 150, 240)], patients(500)
    forest, losses = bagged.arrays(), []
    for done in range(0, 10, 2):  # two trees of each site in a round
        rounds = []
        for place, examples in enumerate(sites):
            copies = {name: array.copy() for name, array in forest.items()}
            rounds.append(bagged.fit(copies, examples, Budget(2, 400, done, done + 1, iter(()), place, 3)))
        assert all(work.arrays["shares"][done : done + 2].sum() == 2 for work in rounds)
        updates = [vector(work.arrays) - vector(forest) for work in rounds]
        weights = [float(work.examples) for work in rounds]
        forest = merged("weighted_mean", forest, updates, weights)
        losses.append(np.average([work.loss for work in rounds], weights=weights))
    np.testing.assert_allclose(forest["shares"].sum(axis=1), 1, atol=1e-6)
    assert losses == sorted(losses, reverse=True)
    mean = bagged.metrics(forest, unseen)["accuracy"]
    assert mean.total / mean.count > 0.8
