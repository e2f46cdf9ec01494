"""Figures of a run, each a `matplotlib.figure.Figure` in one style.

No pyplot and no global state: a user's own matplotlib settings neither change these
figures nor are changed. The colours are those of Okabe & Ito (2008), told apart with every
common colour blindness; what a colour says, a label, a dash or a width says too.
"""

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from medtl_jax.files import write_file
from medtl_jax.metrics.scores import auc_columns
from medtl_jax.report.tables import LABELS, format_interval, format_value, overall, printable

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "#777777"
DPI = 110
MOST_EXAMPLES = 12
# Above this many classes the cells are too small for numbers.
MOST_ANNOTATED = 14

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.facecolor": "white",
}
styled = style.context(["default", STYLE])


@styled
def confusion_figure(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Returns the confusion matrix as a heat map: counts, and percentages of each row.

    Args:
      confusion: int `[k, k]`, rows are the truth.
      classes: k class names.
    """
    k = len(classes)
    total = confusion.sum(axis=1, keepdims=True)
    share = np.divide(confusion, total, out=np.zeros(confusion.shape), where=total > 0)
    side = min(10.0, max(3.4, 0.85 * k + 1.6))
    figure = Figure(figsize=(side + 0.9, side))
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    names = _labels(classes, 18)
    size = 9 if k <= MOST_ANNOTATED else max(3.0, 9 * MOST_ANNOTATED / k)
    upright = k <= 3 and max(map(len, names)) <= 12
    turned = {} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(k), names, fontsize=size, **turned)
    axes.set_yticks(range(k), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if k <= MOST_ANNOTATED:
        for row, column in np.ndindex(k, k):
            percent = f"{share[row, column]:.1%}" if total[row, 0] else "no image"
            axes.text(
                column,
                row,
                f"{confusion[row, column]}\n{percent}",
                ha="center",
                va="center",
                fontsize=9 if k <= 8 else 6,
                color="white" if share[row, column] > 0.55 else "black",
            )
    bar = figure.colorbar(image, ax=axes, shrink=0.85, label="share of the true class")
    bar.outline.set_visible(False)
    return figure


@styled
def roc_figure(
    target: np.ndarray, score: np.ndarray, classes: Sequence[str], metrics: dict[str, dict]
) -> Figure:
    """Returns the ROC curves, one class against the rest, with AUC and interval.

    With two classes the curve of class 1 alone: the other is its mirror image. With more
    classes than colours those with the lowest AUC are named, the others are thin and grey.

    Args:
      target: int `[n]`, indices into `classes`.
      score: float `[n, k]`, probabilities.
      classes: k class names.
      metrics: of this split, see `metrics.uncertainty.score_with_intervals`.
    """
    figure = Figure(figsize=(5.6, 5.0))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    names = _labels(classes, 20)
    entries = {label: metrics[f"auc/{classes[label]}"] for label, _ in auc_columns(len(classes))}
    drawn = [label for label in entries if 0 < np.sum(target == label) < len(target)]
    weakest = sorted(drawn, key=lambda label: entries[label]["value"])[: len(PALETTE)]
    for label in drawn:
        false, true, _ = roc_curve(target == label, score[:, label])
        if label not in weakest:
            axes.plot(false, true, color="#bbbbbb", linewidth=0.7, zorder=1)
            continue
        place = sorted(weakest).index(label)
        axes.plot(
            false, true, color=PALETTE[place], linestyle=DASHES[place],
            label=f"{names[label]}: {_with_interval(entries[label])}",
        )  # fmt: skip
    for label in (label for label in entries if label not in drawn):
        axes.plot([], [], " ", label=f"{names[label]}: undefined")
    if len(drawn) > len(weakest):
        rest = len(drawn) - len(weakest)
        axes.plot([], [], color="#bbbbbb", linewidth=0.7, label=f"{rest} classes of higher AUC")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_xlabel("1 - specificity (false positive rate)")
    axes.set_ylabel("sensitivity (true positive rate)")
    axes.legend(loc="lower right", title="AUC (95% CI)", title_fontsize=8, alignment="left")
    return figure


@styled
def curves_figure(history: Sequence[dict]) -> Figure:
    """Returns the training curves over the epochs: loss, validation scores, learning rates.

    The epoch whose weights were kept (the last with a true `best`) is marked.

    Args:
      history: epoch records with `epoch` and, where known, `train_loss`, `val_loss`,
        `val_accuracy`, `val_auc`, `lr_low`, `lr_high`, `best`; a value may be None.

    Raises:
      ValueError: there is no epoch.
    """
    if not history:
        raise ValueError("want at least one epoch record")
    figure = Figure(figsize=(6.8, 4.8))
    axes_of = figure.subplot_mosaic(
        [["loss", "scores"], ["rates", "rates"]], height_ratios=(3, 1.1)
    )
    loss, scores, rates = axes_of["loss"], axes_of["scores"], axes_of["rates"]
    _series(loss, history, {"train_loss": "training", "val_loss": "validation"})
    _series(scores, history, {"val_accuracy": "accuracy", "val_auc": "AUC"})
    _series(rates, history, {"lr_high": "high", "lr_low": "low"})
    loss.set_title("loss")
    scores.set_title("validation scores")
    rates.set_title("learning rate", fontsize=8)
    rates.tick_params(labelsize=7)
    values = [record.get(key) for record in history for key in ("lr_low", "lr_high")]
    if all(value is not None and value > 0 for value in values):
        rates.set_yscale("log")
    chosen = [record["epoch"] for record in history if record.get("best")][-1:]
    for axes in (loss, scores, rates):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        for epoch in chosen:
            axes.axvline(epoch, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    for epoch in chosen:
        loss.plot([], [], color=GREY, linestyle=":", linewidth=1.2, label=f"kept: epoch {epoch}")
    for axes in (loss, scores, rates):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
    return figure


@styled
def examples_figure(
    images: np.ndarray,
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    ids: Sequence[str],
) -> Figure:
    """Returns a grid of up to 12 images with truth, prediction and its probability.

    Wrong ones have a thick dashed frame and say so in the title.

    Args:
      images: uint8 `[n, h, w, c]`, c = 1 or 3, for instance those of `choose_examples`.
      target: int `[n]`, indices into `classes`.
      score: float `[n, k]`, probabilities.
      classes: k class names.
      ids: n image ids.

    Raises:
      ValueError: no image, or more than 12.
    """
    if not 1 <= len(images) <= MOST_EXAMPLES:
        raise ValueError(f"want 1 to {MOST_EXAMPLES} examples, got {len(images)}")
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.95 * rows))
    names = _labels(classes, 20)
    predicted = score.argmax(axis=1)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= len(images):
            axes.set_axis_off()
            continue
        grey = images.shape[-1] == 1
        axes.imshow(images[i, ..., 0] if grey else images[i], cmap="gray", vmin=0, vmax=255)
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        right = predicted[i] == target[i]
        verdict = "right" if right else "wrong"
        axes.set_title(
            f"{verdict}: {names[predicted[i]]} {score[i, predicted[i]]:.2f}\n"
            f"truth: {names[target[i]]}",
            fontsize=8.5, loc="left", color="black" if right else RED,
        )  # fmt: skip
        axes.set_xlabel(_ending(ids[i], 38), fontsize=6.5, color=GREY)
        for spine in axes.spines.values():
            spine.set(visible=True, color=BLUE if right else RED, linewidth=1 if right else 3)
            spine.set_linestyle("-" if right else (0, (4, 2)))
    return figure


@styled
def metrics_figure(metrics: dict[str, dict]) -> Figure:
    """Returns the overall metrics of one split as bars, whiskers are the 95 % intervals.

    Args:
      metrics: see `metrics.uncertainty.score_with_intervals`; per-class entries are left out.
    """
    entries = overall(metrics)
    figure = Figure(figsize=(6.4, 0.42 * len(entries) + 0.7))
    axes = figure.add_subplot()
    places = np.arange(len(entries))
    values = [0 if entry["value"] is None else entry["value"] for entry in entries.values()]
    axes.barh(places, values, height=0.62, color="#7fb7d8")
    for place, entry in zip(places, entries.values(), strict=True):
        if (interval := entry.get("ci95")) is not None:
            axes.plot(interval, [place, place], color="black", linewidth=1.2, marker="|")
        axes.text(1.02, place, _with_interval(entry), va="center", clip_on=False)
    axes.set_yticks(places, [LABELS.get(name, printable(name)) for name in entries])
    axes.set(xlim=(0, 1), xlabel="value (95% CI)")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    return figure


def choose_examples(target: np.ndarray, score: np.ndarray, count: int = 12) -> np.ndarray:
    """Returns indices of images worth showing, int64 `[<= count]`, always the same ones.

    First the most confident right ones, taken in turn from each class, then the worst
    errors: those whose true class got the lowest probability. Half of each; where one
    kind runs out the other fills up.

    Args:
      target: int `[n]`, class indices.
      score: float `[n, k]`, probabilities.
      count: the most to return.
    """
    truth = score[np.arange(len(target)), target]
    correct = score.argmax(axis=1) == target
    right = np.flatnonzero(correct)
    right = right[np.argsort(-truth[right], kind="stable")]
    turn = np.zeros(len(right), int)
    for label in np.unique(target[right]):
        member = target[right] == label
        turn[member] = np.arange(member.sum())
    right = right[np.lexsort((target[right], turn))]
    wrong = np.flatnonzero(~correct)
    wrong = wrong[np.argsort(truth[wrong], kind="stable")]
    errors = min(len(wrong), max(count // 2, count - len(right)))
    return np.concatenate([right[: count - errors], wrong[:errors]])


def save_figures(figures: dict[str, Figure], folder: pathlib.Path | str) -> None:
    """Writes each figure to `folder/<name>.png`; equal figures give equal bytes."""
    for name, figure in figures.items():
        write_file(pathlib.Path(folder) / f"{name}.png", encode_png(figure))


@styled
def encode_png(figure: Figure, dpi: int = DPI) -> bytes:
    """Returns the figure as a PNG without time stamps or version numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _series(axes: Axes, history: Sequence[dict], keys: dict[str, str]) -> None:
    epochs = [record["epoch"] for record in history]
    for (key, label), color, dash in zip(keys.items(), PALETTE, DASHES, strict=False):
        # None becomes NaN, which leaves a gap in the line.
        values = np.array([record.get(key) for record in history], float)
        if np.isfinite(values).any():
            # Dots keep a single epoch, or one between two gaps, visible.
            axes.plot(epochs, values, color=color, linestyle=dash, label=label, marker=".")


def _with_interval(entry: dict) -> str:
    interval = format_interval(entry)
    return format_value(entry) + (f" ({interval})" if interval else "")


def _labels(names: Sequence[str], width: int) -> list[str]:
    """Returns names as one can draw them: short, distinct, without mathtext.

    A name with characters that the font lacks is drawn as `#<index>`.
    """
    font = font_manager.get_font(font_manager.findfont(STYLE["font.family"]))
    texts = [printable(name) for name in names]
    short = [text if len(text) <= width else text[: width - 1] + "…" for text in texts]
    for i, text in enumerate(short):
        if not all(font.get_char_index(ord(c)) for c in text):
            short[i] = f"#{i}"
    twice = {text for text in short if short.count(text) > 1}
    numbered = [f"{i}: {text}" if text in twice else text for i, text in enumerate(short)]
    return [text.replace("$", r"\$") for text in numbered]


def _ending(text: str, width: int) -> str:
    """Returns the last characters of an id: the start is mostly the folder, alike for all."""
    plain = printable(text).encode("ascii", "backslashreplace").decode()
    return ("…" + plain[1 - width :] if len(plain) > width else plain).replace("$", r"\$")
