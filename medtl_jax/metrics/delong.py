"""Standard error, interval and paired test of the area under the ROC curve, without resampling.

The structural components of DeLong, DeLong & Clarke-Pearson (1988) by midranks (Sun & Xu 2014,
O(n log n)). Images of one patient are alike: where patients are known, the components are summed
by patient (Obuchowski 1997), which for one image a patient is DeLong's own formula.

A macro average over k classes is a mean of k areas over the same images; its components are the
means of theirs, so that the covariance between the classes is counted. Every function here takes
one class as `[n]` or several as `[n, k]`.
"""

import math

import numpy as np
from scipy import stats

from medtl_jax.metrics.weighted import ratio

# Why an AUC that is defined may have no interval.
NO_INTERVAL = "no DeLong interval: its variance cannot be estimated from this split"


def auc_interval(
    target: np.ndarray,
    score: np.ndarray,
    level: float = 0.95,
    patients: np.ndarray | None = None,
) -> list[float] | None:
    """Returns `[low, high]` of the AUC, or None where no interval can be given.

    The interval is symmetric on the logit scale (Qin & Hotilovac 2008), so that it stays within
    0..1, and as wide as Student's t asks for where few units are positive or negative. There is
    none with fewer than two units (images, or patients) among the positives or among the
    negatives, and none where the estimated variance is 0, at an AUC of exactly 0 or 1 or for
    scores that are all alike: that says nothing about the next sample.

    Args:
      target: bool `[n]`, or `[n, k]` for the macro average over k classes; integers count as
        1 positive, 0 negative, -1 unknown (left out of that class).
      score: float `[n]` or `[n, k]`, higher for positives; ties count one half.
      level: coverage, between 0 and 1.
      patients: patient of each image `[n]`.

    Raises:
      ValueError: shapes that do not fit, a score that is not finite, a level outside 0..1.
    """
    if not 0 < level < 1:
        raise ValueError(f"want 0 < level < 1, got {level}")
    area, variance, degrees = _contrast(target, [score], [1.0], patients)
    if not variance > 0 or not 0 < area < 1:
        return None
    centre = math.log(area / (1 - area))
    half = stats.t.isf((1 - level) / 2, degrees) * math.sqrt(variance) / (area * (1 - area))
    return [1 / (1 + math.exp(-edge)) for edge in (centre - half, centre + half)]


def auc_test(
    target: np.ndarray,
    score_a: np.ndarray,
    score_b: np.ndarray,
    patients: np.ndarray | None = None,
    *,
    small_sample: bool = False,
) -> tuple[float, float, float]:
    """Returns `(AUC of b - AUC of a, its standard error, two-sided p)` on the same images.

    All three are NaN where an AUC is undefined; error and p are NaN with fewer than two units
    among the positives or among the negatives. Two scores that order every pair alike have an
    error of 0 and p = 1; an error of 0 with unequal areas (1 against 0) has p = NaN.

    Args:
      target: as in `auc_interval`.
      score_a: float `[n]` or `[n, k]`.
      score_b: of the same shape.
      patients: patient of each image `[n]`.
      small_sample: refer the ratio to a t distribution with Satterthwaite's degrees of freedom
        instead of DeLong's normal one, which few positives need.

    Raises:
      ValueError: as `auc_interval`.
    """
    pair = [score_a, score_b]
    difference, variance, degrees = _contrast(target, pair, [-1.0, 1.0], patients)
    error = math.sqrt(variance)
    if error > 0:
        # With infinite degrees of freedom, t is the normal distribution.
        tail = stats.t.sf(abs(difference) / error, degrees if small_sample else math.inf)
        return difference, error, float(2 * tail)
    return difference, error, 1.0 if error == 0 and abs(difference) < 1e-12 else math.nan


