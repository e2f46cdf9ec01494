"""Figures of an adaptation: methods between their bounds, features of both domains, discriminators.

What is of the source is blue and what is of the target orange, everywhere.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from medtl_jax.domain.validators import sampled_rows
from medtl_jax.report.adaptation import SOURCE_ONLY, SUPERVISED, Adaptation
from medtl_jax.report.study_page import entry_of
from medtl_jax.report.style import (
    BLUE,
    DASHES,
    GREY,
    PALETTE,
    RED,
    new_figure,
    short_labels,
    styled,
    with_interval,
)
from medtl_jax.report.tables import label_of

# Images of a domain in a plot of features: more hide each other.
MOST_POINTS = 400
KINDS = ("pca", "tsne")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_ROW = 0.27
# Fewest images to embed, and how many directions of theirs t-SNE starts from.
LEAST_POINTS, _DIRECTIONS = 5, 50


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of one network for images of both domains.

    Attributes:
      source, target: float `[n, d]` and `[m, d]`.
      source_labels: int `[n]`, places in the classes; None where an image is not of one class.
      target_labels: int `[m]`, for the marks in the plot alone; None where there are none.
    """

    source: np.ndarray
    target: np.ndarray
    source_labels: np.ndarray | None
    target_labels: np.ndarray | None = None


@styled
def methods_figure(found: Adaptation, metric: str) -> Figure:
    """Returns a metric of every method on the target's test split, a row each, with its bounds.

    Args:
      found: what was found.
      metric: one of `found.metrics`.
    """
    figure = new_figure(
        max(len(found.methods), 3) * _ROW + 0.8,
        f"{label_of(metric)} on the target's test split: mean over {found.seeds} "
        f"seed{'s' * (found.seeds > 1)} and 95 % interval. Black squares: the bounds, trained on "
        "the source alone (dashed line) and with the target's labels (dotted line). Orange ring: "
        f"what {found.validator} picks without target labels.",
    )
    axes = figure.add_subplot()
    dashes = {SOURCE_ONLY: "--", SUPERVISED: ":"}
    for row, method in enumerate(found.methods):
        value, color = method.test[metric], "black" if method.bound else BLUE
        axes.plot(value.value, row, "s" if method.bound else "o", color=color)
        if value.interval:
            axes.plot(value.interval, [row, row], color=color)
        if method.bound and not math.isnan(value.value):
            axes.axvline(
                value.value, color=GREY, linestyle=dashes[method.bound], linewidth=1, zorder=0
            )
        if method.name == found.picked:
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8}
            axes.plot(value.value, row, "o", markeredgecolor=RED, clip_on=False, **ring)
        across = axes.get_yaxis_transform()
        axes.text(1.02, row, with_interval(entry_of(value)), transform=across, va="center", size=8)
    labels = short_labels([method.name for method in found.methods], 24)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_xlabel(f"target {label_of(metric)}")
    return figure


def embed(features: np.ndarray, kind: str = "pca", seed: int = 0) -> np.ndarray:
    """Returns float `[n, 2]`: the features in a plane, the same ones for the same seed.

    Args:
      features: `[n, d]`, of both domains together.
      kind: `pca`, the two directions of the largest variance; `tsne`, t-SNE (van der Maaten &
        Hinton 2008) of the first 50 directions, of perplexity 30 or, for few images, a third of
        them.
      seed: of t-SNE.

    Raises:
      ValueError: another kind; fewer than five rows; features that are not finite.
    """
    if kind not in KINDS or len(features) < LEAST_POINTS or not np.isfinite(features).all():
        raise ValueError(f"want one of {KINDS} and finite [n >= 5, d]: {kind}, {features.shape}")
    # One feature lies on a line, in the plane as well.
    wide = np.pad(features.astype(np.float64), ((0, 0), (0, max(0, 2 - features.shape[1]))))
    if not np.ptp(wide, axis=0).any():
        return np.zeros((len(wide), 2))
    shown = 2 if kind == "pca" else min(_DIRECTIONS, *wide.shape)
    directions = PCA(shown, svd_solver="full").fit_transform(wide)
    flat = directions[:, :2]
    if kind == "pca":
        return flat
    start = (1e-4 * flat / flat[:, 0].std()).astype(np.float32)
    tsne = TSNE(perplexity=min(30.0, (len(flat) - 1) / 3), init=start, random_state=seed)
    # Its threads wait for each other, for minutes where other programs want the processors.
    with threadpool_limits(1):
        return tsne.fit_transform(directions.astype(np.float32))


