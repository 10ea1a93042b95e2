"""How metrics cross a border: sums, counts and histograms leave a site, and become the metric over all examples."""

import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import TypeAdapter, ValidationError

from atoll.errors import Invalid
from atoll.spec.document import Label
from atoll.spec.event import Totals
from atoll.spec.task import Mean, Scores

BINS = 64  # equal bins of a score histogram on [0, 1]
_LIMIT = 32  # metrics of one task
_HIGHEST = 700.0  # e to the power of more is beyond what a float holds, and is left out
_LABEL: TypeAdapter[str] = TypeAdapter(Label)


def totals(metrics: Mapping[str, Mean | Scores]) -> dict[str, Totals]:
    """Return each metric in the form in which it may leave the site; no example's own value is in it.

    Scores become one histogram of `BINS` bins per class; bin i holds scores in [i/64, (i+1)/64), the last one also 1.
    Raises `Invalid`, naming the metric, for values that are not finite, scores outside [0, 1], labels other than 0, 1,
    and for names that may not leave. No sentence quotes a value: it may be one example's.
    """
    if len(metrics) > _LIMIT:
        raise Invalid(f"metrics: {len(metrics)} of them where {_LIMIT} may leave the site; return fewer")
    for name in metrics:
        _check_name(name)
    return {name: _totals(name, value) for name, value in metrics.items()}


def merge_totals(sites: Sequence[Mapping[str, Totals]]) -> dict[str, float]:
    """Return each metric over all sites' examples: a mean, e to its power, or the area under the ROC curve.

    The area is the Mann-Whitney count over pairs with ties counted half; scores of one bin count as tied, so it is off
    by at most half the share of pairs that fall into one bin. A metric without examples, with one class only, or beyond
    a float is left out. The order of sites does not matter. Raises `Invalid` when sites' forms of a metric differ.
    """
    names = dict.fromkeys(name for site in sites for name in site)
    merged = {name: _merged(name, [site[name] for site in sites if name in site]) for name in names}
    return {name: value for name, value in merged.items() if value is not None}


def _check_name(name: str) -> None:
    try:
        _LABEL.validate_python(name)
    except ValidationError:
        raise Invalid(
            f"metric {name[:128]!r}: a name is up to 128 letters, digits, _ . -, and begins with none of the last two"
        ) from None


def _totals(name: str, metric: Mean | Scores) -> Totals:
    if isinstance(metric, Scores):
        return _histograms(name, metric)
    if not isinstance(metric, Mean):
        raise Invalid(f"metric {name}: {type(metric).__name__}: must be a Mean or Scores; give Mean(sum, examples)")
    try:
        total, count = float(metric.total), operator.index(metric.count)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
        raise Invalid(f"metric {name}: must be a number and a whole count; give Mean(sum, examples)") from None
    if not math.isfinite(total) or count < 0:
        raise Invalid(f"metric {name}: its total must be finite and its count 0 or more; mend the task's metrics")
    return Totals(total=total, count=count, power=bool(metric.power))


def _histograms(name: str, metric: Scores) -> Totals:
    scores, labels = np.asarray(metric.scores), np.asarray(metric.labels)
    if scores.ndim != 1 or labels.shape != scores.shape:
        raise Invalid(
            f"metric {name}: scores {scores.shape}, labels {labels.shape}: give two flat arrays of one length"
        )
    if not bool(((scores >= 0) & (scores <= 1)).all()):  # NaN is in no range
        raise Invalid(f"metric {name}: scores must be finite and from 0 to 1; apply a sigmoid to logits")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise Invalid(f"metric {name}: labels must be 0 or 1; compare the class with the positive one")
    bins = np.minimum((scores.astype(np.float64) * BINS).astype(np.int64), BINS - 1)
    positives = np.bincount(bins[labels == 1], minlength=BINS)
    negatives = np.bincount(bins[labels == 0], minlength=BINS)
    return Totals(positives=tuple(positives.tolist()), negatives=tuple(negatives.tolist()))


def _merged(name: str, parts: list[Totals]) -> float | None:
    forms = {(len(part.positives), len(part.negatives)) for part in parts}
    if forms == {(BINS, BINS)}:
        return _area(parts)
    if forms != {(0, 0)}:
        raise Invalid(
            f"metric {name}: must be a mean at every site, or a histogram of {BINS} bins per class at every one"
        )
    if len({part.power for part in parts}) > 1:
        raise Invalid(f"metric {name}: is a mean at some sites and e to the power of one at others; use the same code")
    count = sum(part.count for part in parts)
    if not count:
        return None
    try:
        mean = math.fsum(part.total for part in parts) / count
        return _powered(mean) if parts[0].power else mean
    except OverflowError:
        raise Invalid(f"metric {name}: the sites' totals or counts are too large to add; scale the metric") from None


def _powered(mean: float) -> float | None:
    return math.exp(mean) if mean < _HIGHEST else None


def _area(parts: list[Totals]) -> float | None:
    positives = [sum(column) for column in zip(*(part.positives for part in parts), strict=True)]
    negatives = [sum(column) for column in zip(*(part.negatives for part in parts), strict=True)]
    pairs = sum(positives) * sum(negatives)
    if not pairs:
        return None
    below = wins = 0  # wins counts half pairs, in whole numbers
    for positive, negative in zip(positives, negatives, strict=True):
        wins += positive * (2 * below + negative)
        below += negative
    return wins / (2 * pairs)
