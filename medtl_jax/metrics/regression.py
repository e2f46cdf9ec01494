"""Metrics of predicted numbers, in the units of the targets.

Each target is scored on the images where it is known. The average over several targets is only
meaningful where they share a unit; it is undefined where one of them is.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

from medtl_jax.metrics.checks import check_classes, kept_rows
from medtl_jax.metrics.entries import Column, column
from medtl_jax.metrics.weighted import median, ratio


@dataclasses.dataclass(frozen=True)
class Cases:
    """n images, checked.

    Attributes:
      classes: names of the k targets.
      target: float64 `[n, k]`, NaN where unknown.
      score: float64 `[n, k]`, predictions.
    """

    classes: tuple[str, ...]
    target: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.target)


def prepare(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str], mask: np.ndarray | None = None
) -> Cases:
    """Returns the cases of `target` and `score`, float `[n, k]`, where `mask` (all) is True.

    Raises:
      ValueError: shapes or names that do not fit, no image, infinite targets, scores that are
        not finite.
    """
    target, score = np.asarray(target), np.asarray(score)
    if target.ndim != 2 or target.shape != score.shape:
        raise ValueError(f"want target and score [n, k], got {target.shape}, {score.shape}")
    check_classes(score, classes, fewest=1)
    rows = kept_rows(target, score, mask)
    target, score = target[rows].astype(np.float64), score[rows].astype(np.float64)
    if np.isinf(target).any():
        raise ValueError("targets hold infinity")
    if not np.isfinite(score).all():
        raise ValueError("scores hold NaN or infinity")
    return Cases(tuple(classes), target, score)


def left_out(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns nothing: an average counts every target."""
    del cases, counts
    return {}


def proportions(cases: Cases) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns nothing: no metric of numbers is a proportion of images."""
    del cases
    return {}


def weighted(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every metric of r samples, `[k, r]`, NaN where undefined.

    `bias` is the mean of prediction minus truth, `median_error` the median of the absolute
    errors. R2 and Pearson's r need two different values.
    """
    columns = []
    for truth, predicted in zip(cases.target.T, cases.score.T, strict=True):
        known = ~np.isnan(truth)
        columns.append(_one_target(truth[known], predicted[known], counts[known]))
    return {name: np.stack([found[name] for found in columns]) for name in columns[0]}


def _one_target(truth, predicted, counts) -> dict[str, np.ndarray]:
    size = counts.sum(axis=0)
    error = predicted - truth
    squares = np.dot(error**2, counts)
    # Deviations from each sample's own mean: sums of squares minus squared sums would cancel.
    off_truth = truth[:, None] - ratio(np.dot(truth, counts), size)
    off_predicted = predicted[:, None] - ratio(np.dot(predicted, counts), size)
    truth_spread = _spread(truth, off_truth, counts)
    product = np.einsum("nr,nr,nr->r", off_truth, off_predicted, counts)
    scale = np.sqrt(truth_spread) * np.sqrt(_spread(predicted, off_predicted, counts))
    mse = ratio(squares, size)
    return {
        "mae": ratio(np.dot(np.abs(error), counts), size),
        "mse": mse,
        "rmse": np.sqrt(mse),
        "median_error": median(np.abs(error), counts),
        "bias": ratio(np.dot(error, counts), size),
        "r2": 1 - ratio(squares, truth_spread),
        "pearson": np.clip(ratio(product, scale), -1, 1),
    }


def _spread(values, deviations, counts) -> np.ndarray:
    """Weighted sums of squared deviations `[r]`, exactly 0 where all values drawn are equal."""
    drawn = counts > 0
    highest = np.where(drawn, values[:, None], -math.inf).max(axis=0, initial=-math.inf)
    lowest = np.where(drawn, values[:, None], math.inf).min(axis=0, initial=math.inf)
    return np.where(highest > lowest, np.einsum("nr,nr->r", deviations**2, counts), 0)


def points(cases: Cases) -> dict[str, Column]:
    """Returns every metric of the split; see `weighted` for what they are."""
    own = {name: value[:, 0] for name, value in weighted(cases, np.ones((len(cases), 1))).items()}
    known = ~np.isnan(cases.target)
    for i, rows in enumerate(known.T):
        if not rows.any():
            continue
        truth, predicted = cases.target[rows, i], cases.score[rows, i]
        own["mae"][i] = sk.mean_absolute_error(truth, predicted)
        own["mse"][i] = sk.mean_squared_error(truth, predicted)
        own["rmse"][i] = sk.root_mean_squared_error(truth, predicted)
        own["median_error"][i] = sk.median_absolute_error(truth, predicted)
        if np.ptp(truth) > 0:
            own["r2"][i] = sk.r2_score(truth, predicted)
    return {
        metric: column(
            values,
            known.sum(axis=0),
            [_reason(cases, metric, row) for row in range(len(cases.classes))],
        )
        for metric, values in own.items()
    }


def _reason(cases: Cases, metric: str, row: int) -> str:
    name = cases.classes[row]
    truth = cases.target[~np.isnan(cases.target[:, row]), row]
    if not len(truth):
        return f"{name!r} is known of no image"
    if np.ptp(truth) == 0:
        return f"{name!r} has one value only"
    return f"every prediction of {name!r} is the same"
