"""Operating points: thresholds chosen on validation, and what they give on other images.

Each is a yes-or-no question, and an image is called positive where its probability is at least
the threshold:

- `classify` with two classes: class 1 against class 0; with more: each class against the rest;
- `ordinal`: for each rank but the lowest, this rank or a higher one (`>=<class>`), as in
  referable retinopathy: the ranks have an order, and a middle one alone is no decision;
- `multilabel`: each finding, over the images whose label is known.

There are two points. `youden` has the largest sensitivity + specificity - 1 (Youden 1950);
`sensitivity` is the highest threshold that reaches a wanted sensitivity. Both hold for the
network's own probabilities, before any temperature.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from medtl_jax.data.catalog import MISSING
from medtl_jax.errors import UserError
from medtl_jax.metrics.intervals import Draws, Share, bootstrap_counts, interval_of
from medtl_jax.metrics.weighted import ratio

POINTS = ("youden", "sensitivity")
POINT_METRICS = ("recall", "specificity", "precision", "npv", "f1", "accuracy")
# Why a metric has no value; npv is the negative predictive value.
_UNDEFINED = {
    "recall": "no positive image",
    "specificity": "no negative image",
    "precision": "no image at or above the threshold",
    "npv": "no image below the threshold",
    "f1": "no positive image, and none at or above the threshold",
    "accuracy": "no label is known",
}


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A probability from which on an image is called positive; None with the reason why."""

    value: float | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """One yes-or-no question about every image.

    Attributes:
      truth: bool `[n]`; False where unknown.
      probability: float64 `[n]`, of yes.
      known: bool `[n]`.
    """

    truth: np.ndarray
    probability: np.ndarray
    known: np.ndarray


def question_names(task: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of a task's questions; none for `segment` and `regress`."""
    if task == "ordinal":
        return tuple(f">={name}" for name in classes[1:])
    if task == "classify" and len(classes) == 2:
        return (classes[1],)
    return tuple(classes) if task in ("classify", "multilabel") else ()


def questions(
    task: str, target: np.ndarray, score: np.ndarray, classes: Sequence[str]
) -> dict[str, Question]:
    """Returns `{name: Question}` in the order of `question_names`.

    Args:
      task: one of `catalog.TASKS`.
      target: see `catalog.Split`.
      score: float `[n, k]`, probabilities of the classes or findings.
      classes: k names.

    Raises:
      ValueError: target, score and classes do not hold together.
    """
    names = question_names(task, classes)
    if not names:
        return {}
    target, score = np.asarray(target), np.asarray(score, np.float64)
    shape = score.shape if task == "multilabel" else score.shape[:1]
    if score.ndim != 2 or score.shape[1] != len(classes) or target.shape != shape:
        raise ValueError(
            f"{task} of {len(classes)} classes: want score [n, k] and its target, got "
            f"{score.shape}, {target.shape}"
        )
    if len(score) == 0 or not np.isfinite(score).all():
        raise ValueError("want at least one image and finite scores")
    if task == "multilabel":
        columns = zip((target == 1).T, score.T, (target != MISSING).T, strict=True)
        return {name: Question(*column) for name, column in zip(names, columns, strict=True)}
    labels = range(len(classes) - len(names), len(classes))
    everywhere = np.ones(len(target), bool)
    if task == "ordinal":
        pairs = [(target >= label, score[:, label:].sum(axis=1)) for label in labels]
    else:
        pairs = [(target == label, score[:, label]) for label in labels]
    return {name: Question(*pair, everywhere) for name, pair in zip(names, pairs, strict=True)}


def check_sensitivity(value: float) -> None:
    """Raises UserError unless `value` can be asked of an operating point."""
    if not 0 < value <= 1:
        raise UserError(f"eval.target_sensitivity={value} must lie in 0 < s <= 1")


def fit_thresholds(
    task: str,
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    target_sensitivity: float,
) -> dict[str, dict[str, Threshold]]:
    """Returns `{question: {point: Threshold}}` for the validation images.

    A threshold is one of the images' own probabilities. Of several with the same Youden index
    it is the highest. It is None, with a reason, where no known label is positive (or, for
    `youden`, none negative), where all images have the same probability, and where `youden` would
    be no better than chance.

    Args:
      task, target, score, classes: see `questions`.
      target_sensitivity: in (0, 1].

    Raises:
      UserError: `target_sensitivity` (`eval.target_sensitivity`) is out of range.
      ValueError: see `questions`.
    """
    check_sensitivity(target_sensitivity)
    found = {}
    for name, question in questions(task, target, score, classes).items():
        truth, probability = question.truth[question.known], question.probability[question.known]
        found[name] = {
            "youden": _youden(truth, probability),
            "sensitivity": _reach(truth, probability, target_sensitivity),
        }
    return found


def operating_scores(
    task: str,
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    thresholds: Mapping[str, Mapping[str, Threshold]],
    patients: np.ndarray | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict]:
    """Returns what the thresholds give on these images, `{name: entry}` as in `metrics.json`.

    Names are `recall@youden`, `recall@sensitivity` and so on for `POINT_METRICS`, with
    `/<question>` behind them where a task has more than the one question. There is no mean over
    the questions: each has its own threshold. Entries are as of `uncertainty.score_with_intervals`
    with its kind of interval, but `n` and `n_patients` count those with a known label. The
    thresholds are fixed: what their choice on validation adds to the uncertainty is not in it.

    Args:
      task, target, score, classes: see `questions`.
      thresholds: of `fit_thresholds`, fitted on another split.
      patients: of each image `[n]`; whole patients are then resampled.
      resamples: number of draws.
      level: coverage of the interval, between 0 and 1.
      seed: of the draws.

    Raises:
      ValueError: arguments that do not hold together.
    """
    asked = questions(task, target, score, classes)
    if set(asked) != set(thresholds):
        raise ValueError(f"want thresholds of {sorted(asked)}, got {sorted(thresholds)}")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"want resamples >= 1 and 0 < level < 1, got {resamples}, {level}")
    if not asked:
        return {}
    unit = _units(len(score), patients)
    points = [(name, point) for name in asked for point in POINTS]
    tables = np.stack([_table(asked[q], thresholds[q][point], unit) for q, point in points])
    drawn = _resample(tables, resamples, seed)
    found = {}
    for (name, point), table, draws in zip(points, tables, drawn, strict=True):
        suffix = f"/{name}" if task != "classify" or len(classes) > 2 else ""
        reason = thresholds[name][point].reason
        entries = _entries(table, draws, reason, level, patients is not None)
        found |= {f"{metric}@{point}{suffix}": entry for metric, entry in entries.items()}
    return found


