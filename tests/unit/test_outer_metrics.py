"""Metrics over sites: the same number as over the pooled examples, without the examples."""

import math

import numpy as np
import pytest

from atoll.errors import Invalid
from atoll.outer.metrics import BINS, merge_totals, totals
from atoll.spec.event import Totals
from atoll.spec.task import Mean, Scores


def patients(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return 1 / (1 + np.exp(-(2 * labels - 1 + rng.normal(size=count)))), labels


def test_a_mean_over_sites_is_the_mean_over_examples():
    sites = [totals({"accuracy": Mean(9.0, 10)}), totals({"accuracy": Mean(15.0, 30)})]
    assert merge_totals(sites) == {"accuracy": 0.6}
    assert merge_totals(sites[::-1]) == {"accuracy": 0.6}


def area(labels, scores):
    """The share of pairs in which the positive one scores higher, ties counted half: by definition, pair by pair."""
    over = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return float(np.mean((over > 0) + 0.5 * (over == 0)))


def test_a_power_over_sites_is_that_of_the_mean_over_examples_and_one_beyond_a_float_is_left_out():
    sites = [totals({"perplexity": Mean(total, count, power=True)}) for total, count in ((3.0, 4), (1.0, 1))]
    assert merge_totals(sites) == {"perplexity": pytest.approx(math.exp(4.0 / 5))}
    assert merge_totals([totals({"perplexity": Mean(701.0, 1, power=True)})]) == {}
    with pytest.raises(Invalid, match="metric perplexity: is a mean at some sites"):
        merge_totals([*sites, totals({"perplexity": Mean(1.0, 1)})])


def test_area_of_binned_scores_is_that_of_all_their_pairs():
    scores, labels = patients(500)
    split = [totals({"auc": Scores(scores[part], labels[part])}) for part in (slice(0, 90), slice(90, 500))]
    binned = np.minimum(np.floor(scores * BINS), BINS - 1)
    assert merge_totals(split)["auc"] == pytest.approx(area(labels, binned), abs=1e-12)


def test_area_is_off_by_at_most_half_the_pairs_that_share_a_bin():
    scores, labels = patients(2000)
    counted = totals({"auc": Scores(scores, labels)})["auc"]
    shared = sum(p * n for p, n in zip(counted.positives, counted.negatives, strict=True))
    bound = shared / (2 * sum(counted.positives) * sum(counted.negatives))
    assert bound < 0.02
    assert abs(merge_totals([{"auc": counted}])["auc"] - area(labels, scores)) <= bound


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [([0.1, 0.9], [0, 1], 1.0), ([0.9, 0.1], [0, 1], 0.0), ([0.5, 0.5], [0, 1], 0.5), ([1.0, 0.0], [1, 0], 1.0)],
)
def test_area_of_two(scores, labels, expected):
    assert merge_totals([totals({"auc": Scores(np.array(scores), np.array(labels))})]) == {"auc": expected}


def test_a_site_with_one_class_still_counts_and_a_fleet_with_one_is_left_out():
    low = totals({"auc": Scores(np.array([0.1, 0.2]), np.array([0, 0]))})
    high = totals({"auc": Scores(np.array([0.9]), np.array([True]))})
    assert merge_totals([low]) == {}
    assert merge_totals([low, high]) == {"auc": 1.0}


def test_metrics_without_examples_are_left_out():
    empty = totals({"auc": Scores(np.array([]), np.array([])), "accuracy": Mean(0.0, 0)})
    assert len(empty["auc"].positives) == BINS
    assert merge_totals([empty]) == {}
    assert merge_totals([]) == {}


def test_a_site_may_lack_a_metric():
    assert merge_totals([{}, totals({"loss": Mean(3.0, 2)})]) == {"loss": 1.5}


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (Scores(np.array([0.5, math.nan]), np.array([0, 1])), "finite"),
        (Scores(np.array([0.5, 1.01]), np.array([0, 1])), "from 0 to 1"),
        (Scores(np.array([-0.1]), np.array([0])), "from 0 to 1"),
        (Scores(np.array([0.5]), np.array([2])), "labels"),
        (Scores(np.array([0.5, 0.5]), np.array([1])), "flat arrays"),
        (Scores(np.array([[0.5]]), np.array([[1]])), "flat arrays"),
        (Mean(math.nan, 3), "finite"),
        (Mean(1.0, -3), "count"),
        (Mean(1.0, 2.5), "whole count"),
        (Mean("many", 2), "number"),
        (0.9, "float: must be a Mean or Scores"),
    ],
)
def test_a_wrong_metric_is_refused_by_name(metric, words):
    with pytest.raises(Invalid, match=rf"metric quality: .*{words}"):
        totals({"quality": metric})


@pytest.mark.parametrize(
    "other",
    [
        Totals(total=1.0, count=1),
        Totals(positives=(1,) * 8, negatives=(1,) * 8),
        Totals(positives=(1,) * BINS),
    ],
)
def test_sites_must_agree_on_a_metrics_form(other):
    good = totals({"auc": Scores(np.array([0.2, 0.8]), np.array([0, 1]))})
    with pytest.raises(Invalid, match="metric auc"):
        merge_totals([good, {"auc": other}])


def test_totals_too_large_to_add_are_refused():
    with pytest.raises(Invalid, match="too large"):
        merge_totals([{"loss": Totals(total=1.7e308, count=1)}, {"loss": Totals(total=1.7e308, count=1)}])
