"""The comparison of several runs: a table for the terminal, figures, one self-contained page."""

import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import rich.console
import rich.table
import rich.text
from matplotlib.figure import Figure

from medtl_jax.files import write_file
from medtl_jax.metrics.compare import (
    BETTER,
    DELONG,
    JACKKNIFE,
    MCNEMAR,
    PERMUTATION,
    RANKS,
    WORSE,
    Comparison,
    Difference,
    Predicted,
)
from medtl_jax.report.comparison_figures import defined, difference_entry
from medtl_jax.report.markup import (
    bullets,
    details,
    facts,
    page,
    pictures,
    rich_table,
    section,
    side_by_side,
    subsection,
    table,
    text,
)
from medtl_jax.report.tables import (
    format_interval,
    format_value,
    label_of,
    printable,
)
from medtl_jax.runs import flat_config


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A finished run.

    Attributes:
      folder: as the user named it.
      config, environment: what its folder says.
      metrics: of the split, `{metric: {"value", "ci95", ...}}`.
      predicted: its predictions of the split, and its name.
    """

    folder: str
    config: dict
    environment: dict
    metrics: dict[str, dict]
    predicted: Predicted


def comparison_text(comparisons: Sequence[Comparison]) -> str:
    """Returns the verdicts as plain text for the terminal, one table for each comparison.

    The primary metrics stand first and say so; behind them stands what has no interval or test.
    """
    parts = []
    for comparison in comparisons:
        rows = rich.table.Table("metric", box=None, pad_edge=False)
        for name in ("first", "second", "difference", "95% CI", "p", "p (Holm)"):
            rows.add_column(name, justify="right")
        rows.add_column("verdict")
        for metric, found in _primary_first(comparison):
            name = printable(metric) + _mark(comparison, metric)
            verdict = "; ".join(filter(None, (found.verdict, printable(found.reason))))
            rows.add_row(*map(rich.text.Text, (name, *_cells(found), verdict)))
        buffer = io.StringIO()
        # Wide enough for every row; whoever prints it may wrap the lines.
        rich.console.Console(file=buffer, width=300).print(rows)
        lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
        first, second = printable(comparison.first), printable(comparison.second)
        parts.append("\n".join([f"second: {second}, first: {first}", *lines]))
    return "\n\n".join(parts)


def _primary_first(comparison: Comparison) -> list[tuple[str, Difference]]:
    metrics = comparison.metrics
    rest = [name for name in metrics if name not in comparison.primary]
    return [(name, metrics[name]) for name in (*comparison.primary, *rest) if name in metrics]


def _mark(comparison: Comparison, metric: str) -> str:
    return " (primary)" if metric in comparison.primary else ""


def _cells(found: Difference) -> tuple[str, str, str, str, str, str]:
    """Values, difference, interval, p and adjusted p as text."""
    first, second = ({"value": defined(value)} for value in (found.first, found.second))
    change = difference_entry(found)
    return (
        format_value(first),
        format_value(second),
        format_value(change),
        format_interval(change),
        _probability(found.p),
        _probability(found.adjusted),
    )


def _probability(p: float) -> str:
    if math.isnan(p):
        return ""
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def write_comparison(
    path: pathlib.Path,
    *,
    command: str,
    split: str,
    runs: Sequence[ComparedRun],
    comparisons: Sequence[Comparison],
    figures: Mapping[str, Figure],
    resamples: int,
) -> None:
    """Writes the page of a comparison to `path`, whole or not at all; equal inputs, equal bytes.

    Args:
      path: the HTML file.
      command: the command line that repeats the comparison.
      split: which images were compared.
      runs: the one that the others are compared with first.
      comparisons: of the further runs with the first.
      figures: see `comparison_figures`.
      resamples: draws behind the intervals.

    Raises:
      UserError: the file cannot be written.
    """
    drawn = pictures(figures)
    names = [run.predicted.name for run in runs]
    first = runs[0].predicted
    confusions = [picture for name, picture in drawn.items() if name.startswith("confusion_")]
    bars = [drawn[name] for name in ("classification", "segmentation_regression") if name in drawn]
    sections = [
        f"<p>{text(_basis(first, names[0], split))}</p>",
        section("Verdicts", "".join(map(_verdicts, comparisons))),
        section("Differences and metrics", side_by_side([drawn["differences"], *bars])),
        section("Confusion matrices", side_by_side(confusions)) if confusions else "",
        section("How it was compared", bullets(_method(first, comparisons, resamples))),
        section("What was compared", _differing_settings(names, runs) + _described(runs)),
        section("How to repeat it", f'<pre class="command">{text(command)}</pre>'),
    ]
    title = "Comparison: " + ", ".join(names)
    write_file(path, page(title, "\n".join(part for part in sections if part)))


def _basis(first: Predicted, name: str, split: str) -> str:
    size = f"{len(first.ids)} images"
    if first.patients is not None:
        size += f" of {len(np.unique(first.patients))} patients"
    return f"Every run against {name} on the same images: {size}, split {split}, {first.task}."


def _verdicts(comparison: Comparison) -> str:
    """The table of one comparison; the metrics that decide stand first."""
    rows = []
    for metric, found in _primary_first(comparison):
        first, second, change, interval, p, adjusted = _cells(found)
        sign = {BETTER: "▲ ", WORSE: "▼ "}.get(found.verdict)
        verdict = f"<b>{sign}{text(found.verdict)}</b>" if sign else text(found.verdict)
        cells = (
            verdict,
            text(change) + _small(interval) + _reason(found.reason),
            text(first),
            text(second),
            text(p) + _small(found.test),
            text(adjusted),
        )
        rows.append((label_of(metric) + _mark(comparison, metric), cells))
    head = ("metric", "verdict", "difference, 95 % interval", "first", "second", "p", "p (Holm)")
    heading = f"{comparison.second} (second) against {comparison.first} (first)"
    return subsection(heading, rich_table(head, rows))


def _reason(words: str) -> str:
    return f'<span class="small">{text(words)}</span>' if words else ""


def _small(line: str) -> str:
    return f'<span class="small fixed">{text(line)}</span>' if line else ""


def _method(first: Predicted, comparisons: Sequence[Comparison], resamples: int) -> list[str]:
    """What a reader has to know to read the verdicts, one line each."""
    unit = "image" if first.patients is None else "patient"
    tests = {found.test for one in comparisons for found in one.metrics.values()}
    how = {
        DELONG: f"AUC: DeLong's test, variance by {unit}, a t distribution where few are positive.",
        RANKS: f"AUC without a variance: a permutation test that exchanges ranks {unit} by {unit}.",
        MCNEMAR: "Accuracy: McNemar's exact test.",
        PERMUTATION: f"Other means: a permutation test, exchanging the two runs {unit} by {unit}.",
        JACKKNIFE: "What is no mean: the difference over its jackknife standard error, as t.",
    }
    primary = comparisons[0].primary
    count = len(comparisons) * len(primary)
    lines = [
        "A difference is second minus first.",
        f"Intervals: paired bootstrap, {resamples} draws of {unit}s, the same for both runs.",
        *(line for test, line in how.items() if test in tests),
        "Interval and p come from different procedures: at the border one may speak and the other "
        "not. The verdict is that of p.",
        f"Verdicts are given for the primary metrics alone: {'; '.join(map(label_of, primary))}."
        " It takes a p of at most 0.05 after Holm's correction over all comparisons on this page "
        f"({count} test{'s' * (count > 1)}). The p of every other metric is not corrected and "
        "only for orientation: with so many of them some are small by chance.",
        "“Cannot tell” is not “equal”: the interval says how large a difference may still be.",
    ]
    if first.patients is None:
        lines.append("Patients are not known: were there several images of one, p is too small.")
    return lines


def _differing_settings(names: Sequence[str], runs: Sequence[ComparedRun]) -> str:
    """The settings in which the runs differ, as a table."""
    flat = [flat_config(run.config) for run in runs]
    keys = sorted({key for config in flat for key in config})
    rows = [
        (key, *(_setting(config, key) for config in flat))
        for key in keys
        if len({_setting(config, key) for config in flat}) > 1
    ]
    if not rows:
        return "<p>The configurations of the runs are the same.</p>"
    return subsection("Settings that differ", table(("setting", *names), rows))


def _setting(config: dict, key: str) -> str:
    return repr(config[key]) if key in config else "not there"


def _described(runs: Sequence[ComparedRun]) -> str:
    parts = []
    for run in runs:
        environment, data = run.environment, run.environment["data"]
        weights = environment.get("weights")
        known = {
            "folder": run.folder,
            "command": environment.get("command"),
            "data": data.get("name"),
            "data sha256": data.get("sha256"),
            "weights": weights.get("name") if isinstance(weights, dict) else None,
            "commit": environment.get("commit"),
        }
        whole = "".join(f"<li>{text(f'{k}={v}')}</li>" for k, v in flat_config(run.config).items())
        settings = details("all settings", f"<ul>{whole}</ul>")
        parts.append(subsection(run.predicted.name, facts(known) + settings))
    return "".join(parts)