def _units(n: int, patients: np.ndarray | None) -> np.ndarray:
    """A number for what is drawn, int `[n]`: the image, or its patient."""
    if patients is None:
        return np.arange(n)
    if np.shape(patients) != (n,):
        raise ValueError(f"want a patient for each of {n} images, got {len(patients)}")
    return np.unique(patients, return_inverse=True)[1]


def _youden(truth: np.ndarray, probability: np.ndarray) -> Threshold:
    if reason := _unusable(truth, probability):
        return Threshold(None, reason)
    if truth.all():
        return Threshold(None, "no validation image is negative")
    cuts, hits, alarms = _cuts(truth, probability)
    positives = int(truth.sum())
    # The index times positives times negatives: integers, so that ties are exact.
    gain = hits * (len(truth) - positives) - alarms * positives
    best = int(gain.argmax())
    if gain[best] <= 0:
        return Threshold(None, "no threshold is better than chance on validation")
    return Threshold(float(cuts[best]))


def _reach(truth: np.ndarray, probability: np.ndarray, sensitivity: float) -> Threshold:
    if reason := _unusable(truth, probability):
        return Threshold(None, reason)
    cuts, hits, _ = _cuts(truth, probability)
    # The product of a decimal fraction and a count may lie a rounding above the whole number.
    reached = hits >= sensitivity * truth.sum() - 1e-9
    return Threshold(float(cuts[reached.argmax()]))


def _unusable(truth: np.ndarray, probability: np.ndarray) -> str:
    if not truth.any():
        return "no validation image is positive"
    if np.ptp(probability) == 0:
        return "all validation images have the same probability"
    return ""


def _cuts(truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct thresholds from high to low, and the true and false positives at each."""
    order = np.argsort(-probability, kind="stable")
    values = probability[order]
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))
    hits = np.cumsum(truth[order], dtype=np.int64)[last]
    return values[last], hits, last + 1 - hits


def _table(question: Question, threshold: Threshold, unit: np.ndarray) -> np.ndarray:
    """Images with a known label that each unit has, float64 `[units, 4]`: TP, FP, FN, TN.

    Without a threshold nothing is called positive.
    """
    value = math.inf if threshold.value is None else threshold.value
    called = question.probability >= value
    column = np.where(called, np.where(question.truth, 0, 1), np.where(question.truth, 2, 3))
    size = 4 * (int(unit.max()) + 1)
    return np.bincount(4 * unit + column, question.known, minlength=size).reshape(-1, 4)


def _resample(tables: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The sums over each draw of the units, `[points, 4, resamples]`; `tables` as of `_table`."""
    points, units = tables.shape[:2]
    rows = tables.transpose(0, 2, 1).reshape(-1, units)
    chunks = [rows @ counts for counts in bootstrap_counts(units, units, resamples, seed)]
    return np.concatenate(chunks, axis=1).reshape(points, 4, resamples)


def _rates(table: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of `[4, r]` counts, `[r]` each, NaN where undefined."""
    tp, fp, fn, tn = table
    return {
        "recall": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "precision": ratio(tp, tp + fp),
        "npv": ratio(tn, tn + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }


def _shares(table: np.ndarray) -> dict[str, Share]:
    """The metrics that are proportions of images, from the counts `[units, 4]`."""
    tp, fp, fn, tn = table.T
    pairs = {
        "recall": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "precision": (tp, tp + fp),
        "npv": (tn, tn + fn),
        "accuracy": (tp + tn, tp + fp + fn + tn),
    }
    return {
        name: Share(int(hit.sum()), int(counted.sum()), int((counted > 0).sum()))
        for name, (hit, counted) in pairs.items()
    }


def _entries(
    table: np.ndarray, draws: np.ndarray, reason: str, level: float, by_patient: bool
) -> dict[str, dict]:
    """`{metric: entry}` of one operating point; `reason` says why it does not exist."""
    table = table[table.any(axis=1)]
    total = table.sum(axis=0)
    points = _rates(total[:, None])
    # The jackknife leaves out one unit after another.
    resampled = Draws(_rates(draws), _rates((total - table).T), len(table), _shares(table))
    found = {}
    for metric in POINT_METRICS:
        value, interval = float(points[metric][0]), None
        why = reason or (_UNDEFINED[metric] if math.isnan(value) else "")
        if not why:
            interval, why = interval_of(resampled, metric, value, level, by_patient)
        found[metric] = {
            "value": None if reason or math.isnan(value) else value,
            f"ci{100 * level:g}": interval,
            "n": int(total.sum()),
            **({"n_patients": len(table)} if by_patient else {}),
            **({"reason": why} if why else {}),
        }
    return found
