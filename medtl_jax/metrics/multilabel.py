"""Metrics of several findings an image, each present, absent or unknown.

Each finding is scored on the images where it is known, called present where its probability
exceeds 0.5. An average over the findings leaves out those whose truth cannot define the metric,
and its reason names them:

- AUC, PR-AUC: findings that are not both present in one image and absent from another;
- recall, F1: findings that are never present; specificity: those never absent;
- every metric: findings that are never known.

Which findings these are depends on the truth of the whole split alone, so that two models, and all
resamples, are averaged over the same ones: a resample without one of them has no average. Precision
of a finding that is never predicted is undefined, and the average with it.

`auc_frequent` is the mean AUC over the findings with at least 20 images that have it and 20 that do
not: the AUC of a handful of images is mostly chance.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from sklearn import metrics as sk

from medtl_jax.data.catalog import MISSING
from medtl_jax.metrics.checks import check_classes, check_labels, check_probabilities, kept_rows
from medtl_jax.metrics.classification import EPSILON
from medtl_jax.metrics.entries import Column, column, single
from medtl_jax.metrics.weighted import (
    Ranking,
    calibration_error,
    known_mean,
    rank,
    ranking_scores,
    ratio,
    total,
)

THRESHOLD = 0.5
FREQUENT = 20
# Defined by both kinds of images, by those with the finding, by those without it.
_BOTH, _PRESENT, _ABSENT = ("auc", "pr_auc"), ("recall", "f1"), ("specificity",)
_KNOWN = ("accuracy", "precision", "ece", "brier", "nll")


@dataclasses.dataclass(frozen=True)
class Cases:
    """n images, checked, with what no resample changes.

    Attributes:
      classes: k findings.
      target: int64 `[n, k]`, 1 present, 0 absent, `MISSING` unknown.
      score: float64 `[n, k]`, probabilities.
      called: bool `[n, k]`, above the threshold.
      brier: float64 `[n, k]`, squared error, NaN where unknown.
      nll: float64 `[n, k]`, negative log-likelihood in nats, NaN where unknown.
      exact: float64 `[n, 1]`, 1 where every finding is right, NaN where one is unknown.
      rankings: of the images in which each finding is known.
    """

    classes: tuple[str, ...]
    target: np.ndarray
    score: np.ndarray
    called: np.ndarray
    brier: np.ndarray
    nll: np.ndarray
    exact: np.ndarray
    rankings: tuple[Ranking, ...]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def known(self) -> np.ndarray:
        """bool `[n, k]`, where somebody said whether the finding is present."""
        return self.target != MISSING


def prepare(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str], mask: np.ndarray | None = None
) -> Cases:
    """Returns the cases of `target` int `[n, k]` and `score` `[n, k]` where `mask` (all) is True.

    Raises:
      ValueError: shapes or class names that do not fit, no image, targets other than 1, 0 and
        `MISSING`, scores that are not probabilities.
    """
    target, score = np.asarray(target), np.asarray(score)
    if target.ndim != 2 or target.shape != score.shape:
        raise ValueError(f"want target and score [n, k], got {target.shape}, {score.shape}")
    check_classes(score, classes, fewest=1)
    rows = kept_rows(target, score, mask)
    target, score = target[rows], score[rows].astype(np.float64)
    check_labels(target, MISSING, 1)
    check_probabilities(score, sums_to_one=False)
    target = target.astype(np.int64)
    known, called = target != MISSING, score > THRESHOLD
    of_truth = np.clip(np.where(target == 1, score, 1 - score), EPSILON, 1 - EPSILON)
    exact = np.where(known.all(axis=1), (called == target).all(axis=1), math.nan)
    rankings = tuple(
        rank(target[:, i] == 1, score[:, i], np.flatnonzero(known[:, i]))
        for i in range(len(classes))
    )
    return Cases(
        classes=tuple(classes),
        target=target,
        score=score,
        called=called,
        brier=np.where(known, (score - target) ** 2, math.nan),
        nll=np.where(known, -np.log(of_truth), math.nan),
        exact=exact[:, None],
        rankings=rankings,
    )


def left_out(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the findings that no sample of this truth defines, bool `[k, r]` a metric."""
    without_present = total(cases.target == 1, counts) == 0
    without_absent = total(cases.target == 0, counts) == 0
    return {
        **dict.fromkeys(_BOTH, without_present | without_absent),
        **dict.fromkeys(_PRESENT, without_present),
        **dict.fromkeys(_ABSENT, without_absent),
        **dict.fromkeys(_KNOWN, without_present & without_absent),
    }


def frequent(cases: Cases) -> np.ndarray:
    """Returns the findings of `auc_frequent`, bool `[k]`."""
    present, absent = ((cases.target == value).sum(axis=0) for value in (1, 0))
    return (present >= FREQUENT) & (absent >= FREQUENT)


