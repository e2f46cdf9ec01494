"""Figures of a ladder: learning curves of every strategy, and what each metric costs.

Metrics whose best value is 1 have an axis that is logarithmic in what is missing to 1: good
strategies differ there, and a poor one does not press them together.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from medtl_jax.metrics.seeds import Estimate
from medtl_jax.report.ladder import Ladder, Level, Rung, percent, val_images
from medtl_jax.report.study_page import entry_of
from medtl_jax.report.style import (
    BLUE,
    GREY,
    RED,
    new_figure,
    short_labels,
    styled,
    with_interval,
)
from medtl_jax.report.tables import BOUNDED, label_of

_PALE = "#c9c9c9"
_COLUMNS = 2
# Inches: of a panel, of what is around all of them, of a row of names.
_PANEL, _AROUND, _ROW = 1.55, 0.5, 0.2
# Ticks of the axis of what is missing to 1, and how far apart they are at least, of its length.
_TICKS = (
    -1, 0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999,
    0.9995, 0.9999, 1,
)  # fmt: skip
_APART = 0.13
_RING = {
    "marker": "o",
    "markersize": 11,
    "markerfacecolor": "none",
    "markeredgecolor": RED,
    "markeredgewidth": 1.8,
}
_RING_WORDS = "orange ring: what validation picks"


def ladder_figures(ladder: Ladder) -> dict[str, Figure]:
    """Returns the figures by name: for each primary metric its curves and its costs.

    Of one fraction alone there is no curve: the strategies are rows.
    """
    figures = {}
    for number, metric in enumerate(ladder.metrics):
        # Figures become files: a name from outside is none for them.
        plain, slash, _ = metric.partition("/")
        name = f"{plain}_{number}" if slash else plain
        curves = curves_figure if len(ladder.levels) > 1 else rows_figure
        figures[f"curves_{name}"] = curves(ladder, metric)
        figures[f"costs_{name}"] = costs_figure(ladder, metric)
    return figures


@styled
def curves_figure(ladder: Ladder, metric: str) -> Figure:
    """Returns the learning curves, a panel for each strategy.

    Test metric over the number of labelled images (a logarithmic axis), the 95 % interval as a
    band. The reference is in every panel; pale lines are the other strategies. A ring marks where
    validation picks the panel's strategy.

    Args:
      ladder: what was found.
      metric: one of `ladder.metrics`.
    """
    names = [rung.strategy for rung in ladder.levels[0].rungs]
    sizes = [float(np.mean(level.images)) for level in ladder.levels]
    curves = {name: [_rung(level, name).test[metric] for level in ladder.levels] for name in names}
    labels = dict(zip(names, short_labels(names, 24), strict=True))
    rows = -(-len(names) // _COLUMNS)
    figure = new_figure(
        rows * _PANEL + _AROUND,
        f"{label_of(metric)} on the test split over the number of labelled images (log scale): "
        f"mean over {ladder.seeds} seed{'s' * (ladder.seeds > 1)}, the band is its 95 % interval. "
        f"{_scale_words(metric)}Black, dashed beside another strategy: {ladder.reference}; pale: "
        f"the other strategies; {_RING_WORDS}. The labels of {val_images(ladder)} come on top "
        "everywhere.",
    )
    grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for other in names:
            if other not in (name, ladder.reference):
                axes.plot(sizes, _values(curves[other]), color=_PALE, linewidth=0.8, zorder=1)
        if name != ladder.reference:
            axes.plot(sizes, _values(curves[ladder.reference]), "--", color="black", zorder=5)
        picked = [level.picked == name for level in ladder.levels]
        _draw_curve(axes, sizes, curves[name], name == ladder.reference, picked)
        weight = "bold" if name == ladder.reference else "normal"
        axes.set_title(labels[name], loc="left", weight=weight, pad=3)
    _count_axis(grid[0, 0], sizes)
    _scale(grid[0, 0], metric, [found for curve in curves.values() for found in curve])
    for axes in grid.flat:
        axes.tick_params(axis="x", labelsize=7)
    for axes in grid.flat[len(names) :]:
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
        axes.grid(False)
        axes.legend(handles=_legend(ladder.reference), loc="center left")
    figure.supxlabel("labelled images", fontsize=10)
    figure.supylabel(label_of(metric), fontsize=10)
    return figure


def _legend(reference: str) -> list[Line2D]:
    """What the lines of a panel are."""
    return [
        Line2D([], [], color=BLUE, marker="o", markersize=4, label="the panel's strategy"),
        Line2D([], [], color="black", linestyle="--", label=short_labels([reference], 24)[0]),
        Line2D([], [], color=_PALE, linewidth=0.8, label="the others"),
        Line2D([], [], linestyle="", **_RING, label="picked on validation"),
    ]


def _rung(level: Level, strategy: str) -> Rung:
    return next(rung for rung in level.rungs if rung.strategy == strategy)


def _values(curve: Sequence[Estimate]) -> list[float]:
    return [found.value for found in curve]


def _draw_curve(
    axes: Axes,
    sizes: Sequence[float],
    curve: Sequence[Estimate],
    bold: bool,
    picked: Sequence[bool],
) -> None:
    """One curve with its band, and a ring where it was `picked`."""
    color = "black" if bold else BLUE
    values, ends = _values(curve), [found.interval or (math.nan, math.nan) for found in curve]
    style = {"color": color, "linewidth": 2.4 if bold else 1.8, "zorder": 4}
    axes.plot(sizes, values, marker="o", markersize=4, **style)
    axes.fill_between(
        sizes, *zip(*ends, strict=True), color=color, alpha=0.2, linewidth=0, zorder=2
    )
    for size, value, chosen in zip(sizes, values, picked, strict=True):
        if chosen:
            axes.plot(size, value, clip_on=False, zorder=6, **_RING)


def _scale_words(metric: str) -> str:
    """What `_scale` makes of the vertical axis, for a caption; nothing of a plain one."""
    if metric not in BOUNDED:
        return ""
    return "Vertical axis: log scale of what is missing to 1. "


def _scale(axes: Axes, metric: str, shown: Sequence[Estimate]) -> None:
    """Sets the vertical axis so that it holds the estimates and tells good values apart."""
    ends = [end for found in shown for end in (found.value, *(found.interval or ()))]
    ends = [end for end in ends if not math.isnan(end)]
    if not ends:
        return
    low, high = min(ends), max(ends)
    if metric not in BOUNDED:
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
        return
    missing = [1 - found.value for found in shown if found.value < 1]
    # What is so near to 1 is as good as 1: the axis has to end.
    floor = max(min(missing, default=1.0) / 3, 1e-4)

    def forward(values):
        return -np.log10(np.maximum(1 - np.asarray(values), 0) + floor)

    def inverse(values):
        return 1 + floor - 10 ** -np.asarray(values)

    bottom, top = forward(low), forward(high)
    room = 0.06 * (top - bottom) or 0.1
    axes.set_yscale("function", functions=(forward, inverse))
    axes.set_ylim(float(inverse(bottom - room)), float(min(inverse(top + room), 1.0)))
    axes.yaxis.set_major_locator(FixedLocator(_ticks(forward, *axes.get_ylim())))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ticks(forward, low: float, high: float) -> list[float]:
    """Those of `_TICKS` that lie between, the highest first and far enough apart."""
    chosen: list[float] = []
    length = forward(high) - forward(low)
    for tick in reversed(_TICKS):
        far = not chosen or forward(chosen[-1]) - forward(tick) >= _APART * length
        if low <= tick <= high and far:
            chosen.append(tick)
    return chosen


@styled
def rows_figure(ladder: Ladder, metric: str) -> Figure:
    """Returns a metric of every strategy at the first fraction, a row each.

    Args:
      ladder: what was found.
      metric: one of `ladder.metrics`.
    """
    level = ladder.levels[0]
    rungs = level.rungs
    figure = new_figure(
        max(len(rungs), 3) * 1.3 * _ROW + 0.7,
        f"{label_of(metric)} on the test split with {percent(level.fraction)} % of the labels: "
        f"and of {val_images(ladder)}: mean and 95 % interval. Black square: {ladder.reference}; "
        f"{_RING_WORDS}.",
    )
    axes = figure.add_subplot()
    for row, rung in enumerate(rungs):
        found, bold = rung.test[metric], rung.strategy == ladder.reference
        color = "black" if bold else BLUE
        axes.plot(found.value, row, "s" if bold else "o", color=color)
        if found.interval:
            axes.plot(found.interval, [row, row], color=color)
        if rung.strategy == level.picked:
            axes.plot(found.value, row, clip_on=False, **_RING)
        across = axes.get_yaxis_transform()
        axes.text(1.02, row, with_interval(entry_of(found)), transform=across, va="center", size=8)
    axes.set_yticks(range(len(rungs)), short_labels([rung.strategy for rung in rungs], 24))
    axes.set_ylim(len(rungs) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_xlabel(label_of(metric))
    return figure


def _count_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each number of images."""
    _logarithmic(axes, sizes)
    axes.set_xticks(sizes, [_compact(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """A horizontal axis that holds the values, also where they are all the same."""
    least, most = min(values), max(values)
    room = max((most / least) ** 0.12, 1.2)
    axes.set_xscale("log")
    axes.set_xlim(least / room, most * room)


def _compact(size: float) -> str:
    """A count in few characters: 471, 4.7k, 47k."""
    if size < 1000:
        return f"{size:.0f}"
    return f"{size / 1000:.1f}k" if size < 10_000 else f"{size / 1000:.0f}k"


@styled
def costs_figure(ladder: Ladder, metric: str) -> Figure:
    """Returns a metric over the seconds that a run takes, a panel for each fraction.

    Args:
      ladder: what was found.
      metric: one of `ladder.metrics`.
    """
    levels = ladder.levels
    height = (len(levels[0].rungs) + 1) * _ROW
    figure = new_figure(
        len(levels) * (max(height, 1.6) + 0.5) + 0.3,
        f"{label_of(metric)} on the test split over the {ladder.device} seconds of one run (log "
        f"scale), means over the seeds. Bars are 95 % intervals. {_scale_words(metric)}Black "
        f"square: {ladder.reference}; {_RING_WORDS}. The labels of {val_images(ladder)} come on "
        "top everywhere.",
    )
    grid = figure.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
    rungs = [rung for level in levels for rung in level.rungs]
    seconds = [_seconds(rung) for rung in rungs if _has_point(rung, metric)] or [1.0]
    _logarithmic(grid[0], seconds)
    for axes, level in zip(grid, levels, strict=True):
        _draw_costs(axes, level, metric, ladder.reference)
        axes.set_title(f"{percent(level.fraction)} % of the labels", loc="left")
        axes.set_ylabel(label_of(metric))
    near = max(seconds) < 50 * min(seconds)
    grid[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
    grid[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    grid[-1].xaxis.set_minor_formatter(NullFormatter())
    grid[-1].set_xlabel(f"{ladder.device} seconds")
    return figure


def _seconds(rung: Rung) -> float:
    # A clock may say 0, which a logarithmic axis cannot.
    return max(rung.cost.device_seconds, 1e-2)


def _has_point(rung: Rung, metric: str) -> bool:
    return rung.cost.device_seconds is not None and not math.isnan(rung.test[metric].value)


def _draw_costs(axes: Axes, level: Level, metric: str, reference: str) -> None:
    """The strategies of one fraction as points, their names in the right margin.

    Without a metric or without a cost there is no point.
    """
    shown = [rung for rung in level.rungs if _has_point(rung, metric)]
    points = [(_seconds(rung), rung.test[metric].value) for rung in shown]
    for rung, point in zip(shown, points, strict=True):
        bold = rung.strategy == reference
        style = {"color": "black" if bold else BLUE, "zorder": 3}
        axes.plot(*point, "s" if bold else "o", markersize=7 if bold else 5, **style)
        if interval := rung.test[metric].interval:
            axes.vlines(point[0], *interval, linewidth=1.1, alpha=0.6, **style)
        if rung.strategy == level.picked:
            axes.plot(*point, zorder=4, clip_on=False, **_RING)
    # The scale must stand before places in the panel are worked out.
    _scale(axes, metric, [rung.test[metric] for rung in shown])
    into_panel = axes.transScale + axes.transLimits
    heights = [float(into_panel.transform(point)[1]) for point in points]
    labels = short_labels([rung.strategy for rung in shown], 24)
    for rung, point, label, height in zip(
        shown, points, labels, _spread(heights, 1 / (len(level.rungs) + 1)), strict=True
    ):
        axes.annotate(
            label,
            point,
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            weight="bold" if rung.strategy == reference else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 4},
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], apart: float) -> list[float]:
    """The heights moved as little as needed to be `apart` and within 0 and 1, in their order.

    Neighbours that are too near become a block of even distances around their mean.
    """
    blocks: list[tuple[float, int]] = []
    order = np.argsort(heights, kind="stable")
    for place in order:
        centre, count = float(heights[place]), 1
        while blocks and centre - blocks[-1][0] < apart * (count + blocks[-1][1]) / 2 - 1e-9:
            below, members = blocks.pop()
            centre = (below * members + centre * count) / (members + count)
            count += members
            half = apart * (count - 1) / 2
            centre = min(max(centre, half), 1 - half)
        blocks.append((centre, count))
    spread = [
        centre + apart * (i - (count - 1) / 2) for centre, count in blocks for i in range(count)
    ]
    moved = [0.0] * len(heights)
    for place, height in zip(order, spread, strict=True):
        moved[place] = height
    return moved
