"""Classification metrics of one split, computed once over all its images.

A metric that the data cannot define is NaN with a reason, never 0:

- recall and AUC of a class with no image in the split;
- specificity and AUC of a class that every image belongs to;
- precision of a class that is never predicted. Its recall is then 0, its F1 is 0
  (F1 = 2 TP / (2 TP + FP + FN) has a denominator), but no prediction exists whose
  precision could be counted;
- F1 of a class that is neither present nor predicted;
- a macro average over classes of which one or more are undefined. Averaging the rest
  would compare runs over different sets of classes.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

CLASS_METRICS = ("precision", "recall", "specificity", "f1", "auc")


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric: its value (NaN where undefined), images counted, reason if undefined."""

    value: float
    n: int
    reason: str = ""


def check_predictions(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `target` as int64 `[n]` and `score` as float64 `[n, k]` once they hold together.

    Raises:
      ValueError: wrong shapes, no image, fewer than two classes, repeated class names,
        targets outside `0..k-1`, or rows that are not probabilities (finite, in 0..1,
        summing to 1 within 0.02, which leaves room for bfloat16).
    """
    target, score = np.asarray(target), np.asarray(score).astype(np.float64)
    if target.ndim != 1 or score.ndim != 2 or len(target) != len(score):
        raise ValueError(f"want target [n] and score [n, k], got {target.shape}, {score.shape}")
    n, k = score.shape
    if n == 0 or k < 2:
        raise ValueError(f"want at least one image and two classes, got score {score.shape}")
    if classes is not None and (len(classes) != k or len(set(classes)) != k):
        raise ValueError(f"want {k} different class names for score {score.shape}, got {classes}")
    if not np.issubdtype(target.dtype, np.integer):
        raise ValueError(f"want integer targets, got {target.dtype}")
    if target.min() < 0 or target.max() >= k:
        raise ValueError(f"want targets in 0..{k - 1}, got {target.min()}..{target.max()}")
    if not np.isfinite(score).all():
        raise ValueError("scores hold NaN or infinity")
    if score.min() < 0 or score.max() > 1.02 or np.abs(score.sum(axis=1) - 1).max() > 0.02:
        raise ValueError("want probabilities: each row of score in 0..1 with sum 1")
    return target.astype(np.int64), score


def confusion(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns the confusion matrix, int64 `[k, k]`: rows are the truth, columns the argmax.

    Args:
      target: int `[n]`, class indices.
      score: float `[n, k]`, probabilities.

    Raises:
      ValueError: see `check_predictions`.
    """
    target, score = check_predictions(target, score)
    return sk.confusion_matrix(target, score.argmax(axis=1), labels=np.arange(score.shape[1]))


def classification_scores(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str]
) -> dict[str, Score]:
    """Returns accuracy, macro averages and per-class values, keyed by metric name.

    `accuracy`, then the macro `precision recall specificity f1 auc`, then each of these
    per class as `precision/<class>`. The predicted class is the argmax. AUC is one-vs-rest,
    ties count one half; with two classes all three AUC values are the binary AUC of
    `score[:, 1]`, since the other class only mirrors it.

    Args:
      target: int `[n]`, indices into `classes`.
      score: float `[n, k]`, probabilities.
      classes: k class names.

    Raises:
      ValueError: see `check_predictions`.
    """
    target, score = check_predictions(target, score, classes)
    predicted, labels, n = score.argmax(axis=1), np.arange(score.shape[1]), len(target)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        target, predicted, labels=labels, zero_division=np.nan
    )
    values = {
        "precision": precision,
        "recall": recall,
        "specificity": _specificity(target, predicted, labels),
        "f1": f1,
        "auc": _auc(target, score),
    }
    result = {"accuracy": Score(float(sk.accuracy_score(target, predicted)), n)}
    per_class = {}
    for metric in CLASS_METRICS:
        named = {
            name: Score(float(value), n, _reason(metric, name, target == i, value))
            for i, (name, value) in enumerate(zip(classes, values[metric], strict=True))
        }
        result[metric] = _macro(named, n)
        per_class |= {f"{metric}/{name}": entry for name, entry in named.items()}
    return result | per_class


def auc_columns(k: int) -> list[tuple[int, int]]:
    """Returns (class, score column) pairs whose binary AUCs make up the one-vs-rest AUC.

    With two classes there is one pair, `(1, 1)`, and both classes share its value.
    """
    return [(1, 1)] if k == 2 else [(i, i) for i in range(k)]


def _auc(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    k = score.shape[1]
    values = []
    for label, column in auc_columns(k):
        positive = target == label
        mixed = positive.any() and not positive.all()
        values.append(sk.roc_auc_score(positive, score[:, column]) if mixed else math.nan)
    return np.broadcast_to(np.array(values), k)


def _specificity(target: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    tables = sk.multilabel_confusion_matrix(target, predicted, labels=labels)
    negatives = tables[:, 0, :].sum(axis=1)
    empty = np.full(len(labels), math.nan)
    return np.divide(tables[:, 0, 0], negatives, out=empty, where=negatives > 0)


def _reason(metric: str, name: str, member: np.ndarray, value: float) -> str:
    if not math.isnan(value):
        return ""
    if metric == "precision":
        return f"no image was predicted as {name!r}"
    if metric == "f1":
        return f"class {name!r} is neither present nor predicted"
    if member.all():
        return f"every image is of class {name!r}"
    return f"no image of class {name!r}"


def _macro(named: dict[str, Score], n: int) -> Score:
    reasons = [entry.reason for entry in named.values() if entry.reason]
    return Score(float(np.mean([entry.value for entry in named.values()])), n, "; ".join(reasons))
