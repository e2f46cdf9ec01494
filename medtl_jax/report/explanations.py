"""Grad-CAM beside its sanity check: maps of the trained network and of a randomised one."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from medtl_jax.report.classification import (
    choose_finding_errors,
    choose_found_findings,
    choose_right,
    choose_wrong,
)
from medtl_jax.report.regression import choose_closest, choose_number_errors
from medtl_jax.report.style import RED, bare, new_figure, short_labels, show_image, styled


@dataclasses.dataclass(frozen=True)
class Cases:
    """Which images to explain, and what of them.

    Attributes:
      rows: int `[m]`, places in the split.
      label: int `[m]`, the class, finding or number whose score is explained.
      titles: m lines: what was predicted, what is true.
      right: whether the prediction is right, m of them; of numbers: whether it is close.
    """

    rows: np.ndarray
    label: np.ndarray
    titles: tuple[str, ...]
    right: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Explanations:
    """Class activation maps of m images, see `report.gradcam`.

    Attributes:
      cases: what is explained, for instance of `choose_cases`.
      images: uint8 `[m, h, w, c]`, those of `cases.rows`.
      maps: float `[m, h, w]` in 0..1, of the trained network.
      randomised: float `[m, h, w]` in 0..1, of the network with random weights.
      correlation: float `[m]`, Spearman's, of the two maps of an image; NaN where undefined.
    """

    cases: Cases
    images: np.ndarray
    maps: np.ndarray
    randomised: np.ndarray
    correlation: np.ndarray


def choose_cases(
    task: str,
    target: np.ndarray,
    score: np.ndarray,
    classes: Sequence[str],
    count: int = 3,
    thresholds: np.ndarray | None = None,
) -> Cases:
    """Returns up to `count` right (or closest) and `count` wrong (or furthest) images.

    Args:
      task: `classify`, `ordinal`, `multilabel` or `regress`.
      target, score: see `catalog.Split` and `figures.View`.
      classes: k names.
      count: of each kind.
      thresholds: `multilabel`: float `[k]`, see `classification.choose_finding_errors`.
    """
    names = short_labels(classes, 20)
    if task in ("classify", "ordinal"):
        good, bad = choose_right(target, score, count), choose_wrong(target, score, count)
        pairs = [np.stack([rows, score[rows].argmax(axis=1)], axis=1) for rows in (good, bad)]
    elif task == "multilabel":
        pairs = [
            choose_found_findings(target, score, thresholds, count),
            choose_finding_errors(target, score, thresholds, count),
        ]
    else:
        pairs = [choose_closest(target, score, count), choose_number_errors(target, score, count)]
    rows, label = np.concatenate(pairs).T
    titles = tuple(
        _title(task, names, target[row], score[row], k) for row, k in zip(rows, label, strict=True)
    )
    right = (True,) * len(pairs[0]) + (False,) * len(pairs[1])
    return Cases(rows, label, titles, right)


def _title(task: str, names: Sequence[str], target, score: np.ndarray, k: int) -> str:
    if task == "regress":
        return f"{names[k]}: {score[k]:.4g}, true {target[k]:.4g}"
    if task == "multilabel":
        return f"{names[k]} {score[k]:.2f}, truth: {'yes' if target[k] == 1 else 'no'}"
    return f"{names[k]} {score[k]:.2f}, truth: {names[target]}"


@styled
def gradcam_figure(given: Explanations) -> Figure:
    """Returns a row an image: the image, its map, and the map of the network with random weights.

    A map that hardly changes when the weights are random explains nothing (Adebayo et al. 2018);
    the mean correlation of the two is in the caption.
    """
    m = len(given.images)
    defined = given.correlation[~np.isnan(given.correlation)]
    # Adding 0 turns -0.00 into 0.00.
    mean = f"{round(defined.mean(), 2) + 0.0:.2f}" if len(defined) else "undefined"
    figure = new_figure(
        2.0 * m + 0.3,
        "Grad-CAM (what raised the score, yellow most) on right and wrong cases, and the same with "
        f"random weights. Mean Spearman correlation of the two: {mean}; near 1 the map would "
        "not depend on what was learned.",
    )
    rows = figure.subplots(m, 3, squeeze=False)
    for i, (plain, learned, random) in enumerate(rows):
        for axes in (plain, learned, random):
            show_image(axes, given.images[i])
        for axes, heat in ((learned, given.maps[i]), (random, given.randomised[i])):
            axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
            bare(axes)
        # The title may be wider than its panel: it runs on over the next one.
        plain.set_title(
            given.cases.titles[i],
            loc="left",
            fontsize=9,
            color="black" if given.cases.right[i] else RED,
        )
        learned.set_xlabel("trained", fontsize=8.5)
        value = given.correlation[i]
        correlation = "" if np.isnan(value) else f", r = {value:.2f}"
        random.set_xlabel(f"random weights{correlation}", fontsize=8.5)
    return figure
