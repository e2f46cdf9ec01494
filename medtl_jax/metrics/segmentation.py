"""Metrics of a class for every pixel.

The predicted class is the argmax; class 0 is the background and has no metrics of its own.

- Dice, IoU, HD95 and NSD are computed in each image and averaged over the images: an image
  counts alike whatever the size of its objects. An image that has the class neither in truth nor
  in prediction is left out of the average of that class; one that has it in either counts, with
  Dice 0 where the other is empty. See `surfaces` for HD95 and NSD.
- `dice_pooled` and `iou_pooled`, precision, recall and specificity count all pixels of the split
  together; `accuracy` is the part of all pixels, of the background too, that are right.
- ECE, Brier score and NLL are means over all pixels of the split, of the background too; see
  `classification` for what they are.

Pixels of one image are alike, so images (or patients) are resampled, never pixels.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from medtl_jax.data.catalog import Array
from medtl_jax.metrics.checks import check_classes, check_labels, check_probabilities, kept_rows
from medtl_jax.metrics.classification import EPSILON, brier_score
from medtl_jax.metrics.entries import Column, column, single
from medtl_jax.metrics.surfaces import surface_scores
from medtl_jax.metrics.weighted import BINS, bins, known_mean, ratio, total

PER_IMAGE = ("dice", "iou", "hd95", "nsd")
_ALL_PIXELS = ("accuracy", "ece", "brier", "nll")
# Images read and checked at a time.
_BLOCK = 8


@dataclasses.dataclass(frozen=True)
class Cases:
    """n images, each reduced to the numbers that the metrics need.

    Attributes:
      classes: k names, the background first.
      tables: int64 `[n, k, k]`, confusion of each image's pixels; rows are the truth.
      images: `{metric: float64 [n, k - 1]}` of `PER_IMAGE` for the classes 1..k-1, NaN where
        undefined; without `hd95` and `nsd` if surfaces were not asked for.
      bins: float64 `[n, 3, 15]`, pixels of each image in each bin of the highest probability: how
        many, the sum of these probabilities, how many are right.
      losses: float64 `[n, 2]`, Brier score and NLL summed over the pixels of each image.
    """

    classes: tuple[str, ...]
    tables: np.ndarray
    images: dict[str, np.ndarray]
    bins: np.ndarray
    losses: np.ndarray

    def __len__(self) -> int:
        return len(self.tables)


def prepare(
    target: Array,
    score: Array,
    classes: Sequence[str],
    mask: np.ndarray | None = None,
    *,
    surfaces: bool = True,
    tolerance: float = 2.0,
) -> Cases:
    """Returns the cases of the images where `mask` (all) is True.

    Only a few images are held at a time beside the arguments, which may be streamed.

    Args:
      target: integers `[n, h, w]`, class of each pixel.
      score: float `[n, h, w, k]`, probabilities.
      classes: k names, the background first.
      mask: bool `[n]`.
      surfaces: whether HD95 and NSD are computed, which takes longest.
      tolerance: of NSD, in pixels.

    Raises:
      ValueError: shapes or class names that do not fit, no image, targets outside `0..k-1`,
        scores that are not probabilities, a negative tolerance.
    """
    _check(target, score, classes, tolerance)
    rows = kept_rows(target, score, mask)
    k = score.shape[-1]
    tables = np.empty((len(rows), k, k), np.int64)
    binned, losses = np.empty((len(rows), 3, BINS)), np.empty((len(rows), 2))
    distances = np.full((2, len(rows), k - 1), math.nan)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        # float16 sums of many classes would be too coarse to check.
        truths, scores = np.asarray(target[block]), np.asarray(score[block]).astype(np.float32)
        check_probabilities(scores, sums_to_one=True)
        check_labels(truths, 0, k - 1)
        for place, (truth, probability) in enumerate(zip(truths, scores, strict=True), start):
            called = probability.argmax(axis=-1)
            pairs = truth.astype(np.int64) * k + called
            tables[place] = np.bincount(pairs.ravel(), minlength=k * k).reshape(k, k)
            binned[place] = _binned(probability, called == truth)
            losses[place] = _losses(truth, probability)
            if surfaces:
                distances[:, place] = _distances(truth, called, k, tolerance)
    hits, either = _overlap(tables)
    images = {"dice": ratio(2.0 * hits, hits + either), "iou": ratio(1.0 * hits, either)}
    if surfaces:
        images |= {"hd95": distances[0], "nsd": distances[1]}
    return Cases(tuple(classes), tables, images, binned, losses)


def _check(target: Array, score: Array, classes: Sequence[str], tolerance: float) -> None:
    """Raises ValueError unless the arguments of `prepare` have shapes that fit."""
    if len(target.shape) != 3 or score.shape[:-1] != target.shape:
        raise ValueError(
            f"want target [n, h, w] and score [n, h, w, k], got {target.shape}, {score.shape}"
        )
    if not tolerance >= 0:
        raise ValueError(f"want a tolerance of at least 0 pixels, got {tolerance}")
    check_classes(score, classes, fewest=2)


def _binned(probability: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`Cases.bins` of one image, `[3, 15]`; probability `[h, w, k]`, right bool `[h, w]`."""
    confidence = probability.max(axis=-1).ravel()
    place = bins(confidence)
    return np.stack(
        [
            np.bincount(place, weights=weights, minlength=BINS)
            for weights in (None, confidence, right.ravel())
        ]
    )


