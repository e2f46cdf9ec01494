"""Statistics of many weighted samples at once, the arithmetic below the bootstrap.

A bootstrap draw is held as a count per image, so every metric is a function of weighted sums and
all draws are scored together. Counts are float64 `[n, r]`: how often each of n images occurs in
each of r samples. Sums of counts are whole numbers and therefore exact.
"""

import dataclasses
import math

import numpy as np

# Bins of the expected calibration error (Guo et al. 2017, section 2).
BINS = 15


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns `part / whole`, NaN where `whole` is 0."""
    shape = np.broadcast_shapes(part.shape, whole.shape)
    return np.divide(part, whole, out=np.full(shape, math.nan), where=whole != 0)


def total(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the weighted sums of each column, `[k, r]`, for `values` `[n, k]`."""
    return np.dot(values.T.astype(np.float64), counts)


def known_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the weighted mean of each column's known values, `[k, r]`; NaN is unknown."""
    known = ~np.isnan(values)
    return ratio(total(np.where(known, values, 0), counts), total(known, counts))


@dataclasses.dataclass(frozen=True)
class Ranking:
    """n images from the highest score down, in g runs of equal scores that hold a positive.

    Attributes:
      order: int `[n]`, rows of the images.
      starts: int `[g]`, first place in `order` of each run.
      ends: int `[g]`, last place of each run.
      positives: int `[p]`, rows of the positive images, in `order`.
      groups: int `[g]`, first place in `positives` of each run.
    """

    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    positives: np.ndarray
    groups: np.ndarray


def rank(positive: np.ndarray, score: np.ndarray, rows: np.ndarray | None = None) -> Ranking:
    """Returns the ranking by `score` `[n]` of the images, or of `rows` alone.

    Args:
      positive: bool `[n]`.
      score: float `[n]`.
      rows: int, distinct.
    """
    rows = np.arange(len(score)) if rows is None else rows
    order = rows[np.argsort(-score[rows], kind="stable")]
    run = np.cumsum(np.diff(score[order], prepend=score[order[:1]]) != 0)
    positives = order[positive[order]]
    held, groups = np.unique(run[positive[order]], return_index=True)
    starts, ends = (np.searchsorted(run, held, side=side) for side in ("left", "right"))
    return Ranking(order, starts, ends - 1, positives, groups)


def ranking_scores(ranking: Ranking, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns AUC and average precision, `[r]` each; NaN without positives or negatives.

    AUC is the Mann-Whitney statistic, a tie counts one half. Average precision is the sum of
    precision times the step of recall over the distinct scores, as scikit-learn defines it.
    """
    if not len(ranking.positives) or len(ranking.positives) == len(ranking.order):
        return np.full(counts.shape[1], math.nan), np.full(counts.shape[1], math.nan)
    called = counts[ranking.order]
    np.cumsum(called, axis=0, out=called)
    hits = np.add.reduceat(counts[ranking.positives], ranking.groups, axis=0)
    true = np.cumsum(hits, axis=0)
    positives, negatives = true[-1], called[-1] - true[-1]
    down_to = called[ranking.ends]
    precision = np.divide(true, down_to, out=np.zeros_like(true), where=down_to > 0)
    average = ratio(np.einsum("gr,gr->r", hits, precision), positives)
    # A positive loses to the negatives above its run and shares half of those within it.
    above = np.where((ranking.starts > 0)[:, None], called[ranking.starts - 1], 0) - true + hits
    lost = np.einsum("gr,gr->r", hits, above + (down_to - true)) / 2
    auc = ratio(positives * negatives - lost, positives * negatives)
    return auc, np.where(negatives > 0, average, math.nan)


def bins(confidence: np.ndarray) -> np.ndarray:
    """Returns the calibration bin of each confidence, 0..14; the bins are `(i/15, (i+1)/15]`."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence, side="left")


def calibration_error(confidence: np.ndarray, hit: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the expected calibration error of each sample, `[r]` (Guo et al. 2017, eq. 3).

    Args:
      confidence: float `[n]`, predicted probabilities.
      hit: `[n]`, 1 where what was predicted is true.
      counts: `[n, r]`.
    """
    member = np.eye(BINS)[bins(confidence)]
    gap = np.dot((member * (hit - confidence)[:, None]).T, counts)
    return ratio(np.abs(gap).sum(axis=0), counts.sum(axis=0))


def median(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the median of each sample of `values` `[n]`, `[r]`; NaN for an empty sample."""
    if not len(values):
        return np.full(counts.shape[1], math.nan)
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order], axis=0)
    size = below[-1]
    # The two middle places, the same one in a sample of odd size.
    lower = (below < np.floor((size + 1) / 2)).sum(axis=0)
    upper = (below < np.floor(size / 2) + 1).sum(axis=0)
    last = len(values) - 1
    middle = (values[order][np.minimum(lower, last)] + values[order][np.minimum(upper, last)]) / 2
    return np.where(size > 0, middle, math.nan)
