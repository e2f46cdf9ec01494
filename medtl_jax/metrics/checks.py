"""Checks of what every metric is given."""

from collections.abc import Sequence

import numpy as np

# bfloat16 and float16 leave the sum of a row of probabilities this far from 1.
SUM_TOLERANCE = 0.02


def check_classes(score, classes: Sequence[str] | None, fewest: int) -> None:
    """Raises ValueError unless there is an image and the class names fit the scores.

    Args:
      score: has a `shape` `[n, ..., k]`.
      classes: k different names, or None where nobody has names.
      fewest: smallest k, 1 or 2.
    """
    n, k = score.shape[0], score.shape[-1]
    if n == 0 or k < fewest:
        words = {1: "one class", 2: "two classes"}
        raise ValueError(f"want at least one image and {words[fewest]}, got score {score.shape}")
    if classes is not None and (len(classes) != k or len(set(classes)) != k):
        raise ValueError(f"want {k} different class names for score {score.shape}, got {classes}")


def check_probabilities(score: np.ndarray, *, sums_to_one: bool) -> None:
    """Raises ValueError unless `score` `[..., k]` holds probabilities, rows summing to 1 if so."""
    if not np.isfinite(score).all():
        raise ValueError("scores hold NaN or infinity")
    if score.min() < 0 or score.max() > 1 + SUM_TOLERANCE:
        raise ValueError("want probabilities: scores in 0..1")
    if sums_to_one and np.abs(score.sum(axis=-1) - 1).max() > SUM_TOLERANCE:
        raise ValueError("want probabilities: each row of score in 0..1 with sum 1")


def check_labels(target: np.ndarray, lowest: int, highest: int) -> None:
    """Raises ValueError unless `target` holds integers in `lowest..highest`."""
    if not np.issubdtype(target.dtype, np.integer):
        raise ValueError(f"want integer targets, got {target.dtype}")
    if target.min() < lowest or target.max() > highest:
        raise ValueError(f"want targets in {lowest}..{highest}, got {target.min()}..{target.max()}")


def kept_rows(target, score, mask: np.ndarray | None) -> np.ndarray:
    """Returns the rows that count, int `[m]`: those where `mask` (bool `[n]`) is True, or all.

    Raises:
      ValueError: not as many targets as scores, a mask of another shape or type, or one that
        keeps nothing.
    """
    n = score.shape[0] if score.shape else 0
    if target.shape[:1] != (n,):
        raise ValueError(
            f"want target [n] and score [n, ...] alike, got {target.shape}, {score.shape}"
        )
    if mask is None:
        return np.arange(n)
    mask = np.asarray(mask)
    if mask.shape != (n,) or mask.dtype != bool:
        raise ValueError(f"want a bool mask for {n} images, got {mask.dtype} {mask.shape}")
    if not mask.any():
        raise ValueError("the mask leaves no image")
    return np.flatnonzero(mask)
