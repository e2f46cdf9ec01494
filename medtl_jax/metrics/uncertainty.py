"""Bootstrap intervals for the classification metrics.

Percentile bootstrap (Efron & Tibshirani 1993, ch. 13): draw as many images as there are,
with replacement, score the draw, repeat; the interval is the middle 95 % of the scores.
Images of one patient are alike, so where patients are known whole patients are drawn
(cluster bootstrap; Field & Welsh 2007): drawing images would make the interval too narrow.

A draw is held as a count per image, so every metric is a weighted sum and all draws are
scored together instead of one after another.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from medtl_jax.metrics.scores import (
    auc_columns,
    check_predictions,
    classification_scores,
)

# Counts held at a time (image x resample): 16 MiB as float64, whatever the split's size.
CHUNK = 2**21
# An interval over the remaining resamples is biased once many are left out.
MOST_UNDEFINED = 0.05


def score_with_intervals(
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    patients: np.ndarray | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict]:
    """Returns `{metric: {"value", "ci95", "n"}}`, ready for JSON, for all metrics.

    The metrics are those of `scores.classification_scores`. `value` and `ci95`
    (`[low, high]`; `ci90` for `level=0.9`) are None where undefined, and `reason` then
    says why. `n` counts images; with `patients` there is also `n_patients`. A resample
    in which a metric is undefined is left out of that metric's interval; where this
    happens to more than 5 % of them there is no interval. A split without a single error
    gets the interval `[1, 1]`: no draw can differ, which does not mean certainty.

    Args:
      target: int `[n]`, indices into `classes`.
      score: float `[n, k]`, probabilities.
      classes: k class names.
      patients: patient of each image `[n]`; whole patients are then drawn.
      resamples: number of draws.
      level: coverage of the interval, between 0 and 1.
      seed: of the draws; the same seed gives the same numbers.

    Raises:
      ValueError: unusable arguments, see also `scores.check_predictions`.
    """
    target, score = check_predictions(target, score, classes)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"want resamples >= 1 and 0 < level < 1, got {resamples}, {level}")
    if patients is not None and np.shape(patients) != target.shape:
        raise ValueError(f"want a patient for each of {len(target)} images, got {len(patients)}")
    unit = np.arange(len(target)) if patients is None else _groups(patients)
    parts = [
        weighted_scores(target, score, counts[unit])
        for counts in bootstrap_counts(int(unit.max()) + 1, len(target), resamples, seed)
    ]
    draws = {metric: np.concatenate([part[metric] for part in parts], 1) for metric in parts[0]}
    row = {name: i for i, name in enumerate(classes)}
    result = {}
    for name, point in classification_scores(target, score, classes).items():
        metric, _, label = name.partition("/")
        drawn = draws[metric][row[label]] if label else draws[metric].mean(axis=0)
        interval, reason = _interval(drawn, level)
        if math.isnan(point.value):
            interval, reason = None, point.reason
        elif unit.max() == 0:
            interval, reason = None, f"one {'patient' if patients is not None else 'image'} only"
        entry = {
            "value": None if math.isnan(point.value) else point.value,
            f"ci{100 * level:g}": interval,
            "n": point.n,
        }
        if patients is not None:
            entry["n_patients"] = int(unit.max()) + 1
        result[name] = entry | ({"reason": reason} if reason else {})
    return result


def bootstrap_counts(units: int, images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often each unit is drawn, int64 `[units, r]`, until `resamples` are drawn.

    Every column sums to `units`. `images` (at least `units`) bounds r, so that a chunk of
    counts spread over the images stays within `CHUNK` numbers.
    """
    rng = np.random.default_rng(seed)
    width = max(1, CHUNK // images)
    for start in range(0, resamples, width):
        r = min(width, resamples - start)
        drawn = rng.integers(0, units, size=(r, units)) * r + np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=units * r).reshape(units, r)


def weighted_scores(
    target: np.ndarray, score: np.ndarray, counts: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns every metric of r weighted samples at once, NaN where undefined.

    `accuracy` is float64 `[1, r]`, the others are per class, `[k, r]`. The numbers are those
    of `scores.classification_scores` on the images repeated `counts` times.

    Args:
      target: int `[n]`, class indices.
      score: float `[n, k]`, probabilities.
      counts: non-negative `[n, r]`, how often each image occurs in each sample.
    """
    counts = counts.astype(np.float64)
    k = score.shape[1]
    truth, called = np.eye(k)[target], np.eye(k)[score.argmax(axis=1)]
    present, predicted, hit = (np.dot(a.T, counts) for a in (truth, called, truth * called))
    total = counts.sum(axis=0)
    negatives = total - present
    return {
        "accuracy": _ratio(hit.sum(axis=0, keepdims=True), total[None]),
        "precision": _ratio(hit, predicted),
        "recall": _ratio(hit, present),
        "specificity": _ratio(negatives - (predicted - hit), negatives),
        "f1": _ratio(2 * hit, present + predicted),
        "auc": _weighted_auc(target, score, counts),
    }


def _weighted_auc(target: np.ndarray, score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One-vs-rest AUC `[k, r]` as the Mann-Whitney statistic; a tie counts one half."""
    rows = []
    for label, column in auc_columns(score.shape[1]):
        positive, values = target == label, score[:, column]
        order = np.flatnonzero(~positive)[np.argsort(values[~positive], kind="stable")]
        # below[i]: weight of the negatives with the i smallest scores.
        below = np.zeros((len(order) + 1, counts.shape[1]))
        np.cumsum(counts[order], axis=0, out=below[1:])
        beaten = below[np.searchsorted(values[order], values[positive], "left")]
        beaten += below[np.searchsorted(values[order], values[positive], "right")]
        weight = counts[positive]
        wins = np.einsum("ir,ir->r", weight, beaten) / 2
        rows.append(_ratio(wins, weight.sum(axis=0) * below[-1]))
    return np.broadcast_to(np.stack(rows), (score.shape[1], counts.shape[1]))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(part.shape, math.nan), where=whole > 0)


def _groups(patients: np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(patients), return_inverse=True)[1]


def _interval(drawn: np.ndarray, level: float) -> tuple[list[float] | None, str]:
    defined = drawn[~np.isnan(drawn)]
    missing = len(drawn) - len(defined)
    if missing > MOST_UNDEFINED * len(drawn):
        return None, f"undefined in {missing} of {len(drawn)} resamples: too few images"
    tail = (1 - level) / 2
    return np.quantile(defined, [tail, 1 - tail]).tolist(), ""
