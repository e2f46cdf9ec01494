"""An ablation: its table as Markdown, for the terminal too, its figure and one self-contained page.

A row is one setting of each axis, trained with several seeds; where it fuses members, each seed has
several networks.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Unpack

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medtl_jax.metrics.seeds import CANNOT_TELL
from medtl_jax.report.ladder import Rung, cost_cells
from medtl_jax.report.markup import bullets, pictures, section, side_by_side, subsection, table
from medtl_jax.report.study_page import (
    Cells,
    Study,
    entry_of,
    markdown_page,
    mean_text,
    notes_section,
    scores_text,
    signed_table,
    size_text,
    spread_text,
    unit_of,
    write_study,
)
from medtl_jax.report.style import BLUE, GREY, new_figure, short_labels, styled, with_interval
from medtl_jax.report.tables import label_of

_ROW = 0.27
# Of more rows than these, those of which nothing can be told are counted.
_MOST_NAMED = 6


@dataclasses.dataclass(frozen=True)
class Ablation:
    """The result of settings x seeds on one test split.

    Attributes:
      rows: one for each combination of settings; `strategy` is its name, and `folders` has the
        members of one seed next to each other.
      labels: of each row, its setting of every axis, by axis.
      members: of each row, how many networks it fuses for each seed; 1 where it does not.
      sets: `(axis, label, settings)`, what each setting is.
      reference: the row that the others are compared with.
      picked: the row chosen on validation, `""` where none could be.
      select: the validation value that picks.
      seeds: how many.
      images, patients: of the test split; patients None where they are not known.
      device: `CPU` or `GPU`, what `Cost.device_seconds` counts.
      notes: what the runs warned of, with the rows that it is of.
    """

    rows: tuple[Rung, ...]
    labels: Mapping[str, Mapping[str, str]]
    members: Mapping[str, int]
    sets: tuple[tuple[str, str, str], ...]
    reference: str
    picked: str
    select: str
    seeds: int
    images: int
    patients: int | None
    device: str
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The primary metrics."""
        return tuple(self.rows[0].test)

    @property
    def fuses(self) -> bool:
        """Whether any row fuses members."""
        return any(count > 1 for count in self.members.values())


def ablation_table(found: Ablation) -> str:
    """Returns the verdicts, a table for each metric and how to read them, as Markdown."""
    tables = [_table_of(found, metric) for metric in found.metrics]
    return markdown_page(conclusions(found), tables, reading(found), found.notes)


def conclusions(found: Ablation) -> list[str]:
    """Returns what validation picks and how many rows differ from the reference, a line each."""
    size = "picks nothing: no row has a validation value to pick by"
    if found.picked:
        row = next(row for row in found.rows if row.strategy == found.picked)
        size = f"picks {found.picked}; test {scores_text(row.test)}"
    lines = [f"validation {found.select} {size}"]
    others = [row for row in found.rows if row.against]
    for metric in found.metrics:
        verdicts = {row.strategy: row.against[metric].verdict for row in others}
        if len(others) > _MOST_NAMED:
            verdicts = {name: said for name, said in verdicts.items() if said != CANNOT_TELL}
        told = [f"{name} {said}" for name, said in verdicts.items()]
        if rest := len(others) - len(told):
            told.append(f"{CANNOT_TELL} of {rest} {'others' if told else 'rows'}")
        lines.append(f"{label_of(metric)}, against {found.reference}: {'; '.join(told)}")
    return lines


def reading(found: Ablation) -> list[str]:
    """Returns what one has to know to read the table, a line each."""
    size = size_text(found.images, found.patients)
    several = found.seeds > 1
    covered = f"other test {unit_of(found.patients)}"
    covered += " and other seeds" if several else " only"
    return [
        f"Test split: {size}, the same for every run; means over {found.seeds} "
        f"seed{'s' * several}. The 95 % intervals cover {covered}; sd is the standard deviation "
        "over the seeds.",
        f"A difference is the row minus {found.reference}, paired by seed and by test image. Its "
        "verdict takes a p of at most 0.05 after Holm's correction over all rows and metrics; p is "
        "after it; “cannot tell” is not “equal”.",
        *_fused(found),
        f"Picked: the best mean validation {found.select}. The test split has no part in it.",
        f"{found.device} s: seconds of all {found.device}s in use, the mean over the seeds, "
        "without compilation. MB: peak memory of one compiled training step as XLA reports it, "
        "without the data set.",
    ]


