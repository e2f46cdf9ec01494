"""The one style of all figures, and the small parts that several of them share.

No pyplot and no global state: a user's own matplotlib settings neither change these
figures nor are changed. The colours are those of Okabe & Ito (2008), told apart with every
common colour blindness; what a colour says, a label, a dash or a width says too.

A figure's caption is its matplotlib label (`figure.get_label()`), so that a figure and what it
shows stay together.
"""

import io
import pathlib
import weakref
from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medtl_jax.files import write_file
from medtl_jax.report.tables import format_interval, format_value, printable

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", ORANGE, "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "#777777"
DPI = 140
# Inches. On a telephone 340 px wide, 10 pt text is then 10 px high.
WIDTH = 4.8

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.facecolor": "white",
}
styled = style.context(["default", STYLE])

# The PNGs of the figures that still exist, by their dots an inch.
_encoded: weakref.WeakKeyDictionary[Figure, dict[float, bytes]] = weakref.WeakKeyDictionary()


def new_figure(height: float, caption: str, width: float = WIDTH) -> Figure:
    """Returns an empty figure of `width` x `height` inches that carries its caption."""
    figure = Figure(figsize=(width, height))
    figure.set_label(caption)
    return figure


def save_figures(figures: dict[str, Figure], folder: pathlib.Path | str) -> None:
    """Writes each figure to `folder/<name>.png`; equal figures give equal bytes."""
    for name, figure in figures.items():
        write_file(pathlib.Path(folder) / f"{name}.png", encode_png(figure))


@styled
def encode_png(figure: Figure, dpi: float = DPI) -> bytes:
    """Returns the figure, drawn to its end, as a PNG without time stamps or version numbers.

    It is kept as long as the figure: the folder of figures and the page show the same ones.
    """
    kept = _encoded.setdefault(figure, {})
    if dpi not in kept:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        kept[dpi] = buffer.getvalue()
    return kept[dpi]


def short_labels(names: Sequence[str], width: int) -> list[str]:
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


def ending(text: str, width: int) -> str:
    """Returns the last characters of an id: the start is mostly the folder, alike for all."""
    plain = printable(text).encode("ascii", "backslashreplace").decode()
    return ("…" + plain[1 - width :] if len(plain) > width else plain).replace("$", r"\$")


def with_interval(entry: dict) -> str:
    """Returns a metric's value and, in brackets, its interval where there is one."""
    interval = format_interval(entry)
    return format_value(entry) + (f" ({interval})" if interval else "")


def show_image(axes: Axes, image: np.ndarray, **options) -> None:
    """Draws a uint8 image `[h, w, c]`, c = 1 or 3, without ticks and grid."""
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255, **options)
    bare(axes)


def bare(axes: Axes) -> None:
    """Takes ticks, grid and frame away: what an image does not need."""
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def outline(axes: Axes, inside: np.ndarray, color: str, width: float = 1.1) -> None:
    """Draws the border of the pixels `inside`, bool `[h, w]` with at least one of them."""
    # A frame of background closes the outline of what touches the border.
    axes.contour(
        np.arange(-1, inside.shape[1] + 1), np.arange(-1, inside.shape[0] + 1),
        np.pad(inside, 1).astype(float), levels=[0.5], colors=color, linewidths=width,
    )  # fmt: skip


def image_grid(
    images: np.ndarray,
    titles: Sequence[str],
    ids: Sequence[str],
    right: Sequence[bool],
    caption: str,
) -> Figure:
    """Returns images in two columns, each with its title above and its id below.

    Wrong ones have a thick dashed frame.

    Args:
      images: uint8 `[n, h, w, c]`, n at least 1.
      titles: n texts, already drawable (`short_labels`, `ending`).
      ids: n image ids.
      right: whether the prediction is right, n of them.
      caption: of the figure.
    """
    rows = -(-len(images) // 2)
    figure = new_figure(2.95 * rows, caption)
    for i, axes in enumerate(figure.subplots(rows, 2, squeeze=False).flat):
        if i >= len(images):
            axes.set_axis_off()
            continue
        show_image(axes, images[i])
        color = "black" if right[i] else RED
        axes.set_title(titles[i], fontsize=9, loc="left", color=color)
        axes.set_xlabel(ending(ids[i], 30), fontsize=8, color=GREY)
        for spine in axes.spines.values():
            spine.set(visible=True, color=BLUE if right[i] else RED, linewidth=1 if right[i] else 3)
            spine.set_linestyle("-" if right[i] else (0, (4, 2)))
    return figure
