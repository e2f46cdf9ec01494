"""Figures of masks: overlays of single images, and how Dice spreads over the images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from medtl_jax.data.catalog import Array
from medtl_jax.metrics.segmentation import prepare
from medtl_jax.report.style import (
    GREY,
    ORANGE,
    PALETTE,
    WIDTH,
    ending,
    new_figure,
    outline,
    short_labels,
    show_image,
    styled,
)

# Missed pixels, false alarms.
_MISSED, _ALARM = ORANGE, "#CC79A7"


def observer_dice(target: Array, second: Array, classes: Sequence[str]) -> np.ndarray:
    """Returns Dice of a second observer's masks, `[n, k - 1]`, as `metrics.segmentation.Cases`.

    Args:
      target, second: uint8 `[n, h, w]`, classes of each pixel.
      classes: k class names, the background first.
    """
    # One image at a time: a mask as probabilities takes k floats a pixel.
    rows = [
        prepare(target[i : i + 1], np.eye(len(classes))[second[i : i + 1]], classes, surfaces=False)
        for i in range(len(target))
    ]
    return np.concatenate([cases.images["dice"] for cases in rows])


def choose_cases(dice: np.ndarray) -> dict[str, int]:
    """Returns the images of best, median and worst mean Dice, `{"best": row, ...}`.

    Images without any class are left out; where fewer than three remain, the worst comes first.

    Args:
      dice: `[n, k - 1]`, see `metrics.segmentation.Cases`.
    """
    defined = np.flatnonzero(~np.isnan(dice).all(axis=1))
    order = defined[np.argsort(np.nanmean(dice[defined], axis=1), kind="stable")]
    if not len(order):
        return {}
    places = {"worst": 0, "best": len(order) - 1, "median": (len(order) - 1) // 2}
    chosen: dict[str, int] = {}
    for name, place in places.items():
        if order[place] not in chosen.values():
            chosen[name] = int(order[place])
    return {name: chosen[name] for name in ("best", "median", "worst") if name in chosen}


@styled
def overlay_figure(
    case: str,
    image: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
    name: str,
    dice: float,
    second: tuple[np.ndarray, float] | None = None,
) -> Figure:
    """Returns image, truth, prediction, and the second observer or what the prediction got wrong.

    Args:
      case: which one it is (`best`), for the caption.
      image: uint8 `[h, w, c]`.
      truth, predicted: int `[h, w]`, classes; 0 is the background.
      classes: k class names.
      name: the image's id.
      dice: of the prediction, the mean over the classes.
      second: mask int `[h, w]` of another observer and its Dice; NaN where undefined.
    """
    caption = f"Image of the {case} Dice: the image, the masks over it, and "
    caption += "a second observer's mask." if second is not None else "where they differ."
    figure = new_figure(WIDTH * 1.06 + 0.5, caption)
    panels = figure.subplots(2, 2).flatten()
    for axes in panels:
        show_image(axes, image)
    panels[0].set_title(ending(name, 28), loc="left", fontsize=9, color=GREY)
    masks = [("truth", truth), (f"prediction: Dice {dice:.3f}", predicted)]
    if second is not None:
        masks.append((f"observer 2: Dice {second[1]:.3f}", second[0]))
    for axes, (title, mask) in zip(panels[1:], masks, strict=False):
        _paint(axes, mask, len(classes))
        axes.set_title(title, loc="left", fontsize=9)
    shown = [
        Patch(color=PALETTE[(i - 1) % len(PALETTE)], label=label)
        for i, label in enumerate(short_labels(classes, 20))
        if i
    ]
    if second is None:
        missed, alarm = (truth > 0) & (predicted != truth), (predicted > 0) & (predicted != truth)
        _fill(panels[3], missed, _MISSED, 0.75)
        _fill(panels[3], alarm & ~missed, _ALARM, 0.75)
        panels[3].set_title("differences", loc="left", fontsize=9)
        shown += [Patch(color=_MISSED, label="missed or wrong class")]
        shown += [Patch(color=_ALARM, label="false alarm")]
    figure.legend(handles=shown, loc="outside lower center", ncols=2)
    return figure


def _paint(axes: Axes, mask: np.ndarray, k: int) -> None:
    for label in range(1, k):
        inside, color = mask == label, PALETTE[(label - 1) % len(PALETTE)]
        if inside.any():
            _fill(axes, inside, color, 0.35)
            outline(axes, inside, color)


def _fill(axes: Axes, inside: np.ndarray, color: str, alpha: float) -> None:
    layer = np.zeros((*inside.shape, 4))
    layer[inside] = (*to_rgb(color), alpha)
    axes.imshow(layer, interpolation="nearest")


@styled
def dice_figure(
    dice: np.ndarray, classes: Sequence[str], second: np.ndarray | None = None
) -> Figure:
    """Returns the spread of Dice over the images: a box and a dot an image, a row a class.

    Args:
      dice: `[n, k - 1]`, see `metrics.segmentation.Cases`; NaN is left out.
      classes: k class names, the background first.
      second: of a second observer, `[n, k - 1]`; each class then has a second row.
    """
    caption = (
        "Dice of each image (dots), its quartiles (box) and range within 1.5 box lengths "
        "(whiskers); images without the class are left out."
    )
    rows = []
    for i, name in enumerate(short_labels(classes, 18)[1:]):
        rows.append((name, dice[:, i], PALETTE[i % len(PALETTE)]))
        if second is not None:
            rows.append((f"{name}, observer 2", second[:, i], GREY))
    figure = new_figure(0.75 * len(rows) + 0.8, caption)
    axes = figure.add_subplot()
    ticks = []
    for place, (name, column, color) in enumerate(rows):
        values = np.sort(column[~np.isnan(column)])
        mean = f", mean {values.mean():.3f}" if len(values) else ""
        ticks.append(f"{name} (n = {len(values)}{mean})")
        if len(values):
            _spread(axes, values, place, color)
    across = axes.get_yaxis_transform()
    for place, label in enumerate(ticks):
        axes.text(0, place - 0.32, label, transform=across, va="bottom", fontsize=9)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.75), xlabel="Dice", yticks=[])
    axes.grid(False, axis="y")
    return figure


def _spread(axes: Axes, values: np.ndarray, place: int, color: str) -> None:
    """A box, and a dot a value; neighbours in size get different heights, always the same."""
    axes.boxplot(
        values, positions=[place], orientation="horizontal", widths=0.5, showfliers=False,
        medianprops={"color": "black", "linewidth": 1.6}, boxprops={"color": GREY},
        manage_ticks=False,
    )  # fmt: skip
    heights = place + 0.18 * np.sin(2.4 * np.arange(len(values)))
    axes.scatter(values, heights, s=10, alpha=0.5, color=color, linewidths=0, rasterized=True)