def _fused(found: Ablation) -> list[str]:
    """How the members of a row become one prediction, where any row has some."""
    if not found.fuses:
        return []
    return [
        "Members: how many networks a row has for each seed. They learn from the same images and "
        "differ by their own seeds; what the row predicts is the mean of their probabilities (of a "
        "regression, of their numbers), and nothing is fitted. All values of such a row, "
        f"validation {found.select} too, are of that mean; its seconds are the sum over the "
        "members, its MB those of the largest. A row that differs in nothing else and fuses none "
        "has the first member for its network, trained once for both.",
    ]


def _table_of(found: Ablation, metric: str) -> Cells:
    """Head and rows of one metric, all of them text; costs stand by the first one."""
    axes = list(next(iter(found.labels.values())))
    head = [*axes, *["members"] * found.fuses, f"{label_of(metric)} (95 % CI)", "verdict"]
    head += [f"minus {found.reference} (95 % CI)", "p", "sd"]
    first = metric == found.metrics[0]
    if first:
        head += [f"val {found.select}", f"{found.device} s", "MB"]
    rows = []
    for rung in found.rows:
        value, judged = rung.test[metric], rung.against.get(metric)
        row = list(found.labels[rung.strategy].values())
        row[-1] += " (picked)" if rung.strategy == found.picked else ""
        row += [str(found.members[rung.strategy])] * found.fuses
        row.append(with_interval(entry_of(value)))
        row += ["reference", "", ""]
        if judged:
            row[-3:] = [judged.verdict, with_interval(entry_of(judged.estimate)), _p(judged)]
        row.append(spread_text(value.spread))
        if first:
            row += [mean_text(rung.validation), *cost_cells(rung.cost)]
        rows.append(row)
    return head, rows


def _p(judged) -> str:
    return "" if judged.adjusted != judged.adjusted else f"{judged.adjusted:.2g}"


@styled
def rows_figure(found: Ablation, metric: str) -> Figure:
    """Returns the mean of a metric in every row with its interval and the value of each seed."""
    figure = new_figure(
        max(len(found.rows), 3) * _ROW + 0.8,
        f"{label_of(metric)} on the test split: mean over {found.seeds} "
        f"seed{'s' * (found.seeds > 1)} with its 95 % interval; small circles are the seeds. "
        f"Dashed line: the reference, {found.reference}. Rows: {' / '.join(_axes_of(found))}.",
    )
    axes = figure.add_subplot()
    for number, row in enumerate(found.rows):
        value = row.test[metric]
        axes.plot(value.value, number, "o", color=BLUE)
        axes.plot(value.by_seed, [number] * len(value.by_seed), "o", color=GREY, mfc="none", ms=3)
        if value.interval:
            axes.plot(value.interval, [number, number], color=BLUE)
        if row.strategy == found.reference and value.value == value.value:
            axes.axvline(value.value, color=GREY, linestyle="--", linewidth=1, zorder=0)
        across = axes.get_yaxis_transform()
        words = with_interval(entry_of(value))
        axes.text(1.02, number, words, transform=across, va="center", size=8)
    labels = _row_labels(found)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(False, axis="y")
    # Long names leave the axis little room.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=2))
    axes.set_xlabel(label_of(metric))
    return figure


def _axes_of(found: Ablation) -> list[str]:
    return list(found.labels[found.reference])


def _row_labels(found: Ablation) -> list[str]:
    """The settings of each row, without the names of the axes that all rows have."""
    names = _axes_of(found)
    return short_labels(
        [" / ".join(found.labels[row.strategy][name] for name in names) for row in found.rows], 34
    )


def write_ablation(
    path: pathlib.Path,
    *,
    found: Ablation,
    figures: Mapping[str, Figure],
    **study: Unpack[Study],
) -> None:
    """Writes the page to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file.
      found: what was found.
      figures: see `rows_figure`.
      study: title, commands, configuration and environment.

    Raises:
      UserError: the file cannot be written.
    """
    sections = [
        section("What differs", bullets(conclusions(found))),
        section("All rows", "".join(_metric_part(found, metric) for metric in found.metrics)),
        side_by_side(list(pictures(figures).values())),
        section("How to read it", bullets(reading(found))),
        section("The axes", table(("axis", "setting", "what it sets"), list(found.sets))),
        notes_section(found.notes),
    ]
    write_study(path, sections, **study)


def _metric_part(found: Ablation, metric: str) -> str:
    return subsection(label_of(metric), signed_table(*_table_of(found, metric)))