def proportions(cases: Cases) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the metrics that are proportions, see `scores.proportions`."""
    found = {}
    for i, name in enumerate(cases.classes):
        called, known = cases.called[:, i], cases.known[:, i]
        yes, no = cases.target[:, i] == 1, cases.target[:, i] == 0
        found |= {
            f"accuracy/{name}": (called == yes, known),
            f"precision/{name}": (yes, called & known),
            f"recall/{name}": (called, yes),
            f"specificity/{name}": (~called, no),
        }
    return found | {"exact_match": (cases.exact[:, 0] == 1, cases.known.all(axis=1))}


def weighted(cases: Cases, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every metric of r samples, `[k, r]` by finding or `[1, r]`, NaN where undefined.

    Brier is the squared error of the probability, 0..1; ECE compares the probability of the
    finding with how often it is present; `exact_match` is the part of the images without an
    unknown finding in which every finding is right.
    """
    yes, no = cases.target == 1, cases.target == 0
    present, absent = total(yes, counts), total(no, counts)
    hit, false = total(yes & cases.called, counts), total(no & cases.called, counts)
    pooled = tuple(part.sum(axis=0, keepdims=True) for part in (present, absent, hit, false))
    ranked = [ranking_scores(ranking, counts) for ranking in cases.rankings]
    auc = np.stack([pair[0] for pair in ranked])
    chosen = frequent(cases)
    mean = auc[chosen].mean(axis=0) if chosen.any() else np.full(counts.shape[1], math.nan)
    known = cases.known
    ece = [
        calibration_error(cases.score[rows, i], cases.target[rows, i], counts[rows])
        for i, rows in enumerate(known.T)
    ]
    return {
        "auc": auc,
        "auc_frequent": mean[None],
        "pr_auc": np.stack([pair[1] for pair in ranked]),
        **_thresholded(present, absent, hit, false),
        **{f"{name}_micro": value for name, value in _thresholded(*pooled).items()},
        "exact_match": known_mean(cases.exact, counts),
        "ece": np.stack(ece),
        "brier": known_mean(cases.brier, counts),
        "nll": known_mean(cases.nll, counts),
    }


def _thresholded(present, absent, hit, false) -> dict[str, np.ndarray]:
    return {
        "accuracy": ratio(hit + absent - false, present + absent),
        "precision": ratio(hit, hit + false),
        "recall": ratio(hit, present),
        "specificity": ratio(absent - false, absent),
        "f1": ratio(2 * hit, present + hit + false),
    }


def points(cases: Cases) -> dict[str, Column]:
    """Returns every metric of the split; see `weighted` for what they are."""
    n, classes = len(cases), cases.classes
    own = {name: value[:, 0] for name, value in weighted(cases, np.ones((n, 1))).items()}
    own |= _scikit_learn(cases)
    if (chosen := frequent(cases)).any():
        own["auc_frequent"] = own["auc"][chosen].mean()
    images = cases.known.sum(axis=0)
    found = {}
    for metric in own:
        if metric in _BOTH + _PRESENT + _ABSENT + _KNOWN:
            reasons = [_reason(cases, metric, row) for row in range(len(classes))]
            found[metric] = column(own[metric], images, reasons)
        elif metric == "exact_match":
            complete = int(cases.known.all(axis=1).sum())
            found[metric] = single(own[metric], complete, "no image has every finding known")
        elif metric == "auc_frequent":
            reason = f"no finding with {FREQUENT} images that have it and {FREQUENT} that do not"
            found[metric] = single(own[metric], n, reason)
        else:
            found[metric] = single(own[metric], n, _pooled_reason(cases, metric))
    return found


def _scikit_learn(cases: Cases) -> dict[str, np.ndarray]:
    names = ("accuracy", "precision", "recall", "f1", "auc", "pr_auc")
    values = np.full((len(names), len(cases.classes)), math.nan)
    for i, rows in enumerate(cases.known.T):
        if not rows.any():
            continue
        truth, called, score = cases.target[rows, i], cases.called[rows, i], cases.score[rows, i]
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            truth, called, average="binary", zero_division=np.nan
        )
        values[:4, i] = sk.accuracy_score(truth, called), precision, recall, f1
        if 0 < truth.sum() < len(truth):
            values[4:, i] = (
                sk.roc_auc_score(truth, score),
                sk.average_precision_score(truth, score),
            )
    return dict(zip(names, values, strict=True))


def _reason(cases: Cases, metric: str, row: int) -> str:
    name, target = cases.classes[row], cases.target[:, row]
    if (target == MISSING).all():
        return f"{name!r} is known of no image"
    if metric == "precision":
        return f"{name!r} was predicted in no image"
    if metric == "f1":
        return f"{name!r} is neither present nor predicted"
    if metric == "specificity" or (metric in _BOTH and not (target == 0).any()):
        return f"{name!r} is absent from no image"
    return f"{name!r} is present in no image"


def _pooled_reason(cases: Cases, metric: str) -> str:
    if not cases.known.any():
        return "no finding is known of any image"
    if metric == "precision_micro":
        return "no finding was predicted in any image"
    if metric == "specificity_micro":
        return "no finding is absent from any image"
    return "no finding is present in any image"
