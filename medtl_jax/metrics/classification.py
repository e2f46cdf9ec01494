"""Metrics of one label an image, of unordered or ordered classes.

A metric that the data cannot define is NaN with a reason, never 0:

- recall, AUC and PR-AUC of a class with no image in the split;
- specificity, AUC and PR-AUC of a class that every image belongs to;
- precision of a class that is never predicted. Its recall is then 0, its F1 is 0
  (F1 = 2 TP / (2 TP + FP + FN) has a denominator), but no prediction exists whose
  precision could be counted;
- F1 of a class that is neither present nor predicted;
- MCC where the truth or the prediction is a single class, kappa where both are the same one;
- a macro average over classes of which one or more are undefined.

The predicted class is the argmax, of ordered classes too. AUC and PR-AUC are one-vs-rest. With two
classes they are those of class 1: the AUC of class 0 mirrors it, the PR-AUC of class 0 is reported
by class only.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

from medtl_jax.metrics.checks import check_classes, check_labels, check_probabilities, kept_rows
from medtl_jax.metrics.entries import Column, column, single
from medtl_jax.metrics.weighted import (
    Ranking,
    calibration_error,
    rank,
    ranking_scores,
    ratio,
    total,
)

# Probabilities are clipped to this far from 0 and 1 before the logarithm of NLL: float32 cannot
# come closer to 1.
EPSILON = 1e-7


@dataclasses.dataclass(frozen=True)
class Cases:
    """n images, checked, with what no resample changes.

    Attributes:
      classes: k names.
      ordinal: whether their order counts.
      target: int64 `[n]`.
      score: float64 `[n, k]`, probabilities.
      predicted: int64 `[n]`, argmax.
      losses: float64 `[n, 2]`, Brier score and NLL of each image.
      rankings: of the images for each class.
    """

    classes: tuple[str, ...]
    ordinal: bool
    target: np.ndarray
    score: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray
    rankings: tuple[Ranking, ...]

    def __len__(self) -> int:
        return len(self.target)


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
    check_classes(score, classes, fewest=2)
    check_labels(target, 0, score.shape[1] - 1)
    check_probabilities(score, sums_to_one=True)
    return target.astype(np.int64), score


def prepare(
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    mask: np.ndarray | None = None,
    *,
    ordinal: bool = False,
) -> Cases:
    """Returns the cases of `target` int `[n]` and `score` `[n, k]` where `mask` (all) is True.

    Raises:
      ValueError: see `check_predictions` and `checks.kept_rows`.
    """
    target, score = np.asarray(target), np.asarray(score)
    rows = kept_rows(target, score, mask)
    target, score = check_predictions(target[rows], score[rows], classes)
    truth = np.eye(score.shape[1])[target]
    brier = brier_score(score, truth)
    of_truth = score[np.arange(len(target)), target]
    nll = -np.log(np.clip(of_truth, EPSILON, 1 - EPSILON))
    rankings = tuple(rank(target == i, score[:, i]) for i in range(score.shape[1]))
    losses = np.stack([brier, nll], axis=1)
    return Cases(tuple(classes), ordinal, target, score, score.argmax(axis=1), losses, rankings)


def brier_score(score: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns the Brier score `[...]` of probabilities `[..., k]` and truth, 0 or 1, alike.

    The sum over the classes of the squared differences (Brier 1950). Of two classes both
    differences are the same one, and one is counted: the binary score, as scikit-learn has it.
    """
    squares = ((score - truth) ** 2).sum(axis=-1)
    return squares / 2 if score.shape[-1] == 2 else squares