def _contrast(
    target: np.ndarray,
    scores: list[np.ndarray],
    weights: list[float],
    patients: np.ndarray | None,
) -> tuple[float, float, float]:
    """The sum of the scores' macro areas by `weights`, its variance, its degrees of freedom.

    Total and variance are NaN where undefined. The components are combined before they are
    squared: scores that order all pairs alike then differ by exactly 0.
    """
    target, stacked, unit = _check(target, scores, patients)
    k, units = target.shape[1], int(unit.max()) + 1
    # By unit, each sum with the root of its correction for few units, I / (I - 1).
    influence = np.zeros(units)
    total, cross = 0.0, 0.0
    # Of each class the sums of its positives and of its negatives, and how many units they are of.
    parts_of = np.zeros((2, k, units))
    present = np.zeros((2, k), np.int64)
    for label in range(k):
        known = target[:, label] >= 0
        member = target[known, label] == 1
        if member.all() or not member.any():
            return math.nan, math.nan, math.inf
        areas, parts = _components(member, stacked[known, label])
        total += float(areas @ weights) / k
        residual = (parts - areas) @ weights / k
        for side, group in enumerate((member, ~member)):
            where = unit[known][group]
            present[side, label] = len(np.unique(where))
            parts_of[side, label] = np.bincount(where, residual[group] / len(where), units)
        sums, roots = parts_of[:, label], np.sqrt(_correction(present[:, label]))
        influence += roots @ sums
        # Obuchowski corrects the product of a class's two sums by all units, not by its roots.
        everyone = _correction(np.array(len(np.unique(unit[known]))))
        cross += 2 * float(sums[0] @ sums[1] * (everyone - roots[0] * roots[1]))
    variance = float(influence @ influence) + cross
    # With few patients the products may bring the sum below 0; NaN stays NaN.
    return total, float(np.maximum(variance, 0.0)), _degrees(parts_of, present)


def _correction(units: np.ndarray) -> np.ndarray:
    return ratio(units, units - 1)


def _degrees(sums: np.ndarray, present: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of the variance of a mean over classes.

    That of the positives and that of the negatives have errors of their own. Within each the
    errors of the classes are added as if they were one and the same: findings of the same few
    images are no more certain than one of them. For one class it is Satterthwaite's own formula.

    Args:
      sums: `[2, k, units]`, components of the positives and of the negatives of each class.
      present: int `[2, k]`, units behind them.
    """
    shares = np.einsum("sku,su->sk", sums, sums.sum(axis=1))
    errors = np.abs(shares) / np.sqrt(np.maximum(present - 1, 1))
    doubt = (errors.sum(axis=1) ** 2).sum()
    return max(1.0, float(shares.sum() ** 2 / doubt)) if doubt > 0 else math.inf


def _components(member: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas `[s]` and structural components `[n, s]` of the images, for scores `[n, s]`.

    Of a positive image: the share of the negatives that it beats; of a negative: the share of
    the positives that beat it.
    """
    everyone = stats.rankdata(score, axis=0)
    parts = np.empty_like(everyone)
    for group, others in ((member, ~member), (~member, member)):
        within = stats.rankdata(score[group], axis=0)
        parts[group] = (everyone[group] - within) / others.sum()
    parts[~member] = 1 - parts[~member]
    return parts[member].mean(axis=0), parts


def _check(
    target: np.ndarray, scores: list[np.ndarray], patients: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target `[n, k]`, scores `[n, k, s]`, unit of each image `[n]`."""
    target = np.asarray(target)
    shapes = [np.shape(score) for score in scores]
    if target.ndim not in (1, 2) or any(shape != target.shape for shape in shapes):
        raise ValueError(f"want target and scores of one shape, got {target.shape}, {shapes}")
    if target.size == 0:
        raise ValueError("want at least one image and one class")
    target = target.astype(np.int64)
    if target.min() < -1 or target.max() > 1:
        raise ValueError(f"want targets 0, 1 or -1, got {target.min()}..{target.max()}")
    stacked = np.stack([np.asarray(score).astype(np.float64) for score in scores], axis=-1)
    if not np.isfinite(stacked).all():
        raise ValueError("scores hold NaN or infinity")
    n = len(target)
    if patients is not None and np.shape(patients) != (n,):
        raise ValueError(f"want a patient for each of {n} images, got {np.shape(patients)}")
    unit = np.arange(n) if patients is None else np.unique(patients, return_inverse=True)[1]
    return target.reshape(n, -1), stacked.reshape(n, -1, len(scores)), unit
