"""ROC, precision-recall and reliability of probabilities, one class or finding at a time."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from medtl_jax.data.catalog import MISSING
from medtl_jax.metrics.calibration import Reliability
from medtl_jax.report.style import (
    BLUE,
    DASHES,
    GREY,
    PALETTE,
    RED,
    WIDTH,
    new_figure,
    short_labels,
    styled,
    with_interval,
)
from medtl_jax.report.tables import format_value

# Up to so many curves get a panel each where they are too many for one.
MOST_PANELS = 24
_FAINT = "#bbbbbb"
_NOTHING = (np.empty(0), np.empty(0))
_POINTS = {"youden": ("o", "Youden"), "sensitivity": ("s", "target sensitivity")}


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """One class against the rest, or one finding: `entry` of its area, None where undefined.

    `x`, `y` are the curve, empty where the split holds one kind only; `share` is the part of
    positives; `marks` are `{operating point: (x, y)}`.
    """

    name: str
    entry: dict | None
    x: np.ndarray
    y: np.ndarray
    share: float
    marks: dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of curve: what its area is called, its axes, and how it and guessing are drawn."""

    area: str
    caption: str
    xlabel: str
    ylabel: str
    drawstyle: str
    guess: Callable[[Axes, Curve, str], object]


_ROC = _Kind(
    "AUC",
    "ROC curves with the area under them (95 % interval).",
    "1 - specificity (false positive rate)",
    "sensitivity (true positive rate)",
    "default",
    lambda axes, curve, color: axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, ls=":"),
)
_PRECISION_RECALL = _Kind(
    "PR-AUC",
    "Precision-recall curves with the area under them (95 % interval); dotted: the share of "
    "positives, which is the precision of guessing.",
    "recall (sensitivity)",
    "precision",
    "steps-post",
    lambda axes, curve, color: axes.axhline(curve.share, color=color, linewidth=0.9, ls=":"),
)


@styled
def roc_figure(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str], metrics: dict[str, dict]
) -> Figure:
    """Returns the ROC curves with AUC and interval, and the operating points where known.

    One class against the rest, or one finding over the images whose label is known. With two
    classes the curve of class 1 alone: the other is its mirror image. With more curves than
    colours each has a panel of its own; above 24, those with the lowest AUC are named and the
    others grey.

    Args:
      target: int `[n]`, indices into `classes`, or int `[n, k]` of findings, `MISSING` unknown.
      score: float `[n, k]`, probabilities.
      classes: k names.
      metrics: of this split, see `metrics.uncertainty.score_with_intervals`.
    """
    curves = []
    for name, truth, values in _questions(target, score, classes):
        x, y = roc_curve(truth, values)[:2] if _mixed(truth) else _NOTHING
        recall = _marks(metrics, "recall", name)
        specificity = _marks(metrics, "specificity", name)
        marks = {p: (1 - specificity[p], recall[p]) for p in recall if p in specificity}
        curves.append(Curve(name, _entry(metrics, "auc", name), x, y, _share(truth), marks))
    return _draw(_ROC, curves)


@styled
def precision_recall_figure(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str], metrics: dict[str, dict]
) -> Figure:
    """Returns the precision-recall curves with their area; dotted: the share of positives.

    That share is the precision of guessing, so that curves of classes of unlike size cannot be
    compared by their height alone. Arguments as of `roc_figure`.
    """
    curves = []
    for name, truth, values in _questions(target, score, classes):
        y, x = precision_recall_curve(truth, values)[:2] if _mixed(truth) else _NOTHING
        precision, recall = _marks(metrics, "precision", name), _marks(metrics, "recall", name)
        marks = {p: (recall[p], precision[p]) for p in recall if p in precision}
        curves.append(Curve(name, _entry(metrics, "pr_auc", name), x, y, _share(truth), marks))
    return _draw(_PRECISION_RECALL, curves)


def _questions(target, score, classes):
    """(name, truth bool `[m]`, probability `[m]`) of each class against the rest, or finding."""
    if target.ndim == 2:
        known = target != MISSING
        return [
            (name, target[known[:, i], i] == 1, score[known[:, i], i])
            for i, name in enumerate(classes)
        ]
    labels = [1] if len(classes) == 2 else range(len(classes))
    return [(classes[label], target == label, score[:, label]) for label in labels]


def _mixed(truth: np.ndarray) -> bool:
    return 0 < truth.sum() < len(truth)


def _share(truth: np.ndarray) -> float:
    return float(truth.mean()) if len(truth) else float("nan")


def _entry(metrics: dict[str, dict], metric: str, name: str) -> dict | None:
    """The entry of a class; a task with one class or finding may have the overall one only."""
    return metrics.get(f"{metric}/{name}") or metrics.get(metric)