def left_out(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns which classes a macro average leaves out: class 0 of two in PR-AUC, `[2, 1]`."""
    del counts  # the same in every sample
    return {"pr_auc": np.array([[True], [False]])} if len(cases.classes) == 2 else {}


def proportions(cases: Cases) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the metrics that are proportions, see `scores.proportions`."""
    right = cases.predicted == cases.target, np.ones(len(cases), bool)
    found = dict.fromkeys(("accuracy", "precision_micro", "recall_micro", "f1_micro"), right)
    for label, name in enumerate(cases.classes):
        present, called = cases.target == label, cases.predicted == label
        found |= {
            f"precision/{name}": (present, called),
            f"recall/{name}": (called, present),
            f"specificity/{name}": (~called, ~present),
        }
    return found


def weighted(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every metric of r samples, `[k, r]` by class or `[1, r]`, NaN where undefined.

    Brier is that of class 1, 0..1, for two classes, and the sum over the classes, 0..2, for more
    (`brier_score`); NLL is in nats; ECE is that of the predicted class. With one label an image,
    precision, recall and F1 pooled over the classes (`_micro`) all equal the accuracy.
    """
    truth = np.eye(len(cases.classes))[cases.target]
    called = np.eye(len(cases.classes))[cases.predicted]
    present, predicted, hit = (total(a, counts) for a in (truth, called, truth * called))
    size = counts.sum(axis=0)
    negatives = size - present
    recall = ratio(hit, present)
    ranked = [ranking_scores(ranking, counts) for ranking in cases.rankings]
    auc = np.stack([pair[0] for pair in ranked])
    accuracy = ratio(hit.sum(axis=0), size)[None]
    brier, nll = ratio(total(cases.losses, counts), size)
    right = (cases.predicted == cases.target).astype(np.float64)
    found = {
        "accuracy": accuracy,
        "balanced_accuracy": recall.mean(axis=0, keepdims=True),
        "precision": ratio(hit, predicted),
        "recall": recall,
        "specificity": ratio(negatives - (predicted - hit), negatives),
        "f1": ratio(2 * hit, present + predicted),
        "auc": np.stack([auc[1], auc[1]]) if len(auc) == 2 else auc,
        "pr_auc": np.stack([pair[1] for pair in ranked]),
        **_agreement(present, predicted, hit.sum(axis=0), size),
        "precision_micro": accuracy,
        "recall_micro": accuracy,
        "f1_micro": accuracy,
        "ece": calibration_error(cases.score.max(axis=1), right, counts)[None],
        "brier": brier[None],
        "nll": nll[None],
    }
    return found | (_rank_agreement(cases, counts) if cases.ordinal else {})


def _agreement(present, predicted, hits, size) -> dict[str, np.ndarray]:
    """Multi-class MCC (Gorodkin 2004) and Cohen's kappa from the margins of the confusion."""
    chance = (present * predicted).sum(axis=0)
    spread = np.sqrt(size**2 - (present**2).sum(axis=0))
    spread = spread * np.sqrt(size**2 - (predicted**2).sum(axis=0))
    return {
        "mcc": ratio(hits * size - chance, spread)[None],
        "kappa": ratio(hits * size - chance, size**2 - chance)[None],
    }


def _rank_agreement(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Quadratic kappa (Cohen 1968) from moments of the ranks, and their mean absolute error."""
    truth, called = cases.target.astype(np.float64), cases.predicted.astype(np.float64)
    columns = np.stack([truth, called, truth**2, called**2, np.abs(truth - called)], axis=1)
    first, second, first_squares, second_squares, error = total(columns, counts)
    observed = total((truth - called)[:, None] ** 2, counts)[0]
    size = counts.sum(axis=0)
    expected = (first_squares + second_squares) * size - 2 * first * second
    return {
        "quadratic_kappa": (1 - ratio(observed * size, expected))[None],
        "mae": ratio(error, size)[None],
    }


def points(cases: Cases) -> dict[str, Column]:
    """Returns every metric of the split; see `weighted` for what they are."""
    target, predicted, n = cases.target, cases.predicted, len(cases)
    labels = np.arange(len(cases.classes))
    own = {name: value[:, 0] for name, value in weighted(cases, np.ones((n, 1))).items()}
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        target, predicted, labels=labels, zero_division=np.nan
    )
    by_class = {
        "precision": precision,
        "recall": recall,
        "specificity": own["specificity"],
        "f1": f1,
        "auc": _ranked(cases, sk.roc_auc_score),
        "pr_auc": _ranked(cases, sk.average_precision_score),
    }
    if len(labels) == 2:
        by_class["auc"] = np.repeat(by_class["auc"][1:], 2)
    overall = {"accuracy": sk.accuracy_score(target, predicted), "balanced_accuracy": recall.mean()}
    if not math.isnan(own["mcc"][0]):
        overall["mcc"] = sk.matthews_corrcoef(target, predicted)
    if not math.isnan(own["kappa"][0]):
        overall["kappa"] = sk.cohen_kappa_score(target, predicted, labels=labels)
        if cases.ordinal:
            overall["quadratic_kappa"] = sk.cohen_kappa_score(
                target, predicted, labels=labels, weights="quadratic"
            )
    found = {}
    for metric in own:
        if metric in by_class:
            reasons = [_reason(cases, metric, label) for label in labels]
            found[metric] = column(by_class[metric], n, reasons)
        else:
            value = overall.get(metric, own[metric][0])
            found[metric] = single(value, n, _overall_reason(cases, metric))
    return found


def _ranked(cases: Cases, function) -> np.ndarray:
    values = []
    for label in range(len(cases.classes)):
        positive = cases.target == label
        mixed = positive.any() and not positive.all()
        values.append(function(positive, cases.score[:, label]) if mixed else math.nan)
    return np.array(values)


def _reason(cases: Cases, metric: str, label: int) -> str:
    name = cases.classes[label]
    if metric == "precision":
        return f"no image was predicted as {name!r}"
    if metric == "f1":
        return f"class {name!r} is neither present nor predicted"
    if (cases.target == label).all():
        return f"every image is of class {name!r}"
    return f"no image of class {name!r}"


def _overall_reason(cases: Cases, metric: str) -> str:
    if metric == "balanced_accuracy":
        absent = sorted(set(range(len(cases.classes))) - set(cases.target.tolist()))
        return "; ".join(_reason(cases, "recall", label) for label in absent)
    if metric == "mcc" and len(set(cases.target.tolist())) > 1:
        return f"every image was predicted as {cases.classes[cases.predicted[0]]!r}"
    return f"every image is of class {cases.classes[cases.target[0]]!r}"
