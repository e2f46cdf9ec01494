"""The audit of the data in a report: what was found, and pairs of copies side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from medtl_jax.data.audit import pair_cells
from medtl_jax.report.markup import bullets, details, table
from medtl_jax.report.style import GREY, ending, new_figure, show_image, styled

MOST_DRAWN = 4
_PANEL = 1.2


def audit_part(audit: Mapping[str, Any] | str) -> str:
    """Returns the section's HTML; `audit` as in `environment.json`: "off", or what was found."""
    if isinstance(audit, str):
        return "<p>The data were not audited (data.audit=off).</p>"
    lines = audit["findings"] or ["No copies across splits, and nothing else was found."]
    body = bullets([*lines, *audit["notes"]])
    if not audit["pairs"]:
        return body
    head = ("one", "other", "how", "labels")
    shown, found = len(audit["pairs"]), audit["pairs_found"]
    summary = f"copies: {shown} of {found}" if shown < found else f"copies: {found}"
    return body + details(summary, table(head, [pair_cells(pair) for pair in audit["pairs"]]))


@styled
def audit_figure(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> Figure:
    """Returns a column a pair of copies; each is two images uint8 `[h, w, c]` and a name."""
    figure = new_figure(
        2 * _PANEL + 0.5,
        "Copies that the audit found: an image of an earlier split (above) and one of a later",
        width=(_PANEL + 0.3) * len(pairs),
    )
    grid = figure.subplots(2, len(pairs), squeeze=False)
    for (above, below), (one, two, name) in zip(grid.T, pairs, strict=True):
        show_image(above, one)
        show_image(below, two)
        below.set_xlabel(ending(name, 18), fontsize=7, color=GREY)
    return figure
