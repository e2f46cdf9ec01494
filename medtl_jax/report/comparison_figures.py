"""Figures of a comparison: bars of every run, the differences, and the confusion matrices."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from medtl_jax.metrics.compare import (
    BETTER,
    UNDEFINED,
    WORSE,
    Comparison,
    Difference,
    Predicted,
    lower_is_better,
)
from medtl_jax.metrics.scores import confusion
from medtl_jax.metrics.segmentation import prepare
from medtl_jax.report.classification import confusion_figure
from medtl_jax.report.style import GREY, PALETTE, new_figure, short_labels, styled, with_interval
from medtl_jax.report.tables import BOUNDED, label_of, printable

# The bars of the paper: its Table 2 and its Table 3.
CLASSIFICATION = ("accuracy", "precision", "recall", "specificity", "f1")
OTHERS = ("dice", "iou", "mae", "mse")
_HATCHES = ("", "///", "xxx")
# As many as colours and hatches tell apart.
MOST_RUNS = len(PALETTE) * len(_HATCHES)
_MARKERS = "osD^vP*"
# Inches of a row, of what a panel has around its rows, and of a line of the legend.
_ROW, _AROUND, _LEGEND = 0.22, 0.62, 0.2


def comparison_figures(
    runs: Sequence[Predicted],
    metrics: Sequence[Mapping[str, dict]],
    comparisons: Sequence[Comparison],
) -> dict[str, Figure]:
    """Returns the figures by name: bars, differences, and where there is one each run's confusion.

    Args:
      runs: at most `MOST_RUNS`, the one that the others are compared with first.
      metrics: of each run, as `metrics.json` has them for the split.
      comparisons: of the further runs with the first.
    """
    names = [run.name for run in runs]
    caption = "Metrics of every run with 95 % intervals."
    # The metrics of the verdict, where the paper's tables do not have them.
    shown = (*CLASSIFICATION, *OTHERS)
    leading = [name for name in comparisons[0].primary if name.partition("/")[0] not in shown]
    drawn = {
        "classification": bars_figure(names, metrics, (*leading, *CLASSIFICATION), caption),
        "segmentation_regression": bars_figure(names, metrics, OTHERS, caption),
        "differences": forest_figure(comparisons),
    }
    for number, run in enumerate(runs, 1):
        drawn[f"confusion_{number}"] = _confusion(run)
    return {name: figure for name, figure in drawn.items() if figure is not None}


@styled
def bars_figure(
    names: Sequence[str], metrics: Sequence[Mapping[str, dict]], chosen: Sequence[str], caption: str
) -> Figure | None:
    """Returns the `chosen` metrics of the runs as bars, whiskers are the 95 % intervals.

    None where no run has a value of any of them. Metrics whose best value is 1 share an axis.

    Args:
      names: of the runs.
      metrics: of each run, as `metrics.json` has them.
      chosen: names of overall metrics.
      caption: of the figure.
    """
    present = [
        metric
        for metric in chosen
        if any(entries.get(metric, {}).get("value") is not None for entries in metrics)
    ]
    if not present:
        return None
    figure, panels = _panels(present, len(names), caption)
    labels = short_labels(names, 40)
    for axes, panel in panels:
        rows = [
            (i, row, entries[metric])
            for metric, places in panel
            for i, (row, entries) in enumerate(zip(places, metrics, strict=True))
            if metric in entries
        ]
        for i, row, entry in rows:
            style = {"color": PALETTE[i % len(PALETTE)], "hatch": _HATCHES[i // len(PALETTE)]}
            axes.barh(row, entry["value"] or 0, 0.8, alpha=0.75, edgecolor="white", **style)
            if (interval := entry.get("ci95")) is not None:
                axes.plot(interval, [row, row], color="black", linewidth=1.2, marker="|")
            _beside(axes, row, entry)
        if panel[0][0] in BOUNDED:
            axes.set_xlim(min(0, axes.get_xlim()[0]), 1)
        axes.set_xlabel("value (95 % interval)")
    keys = [
        Patch(
            facecolor=PALETTE[i % len(PALETTE)],
            hatch=_HATCHES[i // len(PALETTE)],
            label=label,
            alpha=0.75,
            edgecolor="white",
        )
        for i, label in enumerate(labels)
    ]
    figure.legend(handles=keys, loc="outside upper left")
    return figure


@styled
def forest_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Returns every difference with its interval and the line of no difference.

    A filled marker is a verdict, a hollow one is none; only primary metrics, which say so, have
    one. Micro averages are in the table only.

    Args:
      comparisons: with the same first run.
    """
    # What no run defines has nothing to show.
    shown = [
        metric
        for metric in comparisons[0].metrics
        if not metric.endswith("_micro")
        and any(found.metrics[metric].verdict != UNDEFINED for found in comparisons)
    ]
    first = short_labels([comparisons[0].first], 40)[0]
    labels = short_labels([comparison.second for comparison in comparisons], 40)
    caption = (
        f"Difference from {printable(comparisons[0].first)} with 95 % intervals. A filled marker: "
        "the run is better or worse; a hollow one: cannot tell, or no primary metric."
    )
    figure, panels = _panels(shown, len(comparisons), caption, comparisons[0].primary)
    for axes, panel in panels:
        axes.axvline(0, color="black", linewidth=1, zorder=1)
        for metric, places in panel:
            for i, (row, comparison) in enumerate(zip(places, comparisons, strict=True)):
                _draw_difference(axes, row, i, comparison.metrics[metric])
        axes.margins(x=0.08)
        axes.set_xlabel("difference (95 % interval)")
    for i, label in enumerate(labels):
        panels[0][0].plot(
            [], [], _MARKERS[i % len(_MARKERS)], color=PALETTE[i % len(PALETTE)],
            label=f"{label} − {first}",
        )  # fmt: skip
    figure.legend(loc="outside upper left")
    return figure


