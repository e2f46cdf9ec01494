"""The contact sheet of an augmentation: training images, and what is drawn of them."""

import dataclasses

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medtl_jax.report.style import (
    GREY,
    PALETTE,
    ending,
    new_figure,
    outline,
    show_image,
    styled,
)

# Inches of a panel: wide enough for a lesion to be seen in it.
_PANEL = 1.2


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What a contact sheet shows of n images, each drawn d times.

    Attributes:
      images: uint8 `[n, h, w, c]`, as they are.
      draws: uint8 `[n, d, h, w, c]`, augmented.
      ids: str `[n]`.
      masks: int `[n, h, w]`, classes of each pixel, or None.
      moved: int `[n, d, h, w]`, the masks of `draws`, or None.
      mixed: whether draws of the same number are mixed with each other.
    """

    images: np.ndarray
    draws: np.ndarray
    ids: np.ndarray
    masks: np.ndarray | None = None
    moved: np.ndarray | None = None
    mixed: bool = False


@styled
def contact_sheet(sheet: Sheet) -> Figure:
    """Returns a row an image: the image on the left, then its draws."""
    count, draws = sheet.draws.shape[:2]
    columns = draws + 1
    outlined = "" if sheet.masks is None else ", with the outlines of their masks"
    mixed = " Images of a column are mixed with each other." if sheet.mixed else ""
    figure = new_figure(
        (_PANEL + 0.1) * count + 0.3,
        "Training images (left) and what the network is given instead, each column one draw"
        f"{outlined}.{mixed}",
        width=_PANEL * columns,
    )
    for row, panels in enumerate(figure.subplots(count, columns, squeeze=False)):
        show_image(panels[0], sheet.images[row])
        panels[0].set_xlabel(ending(sheet.ids[row], 18), fontsize=7, color=GREY)
        if sheet.masks is not None:
            _outline(panels[0], sheet.masks[row])
        for column, axes in enumerate(panels[1:]):
            show_image(axes, sheet.draws[row, column])
            if sheet.moved is not None:
                _outline(axes, sheet.moved[row, column])
            if row == 0:
                axes.set_title(f"draw {column + 1}", fontsize=9)
    figure.axes[0].set_title("image", fontsize=9)
    return figure


def _outline(axes: Axes, mask: np.ndarray) -> None:
    for label in np.unique(mask[mask > 0]):
        outline(axes, mask == label, PALETTE[(label - 1) % len(PALETTE)])
