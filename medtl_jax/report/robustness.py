"""Test-time augmentation and corrupted images: the parts of a report, a figure, terminal text.

The card of `tta.json` and that of `corruptions.json` are described in `experiments.robustness`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medtl_jax.augment import corruptions
from medtl_jax.metrics.compare import BETTER, WORSE
from medtl_jax.report.markup import bullets, details, rich_table, subsection, text
from medtl_jax.report.style import DASHES, GREY, PALETTE, new_figure, short_labels, styled
from medtl_jax.report.tables import aligned, format_interval, format_value, label_of, printable

# Metrics of the figure and of the tables; the others are in corruptions.json.
_SHOWN = {
    "classify": ("accuracy", "auc"),
    "ordinal": ("quadratic_kappa", "mae"),
    "multilabel": ("auc", "pr_auc"),
    "segment": ("dice",),
    "regress": ("mae",),
}
_MARKERS = "os^Dv"
_SIGNS = {BETTER: "▲ ", WORSE: "▼ "}
_CLEAN = "clean"
_HEIGHT = 2.6  # inches of a panel
# Severities lie one apart; the corruptions' whiskers stand beside each other.
_APART = 0.11


def tta_text(card: dict) -> str:
    """Returns what test-time augmentation changes, as plain text for the terminal."""
    head = ("metric", "plain", "averaged", "difference", "95% CI", "p (Holm)", "verdict")
    rows = [
        (printable(name), *_cells(entry), entry["verdict"] or printable(entry["reason"]))
        for name, entry in _ordered(card)
    ]
    lines = aligned([head, *rows], "<>>>>><")
    title = f"test-time augmentation, {card['views']} views, {printable(card['split'])} split"
    return "\n".join([title, *lines])


def tta_part(card: dict | None) -> str:
    """Returns what test-time augmentation changes as HTML; empty without a card."""
    if card is None:
        return ""
    drawn = ", ".join(f"{name} {strength:g}" for name, strength in card["transforms"].items())
    units = f"{card['n']} images"
    if card["n_patients"] is not None:
        units += f" of {card['n_patients']} patients"
    further = "one other" if card["views"] == 2 else f"{card['views'] - 1} others"
    trained = (
        "by which the training images were drawn too"
        if card["trained"]
        else "by which no training image was drawn: kept features of the images as they are were "
        "trained on"
    )
    words = (
        f"The scores of {card['views']} views of each image, averaged: the image itself and "
        f"{further} drawn by the section augment ({drawn}), {trained}. A difference is averaged "
        f"minus plain, paired on the same {units} of the {card['split']} split; its interval is a "
        "paired bootstrap. All other numbers of this report are plain."
    )
    head = ("metric", "difference, 95 % interval", "plain", "averaged", "verdict", "p (Holm)")
    rows = [(label_of(name), _html_cells(entry)) for name, entry in _ordered(card)]
    primary = len(card["primary"])
    # The others have no verdict.
    others = [(name, cells[:3]) for name, cells in rows[primary:]]
    rest = details("the other metrics", rich_table(head[:4], others)) if others else ""
    return f"<p>{text(words)}</p>" + rich_table(head, rows[:primary]) + rest


def _ordered(card: dict) -> list[tuple[str, dict]]:
    """The metrics, those with a verdict first."""
    metrics, primary = card["metrics"], card["primary"]
    return [(name, metrics[name]) for name in (*primary, *(n for n in metrics if n not in primary))]


def _cells(entry: dict) -> tuple[str, str, str, str, str]:
    """Both values, their difference, its interval and the adjusted p as text."""
    change = {"value": entry["difference"], "ci95": entry["ci95"]}
    values = (format_value({"value": entry[key]}) for key in ("plain", "tta"))
    p = entry["p_holm"]
    shown = "" if p is None else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"
    return *values, format_value(change), format_interval(change), shown


def _html_cells(entry: dict) -> tuple[str, str, str, str, str]:
    plain, averaged, change, interval, p = _cells(entry)
    sign, verdict = _SIGNS.get(entry["verdict"], ""), text(entry["verdict"])
    why = f'<span class="small">{text(entry["reason"])}</span>' if entry["reason"] else ""
    return (
        text(change) + _small(interval) + why,
        text(plain),
        text(averaged),
        f"<b>{sign}{verdict}</b>" if sign else verdict,
        text(p),
    )


def _small(line: str) -> str:
    return f'<span class="small fixed">{text(line)}</span>' if line else ""


def corruptions_text(card: dict) -> str:
    """Returns the first of the shown metrics over the severities, as plain text."""
    metric = shown_metrics(card)[0]
    rows = [
        (name, *(format_value(entry) for entry in series))
        for name, series in _series(card, metric).items()
    ]
    head = ("corruption", _CLEAN, *map(str, card["severities"]))
    lines = aligned([head, *rows], "<" + ">" * (len(head) - 1))
    title = f"{printable(metric)} by severity of a corruption, {printable(card['split'])} split"
    return "\n".join([title, *lines])


def shown_metrics(card: dict) -> list[str]:
    """Returns the metrics of figure and tables: those of the task that the clean split defines.

    Of several predicted numbers it is the error of each, which have no common unit. Where the
    split defines none, it is the first one all the same.
    """
    clean, task = card["clean"], card["task"]
    names = [name for name in clean if name.startswith("mae/")] if task == "regress" else []
    names = names if len(names) > 1 else list(_SHOWN[task])
    return [n for n in names if n in clean and clean[n]["value"] is not None] or names[:1]


def _series(card: dict, metric: str) -> dict[str, list[dict]]:
    """The entries of a metric by corruption: of the clean images, then of each severity."""
    return {
        name: [card["clean"][metric], *(entries[metric] for entries in severities)]
        for name, severities in card["corruptions"].items()
    }


def corruptions_part(card: dict | None, picture: str) -> str:
    """Returns picture and tables as HTML; the picture alone without a card."""
    if card is None:
        return picture
    words = (
        f"The {card['split']} split, damaged in five ways at five severities, predicted without "
        "test-time augmentation. In brackets below a value its 95 % bootstrap interval."
    )
    head = ("corruption", _CLEAN, *(f"severity {severity}" for severity in card["severities"]))
    tables = [
        subsection(
            label_of(metric),
            rich_table(
                head,
                [
                    (name.replace("_", " "), [_with_small_interval(entry) for entry in series])
                    for name, series in _series(card, metric).items()
                ],
            ),
        )
        for metric in shown_metrics(card)
    ]
    what = details("what a severity is", bullets(_severities()))
    return f"<p>{text(words)}</p>" + picture + "".join(tables) + what


def _with_small_interval(entry: dict) -> str:
    interval = format_interval(entry)
    return text(format_value(entry)) + _small(f"({interval})" if interval else "")


def _severities() -> list[str]:
    """How strong each corruption is at each severity, a line each."""

    def listed(values: Sequence[float], factor: float = 1.0) -> str:
        return ", ".join(f"{factor * value:.3g}" for value in values)

    return [
        f"noise: Gaussian, its deviation {listed(corruptions.NOISE_DEVIATION, 100)} % of the full "
        "range.",
        f"blur: Gaussian, its sigma {listed(corruptions.BLUR_SIGMA, 224)} pixels of an image of "
        f"224; of a smaller one at least {listed(corruptions.LEAST_BLUR)} of its own pixels.",
        f"contrast: the distance to the mean colour, times {listed(corruptions.CONTRAST_FACTOR)}.",
        f"jpeg: quality {listed(corruptions.JPEG_QUALITY)}.",
        f"bias field: smooth shading by a factor of up to {listed(corruptions.BIAS_RATIO)}.",
    ]


@styled
def corruptions_figure(card: dict) -> Figure:
    """Returns a panel a metric: a line a corruption over the severities, with 95 % intervals."""
    metrics = shown_metrics(card)
    caption = (
        f"The {printable(card['split'])} split under five corruptions, mild (1) to severe (5). "
        "Whiskers are 95 % intervals; the dotted line is the clean split, the band its interval."
    )
    figure = new_figure(_HEIGHT * len(metrics) + 0.5, caption)
    panels = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    titles = short_labels([label_of(metric) for metric in metrics], 40)
    for axes, metric, title in zip(panels, metrics, titles, strict=True):
        _clean_line(axes, card["clean"][metric])
        for place, (name, series) in enumerate(_series(card, metric).items()):
            _line(axes, place, name, card["severities"], series[1:])
        axes.set_ylabel(title)
        axes.set_xticks(card["severities"])
        axes.grid(False, axis="x")
    panels[-1].set_xlabel("severity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _clean_line(axes: Axes, entry: dict) -> None:
    if entry["value"] is None:
        return
    axes.axhline(entry["value"], color=GREY, linestyle=":", label=_CLEAN)
    if entry.get("ci95") is not None:
        axes.axhspan(*entry["ci95"], color=GREY, alpha=0.15, linewidth=0)


def _line(
    axes: Axes, place: int, name: str, severities: Sequence[int], entries: Sequence[dict]
) -> None:
    """A corruption's values with whiskers, beside those of the others; undefined ones a gap."""
    middle = (len(_MARKERS) - 1) / 2
    at = np.array(severities, float) + _APART * (place - middle)
    values = np.array([entry["value"] for entry in entries], float)
    color = PALETTE[place]
    axes.plot(
        at, values, color=color, linestyle=DASHES[place], marker=_MARKERS[place], markersize=4,
        linewidth=1.2, label=name.replace("_", " "),
    )  # fmt: skip
    for x, entry in zip(at, entries, strict=True):
        if entry.get("ci95") is not None:
            axes.plot([x, x], entry["ci95"], color=color, linewidth=0.9)
