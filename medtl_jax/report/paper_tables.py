"""The tables of a paper on classification, and its bar charts and confusion matrices, as one page.

Table 2 has accuracy, precision, recall, specificity and F1, Table 3 Dice, IoU, MAE and MSE; figures
6 to 8 are their bars, figure 9 the confusion matrices.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Mapping
from typing import Unpack

import numpy as np
from matplotlib.figure import Figure

from medtl_jax.metrics.published import TABLE_2, TABLE_3
from medtl_jax.metrics.seeds import Estimate
from medtl_jax.report.classification import confusion_figure
from medtl_jax.report.comparison_figures import bars_figure
from medtl_jax.report.markup import bullets, pictures, section, table
from medtl_jax.report.study_page import (
    Cells,
    Study,
    entry_of,
    markdown_page,
    notes_section,
    size_text,
    spread_text,
    unit_of,
    write_study,
)
from medtl_jax.report.style import GREY, with_interval
from medtl_jax.report.tables import label_of

_TABLES = {"Table 2": TABLE_2, "Table 3": TABLE_3}
_BARS = {
    "figure_6": (TABLE_2, "Figure 6: the metrics of Table 2"),
    "figure_7": (("dice", "iou"), "Figure 7: Dice and IoU of Table 3"),
    "figure_8": (("mae", "mse"), "Figure 8: MAE and MSE of Table 3"),
}


@dataclasses.dataclass(frozen=True)
class PaperTables:
    """What the tables are made of.

    Attributes:
      rows: the metrics of each model by name.
      confusion: int `[k, k]` of each model, summed over the seeds.
      settings: of each model, what its runs set.
      classes: k names, of two the positive one last.
      seeds: how many runs a model has.
      images, patients: of the test split; patients None where they are not known.
      flagged: cells that no experiment can have given, and why, a line each.
      doubts: what the check of the cells could not say.
      notes: what the runs warned of.
    """

    rows: Mapping[str, Mapping[str, Estimate]]
    confusion: Mapping[str, np.ndarray]
    settings: Mapping[str, str]
    classes: tuple[str, ...]
    seeds: int
    images: int
    patients: int | None
    flagged: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def paper_csv(rows: Mapping[str, Mapping[str, Estimate]], seeds: int, classes: int) -> str:
    """Returns both tables as one csv, as fractions of 1 with four digits, without intervals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    averaged = "" if classes == 2 else "macro "
    shares = (*TABLE_2[1:], "dice", "iou")
    head = [f"{averaged}{name}" if name in shares else name for name in (*TABLE_2, *TABLE_3)]
    writer.writerow(["model", *head, "runs"])
    for model, test in rows.items():
        cells = (test[name].value for name in (*TABLE_2, *TABLE_3))
        writer.writerow([model, *("" if v != v else f"{v:.4f}" for v in cells), seeds])
    return text.getvalue()


def paper_markdown(found: PaperTables) -> str:
    """Returns both tables and how to read them, as Markdown."""
    tables: list[str | Cells] = []
    for name, metrics in _TABLES.items():
        tables += [f"{name}:", _cells(found, metrics)]
    return markdown_page(checked(found), tables, reading(found), found.notes)


def checked(found: PaperTables) -> list[str]:
    """Returns what the check of the cells has found, a line each."""
    cells = len(found.rows) * (len(TABLE_2) + len(TABLE_3))
    lines = [f"Check of the {cells} cells against each other: {len(found.flagged)} are impossible."]
    return [*lines, *found.flagged, *found.doubts]


def reading(found: PaperTables) -> list[str]:
    """Returns what one has to know to read the tables, a line each."""
    of_class = "means over the classes"
    errors = "the mean over the classes of"
    if len(found.classes) == 2:
        of_class, errors = f"those of the positive class, {found.classes[1]}", "of"
    several = "s" * (found.seeds > 1)
    covered = f"other test {unit_of(found.patients)}"
    covered += " and other seeds" if found.seeds > 1 else " only"
    return [
        f"Test split: {size_text(found.images, found.patients)}, the same for every model; means "
        f"over {found.seeds} seed{several}. The 95 % intervals cover {covered}; sd is the standard "
        "deviation over the seeds.",
        f"Precision, recall, specificity, F1, Dice and IoU are {of_class}.",
        "These models classify whole images, so that Dice equals F1 here, and IoU is "
        "F1 / (2 - F1) of each run and class: neither says anything of shapes.",
        f"MAE and MSE are {errors} the predicted probability against the label, 0 or 1; of two "
        "classes MSE is the Brier score.",
    ]


def _cells(found: PaperTables, metrics: tuple[str, ...]) -> Cells:
    head = ["model"]
    for metric in metrics:
        head += [f"{label_of(metric)} (95 % CI)", "sd"]
    rows = []
    for model, test in found.rows.items():
        row = [model]
        for metric in metrics:
            row += [with_interval(entry_of(test[metric])), spread_text(test[metric].spread)]
        rows.append(row)
    return head, rows


def paper_figures(found: PaperTables) -> dict[str, Figure]:
    """Returns figures 6 to 8, and one 9 for each model, by name."""
    names = list(found.rows)
    entries = [
        {metric: entry_of(value) for metric, value in test.items()} for test in found.rows.values()
    ]
    drawn = {}
    for name, (metrics, caption) in _BARS.items():
        words = f"{caption}, means over {found.seeds} seeds with 95 % intervals."
        figure = bars_figure(names, entries, metrics, words)
        if figure is not None:
            drawn[name] = figure
    for number, (model, counts) in enumerate(found.confusion.items(), 1):
        figure = confusion_figure(counts, found.classes)
        figure.axes[0].set_title(model, color=GREY)
        figure.set_label(
            f"Figure 9: {model}, the {found.seeds} seeds together. {figure.get_label()}"
        )
        drawn[f"figure_9_{number}"] = figure
    return drawn


def write_paper_tables(
    path: pathlib.Path,
    *,
    found: PaperTables,
    figures: Mapping[str, Figure],
    **study: Unpack[Study],
) -> None:
    """Writes the page to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file.
      found: what was found.
      figures: see `paper_figures`.
      study: title, commands, configuration and environment.

    Raises:
      UserError: the file cannot be written.
    """
    sections = [section(name, table(*_cells(found, columns))) for name, columns in _TABLES.items()]
    sections += [
        section("Do the tables add up", bullets(checked(found))),
        section("How to read them", bullets(reading(found))),
        section("Figures", "".join(pictures(figures).values())),
        section("The models", table(("model", "what it sets"), list(found.settings.items()))),
        notes_section(found.notes),
    ]
    write_study(path, sections, **study)
