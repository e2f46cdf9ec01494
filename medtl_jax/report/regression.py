"""Figures of predicted numbers: against the truth, their agreement, their errors."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from medtl_jax.data.catalog import Array
from medtl_jax.report.classification import MOST_EXAMPLES
from medtl_jax.report.style import (
    BLUE,
    GREY,
    RED,
    WIDTH,
    image_grid,
    new_figure,
    short_labels,
    styled,
)

_DOTS = {"s": 14, "alpha": 0.5, "color": BLUE, "linewidths": 0, "rasterized": True}


@styled
def predicted_figure(target: np.ndarray, score: np.ndarray, names: Sequence[str]) -> Figure:
    """Returns predicted against true numbers, a panel a target; the band is the MAE.

    Args:
      target: float `[n, k]`, NaN unknown.
      score: float `[n, k]`, in the targets' units.
      names: k targets.
    """
    caption = "Predicted against true values; on the line they agree, the band is +- the MAE."
    figure, panels = _panels(names, caption, 0.98)
    for axes, truth, called, name in zip(panels, *_columns(target, score), names, strict=True):
        mae = np.abs(called - truth).mean() if len(truth) else 0.0
        ends = _range(np.concatenate([truth, called]))
        axes.fill_between(ends, ends - mae, ends + mae, color="#cccccc", alpha=0.6, linewidth=0)
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.scatter(truth, called, **_DOTS)
        axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="true", ylabel="predicted")
        axes.set_title(f"{short_labels([name], 24)[0]}: MAE {mae:.4g}", loc="left")
    return figure


@styled
def agreement_figure(target: np.ndarray, score: np.ndarray, names: Sequence[str]) -> Figure:
    """Returns the Bland-Altman plot of each target (Bland & Altman 1986).

    The difference predicted - true against the mean of both; lines at the mean difference and
    at the limits of agreement, 1.96 standard deviations (n - 1) to both sides. Arguments as of
    `predicted_figure`.
    """
    caption = (
        "Bland-Altman: difference (predicted - true) against the mean of both; the mean "
        "difference and the limits of agreement (+- 1.96 SD)."
    )
    figure, panels = _panels(names, caption, 0.75)
    for axes, truth, called, name in zip(panels, *_columns(target, score), names, strict=True):
        difference = called - truth
        axes.scatter((called + truth) / 2, difference, **_DOTS)
        mean = difference.mean() if len(difference) else np.nan
        spread = 1.96 * difference.std(ddof=1) if len(difference) > 1 else np.nan
        for place, dash in ((mean, "-"), (mean - spread, "--"), (mean + spread, "--")):
            if np.isfinite(place):
                axes.axhline(place, color=RED, linestyle=dash, linewidth=1.2)
                axes.annotate(
                    f"{place:.4g}", (1, place), xycoords=("axes fraction", "data"), ha="right",
                    va="bottom", fontsize=9,
                )  # fmt: skip
        axes.set(xlabel="mean of predicted and true", ylabel="predicted - true")
        axes.set_title(short_labels([name], 24)[0], loc="left")
    return figure


@styled
def residuals_figure(target: np.ndarray, score: np.ndarray, names: Sequence[str]) -> Figure:
    """Returns a histogram of the errors of each target. Arguments as of `predicted_figure`."""
    caption = "Errors (predicted - true); the dashed line is their mean."
    figure, panels = _panels(names, caption, 0.6)
    for axes, truth, called, name in zip(panels, *_columns(target, score), names, strict=True):
        difference = called - truth
        if len(difference):
            axes.hist(difference, bins=min(30, max(5, len(difference) // 5)), color="#7fb7d8")
            axes.axvline(difference.mean(), color=RED, linestyle="--", linewidth=1.2)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set(xlabel="predicted - true", ylabel="images")
        axes.set_title(short_labels([name], 24)[0], loc="left")
    return figure


@styled
def number_errors_figure(
    images: Array, target: np.ndarray, score: np.ndarray, names: Sequence[str], ids: np.ndarray
) -> Figure | None:
    """Returns the worst errors as images with true and predicted number; None without any.

    Args:
      images: uint8 `[n, h, w, c]`; only the chosen rows are taken.
      target, score, names: as of `predicted_figure`.
      ids: n image ids.
    """
    pairs = choose_number_errors(target, score)
    if not len(pairs):
        return None
    labels = short_labels(names, 20)
    titles = [
        f"{labels[k]}: {score[row, k]:.4g}\ntrue {target[row, k]:.4g} "
        f"({score[row, k] - target[row, k]:+.4g})"
        for row, k in pairs
    ]
    rows = pairs[:, 0]
    caption = "Worst errors: the largest, measured in standard deviations of the true values."
    return image_grid(images[rows], titles, ids[rows], [False] * len(rows), caption)


def choose_number_errors(
    target: np.ndarray, score: np.ndarray, count: int = MOST_EXAMPLES
) -> np.ndarray:
    """Returns (image, target) pairs `[<= count, 2]` of the largest errors, one an image.

    Errors of different targets are compared in standard deviations of the true values.

    Args:
      target: float `[n, k]`, NaN unknown.
      score: float `[n, k]`.
      count: the most to return.
    """
    size = _sizes(target, score)
    place = size.argmax(axis=1)
    worst = size[np.arange(len(size)), place]
    rows = np.argsort(-worst, kind="stable")[:count]
    return _pairs(rows[worst[rows] > 0], place)


def choose_closest(target: np.ndarray, score: np.ndarray, count: int = MOST_EXAMPLES) -> np.ndarray:
    """Returns (image, target) pairs `[<= count, 2]` of the smallest errors, one an image.

    Arguments and measure as of `choose_number_errors`.
    """
    size = np.where(np.isnan(target), np.inf, _sizes(target, score))
    place = size.argmin(axis=1)
    best = size[np.arange(len(size)), place]
    rows = np.argsort(best, kind="stable")[:count]
    return _pairs(rows[np.isfinite(best[rows])], place)


def _pairs(rows: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.stack([rows, place[rows]], axis=1)


def _sizes(target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Absolute errors in standard deviations of the true values, `[n, k]`; 0 where unknown."""
    size = np.zeros(target.shape)
    for k, (truth, called) in enumerate(zip(*_columns(target, score), strict=True)):
        if len(truth):
            # One value alone has no spread.
            size[~np.isnan(target[:, k]), k] = np.abs(called - truth) / (truth.std() or 1.0)
    return size


def _columns(target: np.ndarray, score: np.ndarray) -> tuple[list, list]:
    """True and predicted values of each target, unknown ones left out."""
    known = ~np.isnan(target)
    columns = range(target.shape[1])
    return (
        [target[known[:, k], k].astype(np.float64) for k in columns],
        [score[known[:, k], k].astype(np.float64) for k in columns],
    )


def _panels(names: Sequence[str], caption: str, shape: float) -> tuple[Figure, list]:
    """A figure with a panel a target, one under the other, each `shape` times as high as wide."""
    figure = new_figure(len(names) * (WIDTH * shape + 0.1), caption)
    return figure, figure.subplots(len(names), 1, squeeze=False)[:, 0].tolist()


def _range(values: np.ndarray) -> np.ndarray:
    """Ends of an axis that hold all values with a small margin."""
    if not len(values):
        return np.array([0.0, 1.0])
    low, high = values.min(), values.max()
    margin = 0.05 * (high - low) or 0.5
    return np.array([low - margin, high + margin])
