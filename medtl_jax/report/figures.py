"""The figures of one split for each task, from plain arrays."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from medtl_jax.data.catalog import MISSING, Array
from medtl_jax.metrics.calibration import Reliability, pixel_reliability, reliability
from medtl_jax.metrics.scores import confusion
from medtl_jax.metrics.segmentation import prepare
from medtl_jax.report.classification import (
    choose_right,
    choose_wrong,
    confusion_figure,
    examples_figure,
    finding_errors_figure,
)
from medtl_jax.report.curves import class_bars_figure, curves_figure, metrics_figure
from medtl_jax.report.explanations import Explanations, gradcam_figure
from medtl_jax.report.rates import precision_recall_figure, reliability_figure, roc_figure
from medtl_jax.report.regression import (
    agreement_figure,
    number_errors_figure,
    predicted_figure,
    residuals_figure,
)
from medtl_jax.report.segmentation import (
    choose_cases,
    dice_figure,
    observer_dice,
    overlay_figure,
)

Figures = dict[str, Figure | None]


@dataclasses.dataclass(frozen=True)
class View:
    """What the figures of one split show.

    Attributes:
      classes: k names of classes, findings or targets.
      target: as in `catalog.Split`.
      score: probabilities or numbers, `[n, k]`; `segment`: `[n, h, w, k]`.
      images: uint8 `[n, h, w, c]`; only the rows that are shown are taken.
      ids: str `[n]`.
      metrics: of this split, `{metric: {"value", "ci95", "n", ...}}`.
      history: one record an epoch; empty where nothing was trained.
      calibrated: `score` after temperature scaling, or None.
      explanations: of some of the images, or None.
      mask2: uint8 `[n, h, w]`, a second observer's masks, or None.
      thresholds: `multilabel`: float `[k]`, from which on a finding is called present, or None.
    """

    classes: tuple[str, ...]
    target: Array
    score: np.ndarray
    images: Array
    ids: np.ndarray
    metrics: dict[str, dict]
    history: Sequence[dict] = ()
    calibrated: Array | None = None
    explanations: Explanations | None = None
    mask2: Array | None = None
    thresholds: np.ndarray | None = None


def draw_figures(task: str, view: View) -> dict[str, Figure]:
    """Returns the figures of a split by name, each with its caption as label.

    Args:
      task: one of `catalog.TASKS`.
      view: of that task.
    """
    drawn: Figures = {"metrics": metrics_figure(view.metrics)}
    if view.history:
        drawn["curves"] = curves_figure(view.history)
    drawn |= _DRAW[task](view)
    if view.explanations is not None:
        drawn["gradcam"] = gradcam_figure(view.explanations)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _draw_classes(view: View) -> Figures:
    """`classify` and `ordinal`."""
    target, score = np.asarray(view.target), view.score
    after = None if view.calibrated is None else reliability(target, view.calibrated)
    return {
        "confusion": confusion_figure(confusion(target, score), view.classes),
        **_rates(view),
        "reliability": reliability_figure(reliability(target, score), after),
        "examples": _examples(view, choose_right(target, score), "Most confident right ones."),
        "errors": _examples(
            view, choose_wrong(target, score), "Worst errors: the most confident wrong ones."
        ),
    }


def _rates(view: View) -> Figures:
    arguments = (view.target, view.score, view.classes, view.metrics)
    return {"roc": roc_figure(*arguments), "pr": precision_recall_figure(*arguments)}


def _examples(view: View, rows: np.ndarray, caption: str) -> Figure | None:
    if not len(rows):
        return None
    return examples_figure(
        view.images[rows],
        view.target[rows],
        view.score[rows],
        view.classes,
        view.ids[rows],
        caption,
    )


def _draw_findings(view: View) -> Figures:
    """`multilabel`."""
    target = np.asarray(view.target)
    before = _pooled(target, view.score)
    after = None if view.calibrated is None else _pooled(target, view.calibrated)
    positives = (target == 1).sum(axis=0)
    return {
        "auc": class_bars_figure(view.metrics, "auc", view.classes, positives),
        **_rates(view),
        "reliability": reliability_figure(before, after),
        "errors": finding_errors_figure(
            view.images, target, view.score, view.classes, view.ids, view.thresholds
        ),
    }


def _pooled(target: np.ndarray, score: np.ndarray) -> Reliability:
    """Reliability over all findings together: of one, too few images are positive."""
    known = target != MISSING
    return reliability(target[known], score[known])


def _draw_masks(view: View) -> Figures:
    """`segment`."""
    cases = prepare(view.target, view.score, view.classes, surfaces=False)
    dice, second, after = cases.images["dice"], None, None
    if view.calibrated is not None:
        scaled = prepare(view.target, view.calibrated, view.classes, surfaces=False)
        after = pixel_reliability(scaled)
    if view.mask2 is not None:
        second = observer_dice(view.target, view.mask2, view.classes)
    drawn: Figures = {
        "dice": dice_figure(dice, view.classes, second),
        "confusion": confusion_figure(cases.tables.sum(axis=0), view.classes, "pixel"),
        "reliability": reliability_figure(pixel_reliability(cases), after, "pixel"),
    }
    for case, row in choose_cases(dice).items():
        drawn[f"overlay_{case}"] = overlay_figure(
            case,
            view.images[row],
            view.target[row],
            view.score[row].argmax(axis=-1),
            view.classes,
            view.ids[row],
            _mean(dice[row]),
            None if second is None else (view.mask2[row], _mean(second[row])),
        )
    return drawn


def _mean(values: np.ndarray) -> float:
    """The mean of the defined values, NaN without any."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _draw_numbers(view: View) -> Figures:
    """`regress`."""
    arguments = (np.asarray(view.target), view.score, view.classes)
    return {
        "predicted": predicted_figure(*arguments),
        "agreement": agreement_figure(*arguments),
        "residuals": residuals_figure(*arguments),
        "errors": number_errors_figure(view.images, *arguments, view.ids),
    }


_DRAW: dict[str, Callable[[View], Figures]] = {
    "classify": _draw_classes,
    "ordinal": _draw_classes,
    "multilabel": _draw_findings,
    "segment": _draw_masks,
    "regress": _draw_numbers,
}