def _draw_difference(axes: Axes, row: int, place: int, found: Difference) -> None:
    """One difference in a row; `place` is that of the comparison, for colour and marker."""
    _beside(axes, row, difference_entry(found))
    if found.verdict == UNDEFINED:
        return
    color = PALETTE[place % len(PALETTE)]
    if found.interval is not None:
        axes.plot(found.interval, [row, row], color=color)
    fill = color if found.verdict in (BETTER, WORSE) else "white"
    axes.plot(
        found.difference, row, _MARKERS[place % len(_MARKERS)],
        color=color, markerfacecolor=fill, markersize=6,
    )  # fmt: skip


def _panels(
    metrics: Sequence[str], rows: int, caption: str, primary: Sequence[str] = ()
) -> tuple[Figure, list[tuple[Axes, list[tuple[str, range]]]]]:
    """An empty figure and its panels: axes with their metrics and the places of their rows.

    Metrics whose best value is 1 share a panel, every other one has its own scale. The name of a
    metric stands above its rows.
    """
    together = [metric for metric in metrics if metric in BOUNDED]
    groups = [together] if together else []
    groups += [[metric] for metric in metrics if metric not in BOUNDED]
    heights = [len(group) * (rows + 1) * _ROW + _AROUND for group in groups]
    figure = new_figure(sum(heights) + rows * _LEGEND + 0.2, caption)
    drawn = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = []
    for axes, group in zip(drawn, groups, strict=True):
        places = []
        for block, metric in enumerate(group):
            top = block * (rows + 1)
            name = short_labels([label_of(metric)], 60)[0]
            name += " (primary)" if metric in primary else ""
            name += " (lower is better)" if lower_is_better(metric) else ""
            across = axes.get_yaxis_transform()
            # The line of no difference passes behind it.
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(0, top + 0.1, name, transform=across, va="center", weight="bold", bbox=paper)
            places.append((metric, range(top + 1, top + 1 + rows)))
        axes.set_ylim(len(group) * (rows + 1) - 0.3, -0.7)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        panels.append((axes, places))
    return figure, panels


def _beside(axes: Axes, row: int, entry: dict) -> None:
    """Writes value and interval to the right of a row."""
    across = axes.get_yaxis_transform()
    axes.text(1.02, row, with_interval(entry), transform=across, va="center", fontsize=8)


@styled
def _confusion(run: Predicted) -> Figure | None:
    if run.task in ("classify", "ordinal"):
        figure = confusion_figure(confusion(run.target, run.score), run.classes)
    elif run.task == "segment":
        cases = prepare(run.target, run.score, run.classes, surfaces=False)
        figure = confusion_figure(cases.tables.sum(axis=0), run.classes, "pixel")
    else:
        return None
    figure.axes[0].set_title(short_labels([run.name], 40)[0], color=GREY)
    figure.set_label(f"{run.name}: {figure.get_label()}")
    return figure


def difference_entry(found: Difference) -> dict:
    """Returns the difference as an entry of `metrics.json`."""
    return {"value": defined(found.difference), "ci95": found.interval}


def defined(value: float) -> float | None:
    """Returns the value, None for NaN."""
    return None if math.isnan(value) else value