def _marks(metrics: dict[str, dict], metric: str, name: str) -> dict[str, float]:
    """`{operating point: value}` of a metric where it is defined."""
    found = {point: _entry(metrics, f"{metric}@{point}", name) for point in _POINTS}
    return {p: e["value"] for p, e in found.items() if e and e["value"] is not None}


def _draw(kind: _Kind, curves: Sequence[Curve]) -> Figure:
    drawn = [curve for curve in curves if len(curve.x)]
    absent = [curve.name for curve in curves if not len(curve.x)]
    caption = kind.caption + (f" Undefined here: {', '.join(absent)}." if absent else "")
    if len(PALETTE) < len(drawn) <= MOST_PANELS:
        return _panels(kind, drawn, caption)
    weakest = sorted(drawn, key=_area)[: len(PALETTE)]
    named = [curve for curve in drawn if curve in weakest]
    figure = new_figure(WIDTH * 0.97 + 0.19 * (len(named) + 2), caption)
    axes = figure.add_subplot()
    style = {"drawstyle": kind.drawstyle}
    names = short_labels([curve.name for curve in drawn], 24)
    for curve, name in zip(drawn, names, strict=True):
        if curve not in named:
            axes.plot(curve.x, curve.y, color=_FAINT, linewidth=0.7, zorder=1, **style)
            continue
        place = named.index(curve)
        color, area = PALETTE[place], with_interval(curve.entry) if curve.entry else "not scored"
        kind.guess(axes, curve, color)
        axes.plot(curve.x, curve.y, color=color, ls=DASHES[place], label=f"{name}: {area}", **style)
    if len(drawn) == 1:
        for point, (x, y) in drawn[0].marks.items():
            marker, words = _POINTS[point]
            axes.plot(x, y, marker, color="black", markersize=6, mfc="none", label=words)
    if rest := len(drawn) - len(named):
        axes.plot([], [], color=_FAINT, label=f"{rest} classes of higher {kind.area}")
    if absent:
        what = short_labels(absent, 24)[0] if len(absent) == 1 else f"{len(absent)} classes"
        axes.plot([], [], " ", label=f"{what}: undefined")
    _frame(axes)
    axes.set(xlabel=kind.xlabel, ylabel=kind.ylabel)
    figure.legend(loc="outside lower left", title=f"{kind.area} (95% CI)", alignment="left")
    return figure


def _panels(kind: _Kind, drawn: Sequence[Curve], caption: str) -> Figure:
    """A small panel a curve, three in a row."""
    rows, columns = -(-len(drawn) // 3), 3
    figure = new_figure(1.75 * rows + 0.5, caption)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    names = short_labels([curve.name for curve in drawn], 17)
    for axes, curve, name in zip(grid.flat, drawn, names, strict=False):
        kind.guess(axes, curve, GREY)
        axes.plot(curve.x, curve.y, color=BLUE, drawstyle=kind.drawstyle)
        value = format_value(curve.entry) if curve.entry else "not scored"
        axes.set_title(f"{name}\n{kind.area} {value}", fontsize=8.5, loc="left")
        _frame(axes)
        axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    for i, axes in enumerate(grid.flat):
        if i >= len(drawn):
            axes.set_axis_off()
        elif i + columns >= len(drawn):
            # The panel below is empty.
            axes.tick_params(labelbottom=True)
    figure.supxlabel(kind.xlabel, fontsize=9)
    figure.supylabel(kind.ylabel, fontsize=9)
    return figure


def _area(curve: Curve) -> float:
    value = curve.entry["value"] if curve.entry else None
    return -1.0 if value is None else value


def _frame(axes: Axes) -> None:
    axes.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal")


@styled
def reliability_figure(
    before: Reliability, after: Reliability | None = None, unit: str = "image"
) -> Figure:
    """Returns observed frequency against predicted probability, and how many images a bin has.

    Args:
      before: of the network's own probabilities, see `metrics.calibration.reliability`.
      after: after temperature scaling; None where there was none.
      unit: what is counted, singular.
    """
    caption = (
        "Reliability: where a curve lies below the diagonal the probabilities are too high. "
        f"Bottom: {unit}s in each bin."
    )
    figure = new_figure(WIDTH * 1.32, caption)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label="perfect")
    series = [("before scaling" if after else "as predicted", before, RED, "--", "o")]
    series += [("after temperature scaling", after, BLUE, "-", "s")] if after else []
    for label, bins, color, dash, marker in series:
        filled = bins.count > 0
        upper.plot(
            bins.confidence[filled], bins.accuracy[filled], color=color, linestyle=dash,
            marker=marker, markersize=4, label=label,
        )  # fmt: skip
        edges = np.linspace(0, 1, len(bins.count) + 1)
        lower.stairs(bins.count, edges, color=color, linestyle=dash, linewidth=1.4)
    upper.set(xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), ylabel="observed frequency")
    upper.legend(loc="upper left")
    lower.set(xlabel="predicted probability", ylabel="count")
    return figure
