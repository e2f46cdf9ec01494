"""What the pages of ladders, ablations, adaptations and the like have in common.

Each is a study of many runs with several seeds: tables with a verdict against one reference, as
Markdown and as HTML, and a page that ends with notes and with what it takes to repeat the study.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, Unpack

import numpy as np

from medtl_jax.files import write_file
from medtl_jax.metrics.compare import BETTER, WORSE
from medtl_jax.metrics.seeds import Estimate
from medtl_jax.report.markup import (
    as_json,
    bullets,
    details,
    facts,
    page,
    rich_table,
    section,
    text,
)
from medtl_jax.report.style import with_interval
from medtl_jax.report.tables import format_value, label_of, printable

# Head and rows of a table, all of them text.
Cells = tuple[Sequence[str], Sequence[Sequence[str]]]

_SIGNS = {BETTER: "▲ better", WORSE: "▼ worse"}


class Study(TypedDict):
    """What stands on every page of a study beside its result.

    Attributes:
      title: headline.
      command: the command line that repeats all of it.
      config: of the study.
      environment: versions and devices.
      commands: the command line that repeats each run alone, by its folder.
    """

    title: str
    command: str
    config: dict
    environment: dict
    commands: Mapping[str, str]


def to_json(result) -> dict:
    """Returns everything in a result, a dataclass, ready for JSON; what is undefined is None."""
    return _plain(dataclasses.asdict(result))


def _plain(value):
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def entry_of(found: Estimate) -> dict:
    """Returns an estimate as an entry of `metrics.json`, as far as it is formatted."""
    return {"value": None if math.isnan(found.value) else found.value, "ci95": found.interval}


def scores_text(test: Mapping[str, Estimate]) -> str:
    """Returns metrics with their intervals as words: `AUC 0.9 (0.8 to 1.0), accuracy ...`."""
    return ", ".join(
        f"{label_of(metric)} {with_interval(entry_of(found))}" for metric, found in test.items()
    )


def spread_text(value: float) -> str:
    """Returns a standard deviation as words, empty where there is none."""
    return "" if math.isnan(value) else f"{value:.4f}"


def mean_text(values: Sequence[float | None]) -> str:
    """Returns the mean over the seeds as words, empty where there are no values.

    It is undefined where one of the seeds has none.
    """
    if not values:
        return ""
    known = all(value is not None and math.isfinite(value) for value in values)
    return format_value({"value": float(np.mean(values)) if known else None})


def size_text(images: int, patients: int | None) -> str:
    """Returns the size of a split as words; `patients` is None where they are not known."""
    return f"{images} images" + ("" if patients is None else f" of {patients} patients")


def unit_of(patients: int | None) -> str:
    """Returns what a bootstrap of the test split draws: `images`, or `patients` where known."""
    return "images" if patients is None else "patients"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as Markdown whose columns are also aligned as plain text."""
    # Names come from outside; a bar in one would be a column.
    head, *rows = ([cell.replace("|", "\\|") for cell in cells] for cells in (head, *rows))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)])


def markdown_page(
    verdicts: Sequence[str],
    tables: Iterable[str | Cells],
    reading: Sequence[str],
    notes: Sequence[str],
    noted: str = "Notes of the runs",
) -> str:
    """Returns a study as Markdown: verdicts, tables, how to read them, and the notes if any.

    Args:
      verdicts: a line each.
      tables: in their order, each a table or a paragraph that stands between them.
      reading: what one has to know to read the tables, a line each.
      notes: what the runs warned of, by whomever.
      noted: what stands above the notes.
    """
    parts = [_lines(verdicts)]
    parts += [part if isinstance(part, str) else markdown_table(*part) for part in tables]
    parts.append(_lines(reading))
    if notes:
        parts += [f"{noted}:", _lines(map(printable, notes))]
    return "\n\n".join(parts) + "\n"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def signed_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as HTML whose verdicts have a sign."""
    signs = {verdict: f'<b class="fixed">{sign}</b>' for verdict, sign in _SIGNS.items()}
    body = [(row[0], [signs.get(cell, text(cell)) for cell in row[1:]]) for row in rows]
    return rich_table(head, body)


def notes_section(notes: Sequence[str], heading: str = "Notes of the runs") -> str:
    """Returns the notes as HTML under their heading; that there are none is said."""
    return section(heading, bullets(notes) or "<p>None.</p>")


def write_study(
    path: pathlib.Path,
    sections: Sequence[str],
    *,
    alone: Sequence[str] = (),
    **study: Unpack[Study],
) -> None:
    """Writes the page of a study to `path`, whole or not at all; equal inputs, equal bytes.

    It ends with what it takes to repeat the study: commands, configuration and environment.

    Args:
      path: the HTML file.
      sections: what stands above that, as HTML.
      alone: what is to be said of a run that is repeated alone, a line each.
      study: title, commands, configuration and environment.

    Raises:
      UserError: the file cannot be written.
    """
    runs = [(folder, [f"<code>{text(line)}</code>"]) for folder, line in study["commands"].items()]
    closing = [
        section("How to repeat it", f'<pre class="command">{text(study["command"])}</pre>'),
        details("every run alone", bullets(alone) + rich_table(("run", "command"), runs)),
        section("Configuration", details("all settings", as_json(study["config"]))),
        section("Environment", facts(study["environment"])),
    ]
    write_file(path, page(study["title"], "\n".join([*sections, *closing])))
