"""All metrics of a split, whatever its task, computed once over all its images.

`metric` is the mean over the classes, `metric/class` the value of one, `metric_micro` counts all
classes together. A metric that the data cannot define is NaN with a reason, never 0; the modules of
the tasks say when that is: `classification` (classify, ordinal), `multilabel`, `segmentation`,
`regression`. Each of them offers `prepare`, `points` (the split's own values), `weighted` (those of
many weighted samples), `left_out` (classes that a mean does not count) and `proportions`.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from sklearn import metrics as sk

from medtl_jax.data.catalog import Array
from medtl_jax.metrics import classification, multilabel, regression, segmentation
from medtl_jax.metrics.classification import check_predictions
from medtl_jax.metrics.entries import Score, named_scores

Cases = classification.Cases | multilabel.Cases | segmentation.Cases | regression.Cases

_MODULES = {
    "classify": classification,
    "ordinal": classification,
    "multilabel": multilabel,
    "segment": segmentation,
    "regress": regression,
}


def task_scores(
    task: str,
    target: Array,
    score: Array,
    classes: Sequence[str],
    *,
    mask: np.ndarray | None = None,
    surfaces: bool = True,
    tolerance: float = 2.0,
) -> dict[str, Score]:
    """Returns every metric of the task: those over all classes, then `metric/class`.

    Args:
      task: one of `catalog.TASKS`.
      target: as in `catalog.Split`.
      score: probabilities `[n, k]` or `[n, h, w, k]` (segment), or numbers `[n, k]` (regress).
      classes: k names; of a segmentation the background first.
      mask: bool `[n]`, True where an image counts, False for padding; None counts all.
      surfaces: segment: whether HD95 and NSD are computed, which takes longest.
      tolerance: segment: of NSD, in pixels.

    Raises:
      ValueError: an unknown task, or arguments that do not hold together.
    """
    cases = prepare(task, target, score, classes, mask=mask, surfaces=surfaces, tolerance=tolerance)
    return scores_of(task, cases)


def prepare(
    task: str,
    target: Array,
    score: Array,
    classes: Sequence[str],
    *,
    mask: np.ndarray | None = None,
    surfaces: bool = True,
    tolerance: float = 2.0,
) -> Cases:
    """Returns the images of a split, checked, reduced to what the metrics need; see `task_scores`.

    `len(cases)` is the number of images that count. Everything slow happens here, once.
    """
    module = task_module(task)
    if task == "segment":
        return module.prepare(target, score, classes, mask, surfaces=surfaces, tolerance=tolerance)
    if task == "ordinal":
        return module.prepare(target, score, classes, mask, ordinal=True)
    return module.prepare(target, score, classes, mask)


def scores_of(task: str, cases: Cases) -> dict[str, Score]:
    """Returns every metric of prepared cases, as `task_scores` does."""
    module = task_module(task)
    columns = module.points(cases)
    left_out = module.left_out(cases, np.ones((len(cases), 1)))
    noun = "findings" if task == "multilabel" else ""
    return named_scores(columns, left_out, scored_classes(task, cases.classes), len(cases), noun)


def proportions(task: str, cases: Cases) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns `{metric: (hit, counted)}`, bool `[n]` each, of the proportions of images.

    The metric is the share of the `counted` images that are a `hit`; the names are those of
    `task_scores`. A proportion of pixels is none, nor is a mean of proportions.
    """
    found = task_module(task).proportions(cases)
    if len(scored_classes(task, cases.classes)) == 1:
        # The mean over one class is its value.
        found |= {name.partition("/")[0]: pair for name, pair in found.items()}
    return found


def scored_classes(task: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Returns the classes that have metrics of their own: all but a segmentation's background."""
    return tuple(classes[1:] if task == "segment" else classes)


def confusion(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Returns the confusion matrix, int64 `[k, k]`: rows are the truth, columns the argmax.

    Args:
      target: int `[n]`, class indices.
      score: float `[n, k]`, probabilities.

    Raises:
      ValueError: see `classification.check_predictions`.
    """
    target, score = check_predictions(target, score)
    return sk.confusion_matrix(target, score.argmax(axis=1), labels=np.arange(score.shape[1]))


def task_module(task: str) -> ModuleType:
    """Returns the module with the metrics of `task`. ValueError if there is none."""
    if task not in _MODULES:
        raise ValueError(f"want a task of {', '.join(_MODULES)}, got {task!r}")
    return _MODULES[task]
