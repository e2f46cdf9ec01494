"""The figures of an ensemble: its rows, how unlike its members are, calibration, rejection."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medtl_jax.report.ensemble import FUSION, MEMBER, SOUP, Ensemble, measure_name
from medtl_jax.report.study_page import entry_of
from medtl_jax.report.style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    PALETTE,
    RED,
    new_figure,
    short_labels,
    styled,
    with_interval,
)
from medtl_jax.report.tables import label_of

_ROW = 0.27
_LOOKS = {MEMBER: (GREY, "o"), FUSION: (BLUE, "s"), SOUP: (GREEN, "D")}
# Above this many members the cells are too small for numbers.
_MOST_ANNOTATED = 10


def ensemble_figures(found: Ensemble) -> dict[str, Figure]:
    """Returns all figures of an ensemble by their names."""
    figures = {metric.replace("/", "-"): rows_figure(found, metric) for metric in found.metrics}
    if any(row.calibration for row in found.rows):
        figures["calibration"] = calibration_figure(found)
    if found.rejections:
        figures["rejection"] = rejection_figure(found)
    names = [row.name for row in found.members]
    for name, one in found.diversity.items():
        if math.isnan(one.mean):
            continue  # the notes say why no pair defines it
        figures[name] = diversity_figure(names, one.pairs, measure_name(name))
    return figures


@styled
def rows_figure(found: Ensemble, metric: str) -> Figure:
    """Returns a metric of every row with its interval, members, fusions and soups apart."""
    figure = new_figure(
        max(len(found.rows), 3) * _ROW + 0.8,
        f"{label_of(metric)} on the test split with its 95 % interval: members (circles), fusions "
        f"(squares; {found.picked or 'none'} is picked) and soups (diamonds). Dashed line: the "
        "best member by validation.",
    )
    axes = figure.add_subplot()
    for number, row in enumerate(found.rows):
        color, marker = _LOOKS[row.kind]
        value, filled = row.test[metric], row.name in (found.picked, found.best)
        axes.plot(value.value, number, marker, color=color, mfc=color if filled else "white")
        if value.interval:
            axes.plot(value.interval, [number, number], color=color, zorder=1)
        if row.name == found.best and not math.isnan(value.value):
            axes.axvline(value.value, color=GREY, linestyle="--", linewidth=1, zorder=0)
        across = axes.get_yaxis_transform()
        words = with_interval(entry_of(value))
        axes.text(1.02, number, words, transform=across, va="center", size=8)
    _name_rows(axes, [row.name for row in found.rows])
    # Long names leave the axis little room.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=2))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(label_of(metric))
    return figure


@styled
def calibration_figure(found: Ensemble) -> Figure:
    """Returns the calibration error of every row before and after temperature scaling."""
    rows = [row for row in found.rows if row.calibration]
    metric = next(iter(rows[0].calibration))
    figure = new_figure(
        max(len(rows), 3) * _ROW + 1.2,
        f"Calibration: {label_of(metric)} on the test split before (open) and after (filled) "
        "temperature scaling.",
    )
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        before, after = row.calibration[metric]
        axes.plot([before, after], [number, number], color=GREY, linewidth=1)
        axes.plot(before, number, "o", color=RED, mfc="white", label="before" * (not number))
        axes.plot(after, number, "o", color=BLUE, label="after" * (not number))
    _name_rows(axes, [row.name for row in rows])
    axes.set_xlim(left=0)
    axes.set_xlabel(label_of(metric))
    figure.legend(loc="outside upper right", ncols=2)
    return figure


@styled
def rejection_figure(found: Ensemble) -> Figure:
    """Returns the error of the images that are kept, as the least certain are left to a reader."""
    figure = new_figure(
        3.4,
        f"Rejection: {found.rejections[0].noun} of {found.picked} on the test images that are kept "
        "when the least certain are left to a reader. Grey: chosen at random (flat), and the worst "
        "first.",
    )
    axes = figure.add_subplot()
    for place, curve in enumerate(found.rejections):
        look = {"color": PALETTE[place % len(PALETTE)], "linestyle": DASHES[place % len(DASHES)]}
        (look["label"],) = short_labels([curve.measure], 30)
        axes.plot(curve.rejected, curve.error, **look)
        axes.plot(curve.rejected, curve.oracle, color=GREY, linewidth=1)
        axes.axhline(curve.error[0], color=GREY, linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of the images left to a reader")
    axes.set_ylabel(f"{found.rejections[0].noun} of the others")
    axes.legend()
    return figure


@styled
def diversity_figure(
    names: Sequence[str], matrix: Sequence[Sequence[float]], measure: str
) -> Figure:
    """Returns a measure of every pair of members as a heat map; a pair without one is empty.

    Args:
      names: of the m members.
      matrix: `[m, m]`, NaN where undefined, which not all pairs are.
      measure: what it holds.
    """
    count, values = len(names), np.asarray(matrix, np.float64)
    values = np.where(np.eye(count, dtype=bool), math.nan, values)
    side = min(9.0, max(3.6, 0.55 * count + 1.9))
    figure = new_figure(
        0.9 * side, f"Diversity: {measure} of each pair of members on the test split.", side
    )
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="Blues")
    axes.grid(False)
    labels = short_labels(names, 22)
    axes.set_xticks(range(count), labels, rotation=40, ha="right", rotation_mode="anchor", size=8)
    axes.set_yticks(range(count), labels, size=8)
    if count <= _MOST_ANNOTATED:
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=8, color=color)
    figure.colorbar(image, ax=axes, shrink=0.7, aspect=30).outline.set_visible(False)
    return figure


def _name_rows(axes, names: Sequence[str]) -> None:
    labels = short_labels(names, 34)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")