def _losses(truth: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """Sums of Brier score and NLL over the pixels of one image."""
    k = probability.shape[-1]
    of_truth = np.take_along_axis(probability, truth[..., None].astype(np.int64), axis=-1)
    nll = -np.log(np.clip(of_truth, EPSILON, 1 - EPSILON))
    brier = brier_score(probability, np.eye(k, dtype=np.float32)[truth])
    return float(brier.sum(dtype=np.float64)), float(nll.sum(dtype=np.float64))


def _distances(truth: np.ndarray, called: np.ndarray, k: int, tolerance: float) -> np.ndarray:
    """HD95 and NSD of the classes 1..k-1 of one image, `[2, k - 1]`."""
    pairs = [surface_scores(truth == i, called == i, tolerance) for i in range(1, k)]
    return np.array(pairs).T


def _overlap(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in both masks and in either, `[..., k - 1]` of the classes 1..k-1."""
    hits = np.diagonal(tables, axis1=-2, axis2=-1)[..., 1:]
    return hits, tables.sum(axis=-1)[..., 1:] + tables.sum(axis=-2)[..., 1:] - hits


def left_out(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns nothing: an average counts every class but the background."""
    del cases, counts
    return {}


def proportions(cases: Cases) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns nothing: proportions of pixels are none of images."""
    del cases
    return {}


def joined(parts: Sequence[Cases]) -> Cases:
    """Returns the images of all parts, which have the same classes, one after another."""
    first = parts[0]
    return Cases(
        first.classes,
        np.concatenate([part.tables for part in parts]),
        {name: np.concatenate([part.images[name] for part in parts]) for name in first.images},
        np.concatenate([part.bins for part in parts]),
        np.concatenate([part.losses for part in parts]),
    )


def weighted(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every metric of r samples, `[k - 1, r]` by class or `[1, r]`, NaN where undefined."""
    n, k = len(cases), len(cases.classes)
    tables = total(cases.tables.reshape(n, k * k), counts).T.reshape(-1, k, k)
    hits, either = (part.T for part in _overlap(tables))
    present, called = tables.sum(axis=2)[:, 1:].T, tables.sum(axis=1)[:, 1:].T
    pixels = tables.sum(axis=(1, 2))
    _, confidence, right = total(cases.bins.reshape(n, -1), counts).reshape(3, BINS, -1)
    brier, nll = ratio(total(cases.losses, counts), pixels)
    found = {metric: known_mean(values, counts) for metric, values in cases.images.items()}
    return found | {
        "dice_pooled": ratio(2 * hits, hits + either),
        "iou_pooled": ratio(hits, either),
        "precision": ratio(hits, called),
        "recall": ratio(hits, present),
        "specificity": ratio(pixels - either, pixels - present),
        "accuracy": ratio(np.trace(tables, axis1=1, axis2=2), pixels)[None],
        "ece": ratio(np.abs(right - confidence).sum(axis=0), pixels)[None],
        "brier": brier[None],
        "nll": nll[None],
    }


def points(cases: Cases) -> dict[str, Column]:
    """Returns every metric of the split; `n` counts the images an average is over."""
    n = len(cases)
    found = {}
    for metric, values in weighted(cases, np.ones((n, 1))).items():
        if metric in _ALL_PIXELS:
            found[metric] = single(values, n)
            continue
        images = (~np.isnan(cases.images[metric])).sum(axis=0) if metric in PER_IMAGE else n
        reasons = [_reason(metric, name) for name in cases.classes[1:]]
        found[metric] = column(values, images, reasons)
    return found


def _reason(metric: str, name: str) -> str:
    if metric == "precision":
        return f"no pixel was predicted as {name!r}"
    if metric == "recall":
        return f"no pixel of class {name!r}"
    if metric == "specificity":
        return f"every pixel is of class {name!r}"
    return f"class {name!r} is neither present nor predicted"