@styled
def features_figure(
    panels: Mapping[str, Features], classes: Sequence[str], kind: str = "pca", seed: int = 0
) -> Figure:
    """Returns the features of both domains in a plane, a panel for each network.

    Colour is the domain, the marker is the class, and the name of a class stands above the median
    of its source images and below that of its target images. At most `MOST_POINTS` images of a
    domain are drawn, at random.

    Args:
      panels: by title, such as the name of a method.
      classes: names; none where images are not of one class each.
      kind, seed: of `embed`; each panel is embedded by itself.

    Raises:
      ValueError: as `embed`.
    """
    how = {"pca": "the two directions of their largest variance (PCA)", "tsne": "t-SNE"}[kind]
    known = all(panel.target_labels is not None for panel in panels.values())
    marks = "Markers and names: classes; the target's are drawn from labels that nothing was "
    marks += "trained or chosen by. " if known else "trained or chosen by, where they are known. "
    marks *= bool(classes)
    rows = -(-len(panels) // 2) if len(panels) > 1 else 1
    columns = min(len(panels), 2)
    figure = new_figure(
        rows * (2.5 if columns > 1 else 3.6) + 0.3 * -(-(len(classes) + 2) // 4),
        f"Features of images of both domains: {how}. Blue: source; orange, hollow: target. {marks}"
        "Distances between panels do not compare.",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    labels = short_labels(classes, 14)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        _draw_features(axes, panel, labels, kind, seed)
        axes.set_title(short_labels([title], 28)[0], loc="left", pad=3)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], linestyle="", marker="o", color=BLUE, label="source"),
        Line2D([], [], linestyle="", marker="o", color=RED, markerfacecolor="none", label="target"),
    ]
    handles += [
        Line2D([], [], linestyle="", marker=_marker(k), color=GREY, label=label)
        for k, label in enumerate(labels)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, columnspacing=1.0)
    return figure


def _draw_features(
    axes: Axes, panel: Features, labels: Sequence[str], kind: str, seed: int
) -> None:
    """The points of one network, and the names of the classes in either domain."""
    chosen = [sampled_rows(len(part), MOST_POINTS, seed) for part in (panel.source, panel.target)]
    parts = [part[rows] for part, rows in zip((panel.source, panel.target), chosen, strict=True)]
    points = embed(np.concatenate(parts), kind, seed)
    places = np.split(points, [len(parts[0])])
    known = (panel.source_labels, panel.target_labels)
    for domain, (place, rows, given) in enumerate(zip(places, chosen, known, strict=True)):
        color, look = (BLUE, {}) if domain == 0 else (RED, {"markerfacecolor": "none"})
        look |= {"linestyle": "", "color": color, "markersize": 3.5, "markeredgewidth": 0.7}
        if given is None:
            axes.plot(*place.T, marker=".", alpha=0.5, **look)
            continue
        for k, label in enumerate(labels):
            own = place[given[rows] == k]
            if not len(own):
                continue
            axes.plot(*own.T, marker=_marker(k), alpha=0.5, zorder=1 + domain, **look)
            box = {"facecolor": "white", "edgecolor": color, "alpha": 0.8, "pad": 0.8}
            words = {"color": color, "fontsize": 7, "ha": "center", "va": "center", "zorder": 4}
            # Beside the place, so that the names of both domains are seen where they meet.
            beside = (0, 7 - 14 * domain)
            place_of = np.median(own, axis=0)
            axes.annotate(label, place_of, beside, textcoords="offset points", bbox=box, **words)
    axes.set(xticks=[], yticks=[])


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


@styled
def discriminator_figure(
    runs: Mapping[str, Sequence[Sequence[float | None]]], chance: float = 0.5
) -> Figure:
    """Returns the discriminator's accuracy over the epochs, a line for each method.

    The line is the mean over the seeds, the band reaches from the least to the most of them; an
    epoch without a value in some seed is a gap.

    Args:
      runs: of each method, for each seed the accuracy of every epoch; None where undefined.
      chance: the accuracy of one who always names the larger domain of a batch.

    Raises:
      ValueError: no method; seeds of one method with different numbers of epochs.
    """
    if not runs:
        raise ValueError("want at least one method with a discriminator")
    figure = new_figure(
        2.6 + 0.22 * -(-(len(runs) + 1) // 2),
        "Accuracy of the domain discriminator on the batches of each epoch: mean over the seeds, "
        "the band from least to most. Dotted: chance, where the features do not tell the domains "
        "apart (or the discriminator is too weak to see how).",
    )
    axes = figure.add_subplot()
    for number, (label, seeds) in enumerate(
        zip(short_labels(list(runs), 24), runs.values(), strict=True)
    ):
        if len({len(seed) for seed in seeds}) != 1:
            raise ValueError(f"the seeds of {label} have different numbers of epochs")
        # None becomes NaN, which leaves a gap.
        values = np.array([list(seed) for seed in seeds], float)
        epochs = np.arange(1, values.shape[1] + 1)
        look = {"color": PALETTE[number % len(PALETTE)]}
        dash = DASHES[number % len(DASHES)]
        axes.plot(epochs, values.mean(axis=0), dash, marker=".", label=label, **look)
        axes.fill_between(
            epochs, values.min(axis=0), values.max(axis=0), alpha=0.2, linewidth=0, **look
        )
    axes.axhline(
        chance, color="black", linestyle=":", linewidth=1.4, label=f"chance ({chance:.3g})"
    )
    least = np.nanmin([axes.get_ylim()[0], chance - 0.05])
    axes.set_ylim(max(0.0, float(least)), 1.02)
    axes.set_xlabel("epoch")
    axes.set_ylabel("discriminator accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    figure.legend(loc="outside upper left", ncols=2)
    return figure
