"""Figures that every task has: training curves, and metrics as bars with their intervals."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medtl_jax.report.style import (
    DASHES,
    GREY,
    PALETTE,
    WIDTH,
    new_figure,
    short_labels,
    styled,
    with_interval,
)
from medtl_jax.report.tables import BOUNDED, label_of, overall

_BAR = "#7fb7d8"
_LOSSES = {"train_loss": "training", "val_loss": "validation"}
_CURVES = (
    "Training curves; the dotted line marks the epoch whose weights were kept. The losses are "
    "different quantities: the one of training is what is minimised, with its weights and options, "
    "on augmented images; the one of validation is the plain log loss, or of numbers the squared "
    "error in standard deviations."
)


@styled
def curves_figure(history: Sequence[dict]) -> Figure:
    """Returns the training curves over the epochs, one panel under the other.

    Training loss and validation loss, which are different quantities; the validation metrics that
    end at 1; every other validation metric in a panel of its own, since units differ; learning
    rates. The epoch whose weights were kept (the last with a
    true `best`) is marked.

    Args:
      history: epoch records with `epoch` and, where known, `train_loss`, `val_loss`, any
        `val_<metric>`, any `lr_<group>`, `best`; a value may be None.

    Raises:
      ValueError: there is no epoch.
    """
    if not history:
        raise ValueError("want at least one epoch record")
    panels = _panels(history)
    heights = [1.1 if title == "learning rate" else 2.0 for title in panels]
    figure = new_figure(
        sum(heights) + 0.5,
        _CURVES,
    )
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)
    chosen = [record["epoch"] for record in history if record.get("best")][-1:]
    for axes, (title, keys) in zip(column[:, 0], panels.items(), strict=True):
        _series(axes, history, keys)
        axes.set_title(title, loc="left")
        for epoch in chosen:
            axes.axvline(epoch, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        if axes is column[0, 0] and chosen:
            axes.plot([], [], color=GREY, linestyle=":", label=f"kept: epoch {chosen[0]}")
        if title == "learning rate" and _positive(history, keys):
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
    column[-1, 0].set_xlabel("epoch")
    column[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    return figure


def _panels(history: Sequence[dict]) -> dict[str, dict[str, str]]:
    """`{title: {key of a record: label}}` of what the records hold, empty panels left out."""
    keys = list(dict.fromkeys(key for record in history for key in record))
    metrics = [key[4:] for key in keys if key.startswith("val_") and key != "val_loss"]
    panels = {
        **{f"{word} loss": {key: word} for key, word in _LOSSES.items() if key in keys},
        "validation metrics": {f"val_{m}": label_of(m) for m in metrics if m in BOUNDED},
        **{
            f"validation {label_of(m)}": {f"val_{m}": label_of(m)}
            for m in metrics
            if m not in BOUNDED
        },
        "learning rate": {key: key[3:] for key in keys if key.startswith("lr_")},
    }
    return {title: drawn for title, drawn in panels.items() if drawn}


def _positive(history: Sequence[dict], keys: dict[str, str]) -> bool:
    values = [record.get(key) for record in history for key in keys]
    return all(value is not None and value > 0 for value in values)


def _series(axes: Axes, history: Sequence[dict], keys: dict[str, str]) -> None:
    epochs = [record["epoch"] for record in history]
    for i, (key, label) in enumerate(keys.items()):
        # None becomes NaN, which leaves a gap in the line.
        values = np.array([record.get(key) for record in history], float)
        if np.isfinite(values).any():
            # Dots keep a single epoch, or one between two gaps, visible.
            color, dash = PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]
            axes.plot(epochs, values, color=color, linestyle=dash, label=label, marker=".")


@styled
def metrics_figure(metrics: dict[str, dict]) -> Figure | None:
    """Returns the overall metrics that end at 1 as bars, whiskers are the 95 % intervals.

    None where there is no such metric. Errors and distances have units of their own: they are
    in the table.

    Args:
      metrics: see `metrics.uncertainty.score_with_intervals`; per-class entries are left out.
    """
    entries = {name: entry for name, entry in overall(metrics).items() if name in BOUNDED}
    if not entries:
        return None
    names = [label_of(name) for name in entries]
    return _bars(names, list(entries.values()), "Overall metrics with 95 % intervals.")


@styled
def class_bars_figure(
    metrics: dict[str, dict], metric: str, classes: Sequence[str], positives: Sequence[int]
) -> Figure:
    """Returns one metric of every class as bars with intervals, the highest first.

    Args:
      metrics: of one split, with entries `<metric>/<class>`.
      metric: one of `tables.BOUNDED`.
      classes: k class names.
      positives: images of each class, k of them; written beside the name.
    """
    names = short_labels(classes, 20)
    found = [(metrics.get(f"{metric}/{name}"), i) for i, name in enumerate(classes)]
    rows = [(entry, f"{names[i]} (n = {positives[i]})") for entry, i in found if entry]
    rows.sort(key=lambda row: -1 if row[0]["value"] is None else row[0]["value"], reverse=True)
    caption = (
        f"{label_of(metric)} of each class with 95 % intervals; n counts the images that have it."
    )
    return _bars([name for _, name in rows], [entry for entry, _ in rows], caption)


def _bars(names: Sequence[str], entries: Sequence[dict], caption: str) -> Figure:
    """Bars with whiskers; the name stands above its bar, the numbers at the right of the name."""
    figure = new_figure(0.52 * len(entries) + 0.7, caption, WIDTH)
    axes = figure.add_subplot()
    places = np.arange(len(entries))
    values = [0 if entry["value"] is None else entry["value"] for entry in entries]
    axes.barh(places, values, height=0.42, color=_BAR)
    lowest = 0.0
    for place, name, entry in zip(places, names, entries, strict=True):
        if (interval := entry.get("ci95")) is not None:
            axes.plot(interval, [place, place], color="black", linewidth=1.2, marker="|")
            lowest = min(lowest, *interval)
        across = axes.get_yaxis_transform()
        axes.text(0, place - 0.27, name, transform=across, va="bottom", fontsize=9)
        axes.text(
            1, place - 0.27, with_interval(entry), transform=across, va="bottom", ha="right",
            fontsize=9,
        )  # fmt: skip
    # R2 has no lower end: a bar further to the left than -1 would flatten all others.
    left = max(-1.0, min(lowest, *values))
    axes.set(xlim=(1.05 * left if left else 0, 1), xlabel="value (95 % interval)")
    axes.set_ylim(len(entries) - 0.5, -0.75)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    return figure
