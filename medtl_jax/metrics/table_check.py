"""Finds the cells of a result table that no experiment can have given.

Every printed number stands for all values that round to it, and a cell is flagged only where none
of them goes with the other cells of its row. What a relation takes for granted (one class, one run)
and the table does not say makes a note, not a flag. See `plausible` for the relations.

A column without a percent sign is read as fractions of 1 where most of its numbers are at most 1,
else as percent; beside columns of percent a column of fractions may be either, and a cell is then
flagged only where it is impossible both ways.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

from medtl_jax.metrics.plausible import (
    COUNTS,
    ERRORS,
    KNOWN_RUNS,
    ONE_RUN,
    RANGES,
    RELATIONS,
    SHARES,
    TWO_CLASSES,
    Relation,
    Span,
)
from medtl_jax.metrics.table_cells import (
    Cell,
    Column,
    Number,
    Table,
    column_scales,
    comparable,
    is_missing,
    read_cell,
    read_table,
)

_TABLE = ("tp", "fp", "fn", "tn")
_OF_ONE_CLASS = ("prevalence", "positives", "negatives")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A cell that is impossible: where it is, what it says, and each reason why."""

    row: str
    column: str
    text: str
    reasons: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found in `cells` numbers; `notes` says what was not checked or is doubtful."""

    cells: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Known:
    """What a metric of a row can be: one span for each way to read its scale."""

    words: str
    spans: tuple[tuple[int, Span], ...]
    average: str = ""


@dataclasses.dataclass(frozen=True)
class _Row:
    """The numbers of a row by column, and the column's possible scales."""

    name: str
    cells: Mapping[Column, Cell]
    scales: Mapping[Column, tuple[int, ...]]


def check_table(path: pathlib.Path, *, binary: bool = False, runs: int | None = None) -> Report:
    """What is impossible in the csv table `path`.

    Args:
      binary: whether every row is about one positive class and one test set; known without saying
        where a row has the counts of positives or negatives, or the prevalence.
      runs: how many runs every number is the mean of, None where that is not known; a column `runs`
        goes before it.

    Raises:
      UserError: a table that cannot be read; see `read_table`.
    """
    table = read_table(path)
    cells, notes = _read_cells(table)
    notes = [*_about_columns(table), *notes]
    scales, mixed = column_scales(table.columns, cells)
    notes += [
        f"note: column '{column.header}' has numbers up to 1 and above it: write % in its name if "
        "they are percents"
        for column in mixed
    ]
    doubts: dict[tuple[Column, Relation], list[str]] = {}
    findings = []
    for row, found in enumerate(cells):
        line = _Row(_row_name(table, row), found, scales)
        for column, cell in found.items():
            reasons = [*_own_faults(line, column)]
            related = [relation for relation in RELATIONS if relation.judged == column.metric]
            for relation in related if not (reasons or column.end) else ():
                reason, sure = _contradiction(line, column, relation, binary, runs)
                if reason and sure:
                    reasons.append(reason)
                elif reason:
                    doubts.setdefault((column, relation), []).append(line.name)
            if reasons:
                findings.append(Finding(line.name, column.header, cell.text, tuple(reasons)))
    flagged = {(finding.row, finding.column) for finding in findings}
    notes += _doubtful(doubts, flagged)
    return Report(sum(map(len, cells)), tuple(findings), tuple(notes))


def _row_name(table: Table, row: int) -> str:
    return f"row {row + 1} ({table.names[row]})" if table.names[row] else f"row {row + 1}"


def _read_cells(table: Table) -> tuple[list[dict[Column, Cell]], list[str]]:
    """The cells that are numbers, and a note for each other one that is not empty."""
    cells, notes = [], []
    for at, row in enumerate(table.rows):
        found = {}
        for column in table.columns:
            text = row[column.place]
            cell = read_cell(text, column.metric)
            place = f"{_row_name(table, at)}, {column.header}"
            if cell is None:
                if not is_missing(text):
                    notes.append(f"not checked: {place} = '{text}' is not read as a number")
            elif column.metric in _TABLE and cell.estimate.value.denominator != 1:
                # Parts of a normalised confusion matrix, or means over runs, are no counts.
                notes.append(f"not checked: {place} = '{text}' is no whole number of cases")
            else:
                found[column] = cell
        cells.append(found)
    return cells, notes


def _about_columns(table: Table) -> Iterator[str]:
    """Notes on columns that are not understood, or that others may not be compared with."""
    for name in table.unknown:
        yield f"not checked: column '{name}' is no metric that this check knows"
    seen: dict[tuple, Column] = {}
    for column in table.columns:
        first = seen.setdefault((column.kind, column.end), column)
        if first is not column:
            yield (
                f"not checked: column '{column.header}' against the others, as '{first.header}' "
                "means the same"
            )
    for one, other in itertools.combinations(table.columns, 2):
        if _averaged_apart(table.columns, one, other) or _averaged_apart(table.columns, other, one):
            yield (
                f"not checked: '{one.header}' against '{other.header}': they are averaged in other "
                "ways"
            )
        errors = {one.metric, other.metric} <= {"mae", "mse", "rmse", "range"}
        if errors and one.group == other.group and not comparable(one, other):
            yield (
                f"not checked: '{one.header}' against '{other.header}': percents or other units of "
                "errors cannot be compared"
            )


def _averaged_apart(columns: Sequence[Column], judged: Column, other: Column) -> bool:
    """Whether `other` could say something of `judged` had it been averaged alike."""
    related = any(
        relation.judged == judged.metric and other.metric in relation.given
        for relation in RELATIONS
    )
    if not related or other.metric in COUNTS or judged.group != other.group:
        return False
    if judged.end or other.end:
        return False
    alike = {column.average for column in columns if column.metric == other.metric}
    return judged.average not in alike


def _read_as(number: Number, scales: Iterable[int]) -> list[tuple[int, Span]]:
    return [(scale, number.span(scale)) for scale in ((100,) if number.percent else scales)]


def _in_range(metric: str, readings: Iterable[tuple[int, Span]]) -> tuple[tuple[int, Span], ...]:
    """The readings with what of them the metric can be at all."""
    parts = ((scale, span.within(RANGES[metric])) for scale, span in readings)
    return tuple((scale, part) for scale, part in parts if part is not None)


def _own_faults(row: _Row, column: Column) -> Iterator[str]:
    """What is wrong with a cell whatever stands beside it; its interval may be in other columns."""
    cell, scales = row.cells[column], row.scales[column]
    if column.end:
        return
    if column.metric in COUNTS and cell.estimate.value.denominator != 1:
        yield "a count is a whole number"
    readings = _read_as(cell.estimate, scales)
    if not _in_range(column.metric, readings):
        yield _range_words(column.metric, cell.estimate, readings[0][0])
    if cell.spread is not None and cell.spread.value < 0:
        yield "a spread is not negative"
    if cell.interval is not None:
        # "91% (0.88-0.93)" may be meant either way; an end without a sign else goes with its cell.
        either = (100, 1) if cell.estimate.percent else scales
        yield from _interval_faults(readings, *(_read_as(end, either) for end in cell.interval))
    ends: dict[str, list[tuple[int, Span]]] = {"low": [], "high": []}
    for other in row.cells:
        if other.end and other.kind == column.kind:
            ends[other.end] = _read_as(row.cells[other].estimate, row.scales[other])
    yield from _interval_faults(readings, ends["low"], ends["high"])


def _range_words(metric: str, number: Number, scale: int) -> str:
    span = RANGES[metric]
    low = span.low * scale
    if number.value < low or span.high is None:
        return f"{metric} is at least {low}"
    high = span.high * scale
    if scale == 1 and metric in SHARES and number.value <= 100:
        return (
            f"{metric} is at most {high}, and the column is read as fractions; write % where "
            "percents are meant"
        )
    return f"{metric} is at most {high}{' percent' if scale == 100 else ''}"


def _interval_faults(
    estimates: Sequence[tuple[int, Span]],
    lows: Sequence[tuple[int, Span]],
    highs: Sequence[tuple[int, Span]],
) -> Iterator[str]:
    """Says where no reading of the ends holds the estimate, or they stand the wrong way round."""
    pairs = [(low, high) for scale, low in lows for other, high in highs if scale == other]
    if pairs and all(low.low > high.high for low, high in pairs):
        yield "its interval ends below where it begins"
        return
    if lows and not any(value.high >= low.low for _, value in estimates for _, low in lows):
        yield "its interval begins above it"
    if highs and not any(value.low <= high.high for _, value in estimates for _, high in highs):
        yield "its interval ends below it"


def _contradiction(
    row: _Row, column: Column, relation: Relation, binary: bool, runs: int | None
) -> tuple[str, bool]:
    """Why the cell contradicts `relation`, "" where it does not, and whether that is sure."""
    known = [_known(row, column, metric, runs) for metric in relation.given]
    if None in known:
        return "", False
    if relation.needs and (column.average or any(part.average for part in known)):
        return "", False
    cell = row.cells[column]
    judged = _in_range(column.metric, _read_as(cell.estimate, row.scales[column]))
    allowed = None
    for (scale, span), *given in itertools.product(judged, *(part.spans for part in known)):
        possible = relation.possible(span, *(other for _, other in given))
        if any(span.meets(part) for part in possible):
            return "", False
        allowed = allowed or _allowed(span, possible, cell.estimate, scale)
    if allowed is None:
        return "", False
    words = " and ".join(part.words for part in known if part.words)
    counted = _run_count(row, column, runs)
    met = {
        ONE_RUN: counted == 1,
        KNOWN_RUNS: counted is not None,
        TWO_CLASSES: binary
        or any(_known(row, column, name, runs) is not None for name in _OF_ONE_CLASS),
    }
    return f"{allowed} goes with {words} ({relation.where})", all(
        met[need] for need in relation.needs
    )


def _known(row: _Row, judged: Column, metric: str, runs: int | None) -> _Known | None:
    """What the row says of `metric` beside the column `judged`."""
    if metric == "runs":
        count = _run_count(row, judged, runs)
        span = Span(Fraction(count or 1), Fraction(count or 1))
        return _Known(f"{count} runs" if count and count > 1 else "", ((1, span),))
    found = _partner(row, judged, metric)
    if found is None:
        return _derived(row, judged, metric)
    cell = row.cells[found]
    spans = _in_range(metric, _read_as(cell.estimate, row.scales[found]))
    return _Known(f"{found.header} {cell.text}", spans, found.average) if spans else None


def _run_count(row: _Row, judged: Column, runs: int | None) -> int | None:
    found = _partner(row, judged, "runs")
    if found is None:
        return runs
    value = row.cells[found].estimate.value
    return int(value) if value.denominator == 1 and value > 0 else None


def _partner(row: _Row, judged: Column, metric: str) -> Column | None:
    """The column of `metric` that was taken as `judged` was: of its split, averaged alike."""
    fits = []
    for column in row.cells:
        if column.metric != metric or column.end or column is judged:
            continue
        of_all = metric in ("runs", "range") and not column.group
        averaged = column.average == judged.average or metric in COUNTS or metric == "prevalence"
        if metric in ERRORS and not comparable(judged, column):
            continue
        if averaged and (column.group == judged.group or of_all):
            fits.append(column)
    return max(fits, key=lambda column: column.group == judged.group, default=None)


def _derived(row: _Row, judged: Column, metric: str) -> _Known | None:
    """A count or the prevalence that the counts of the row give."""
    count = {name: _exact(row, judged, name) for name in ("n", "positives", "negatives", *_TABLE)}

    def total(*names: str) -> Fraction | None:
        parts = [count[name] for name in names]
        return None if None in parts else sum(parts)

    def less(whole: Fraction | None, part: Fraction | None) -> Fraction | None:
        return None if whole is None or part is None or part > whole else whole - part

    def first(*values: Fraction | None) -> Fraction | None:
        return next((value for value in values if value is not None), None)

    positives = first(count["positives"], total("tp", "fn"), less(count["n"], count["negatives"]))
    negatives = first(count["negatives"], total("fp", "tn"), less(count["n"], positives))
    if metric in ("positives", "negatives"):
        value = positives if metric == "positives" else negatives
        if value is None or metric == judged.metric:
            return None
        return _Known(f"{value} {metric}", ((1, Span(value, value)),))
    if positives is None or negatives is None or positives + negatives == 0:
        return None
    if metric == "n" and judged.metric in SHARES:
        value = positives + negatives
        return _Known(f"{value} cases", ((1, Span(value, value)),))
    if metric == "prevalence":
        value = positives / (positives + negatives)
        words = f"{positives} positives of {positives + negatives}"
        return _Known(words, ((1, Span(value, value)),))
    return None


def _exact(row: _Row, judged: Column, metric: str) -> Fraction | None:
    found = _partner(row, judged, metric)
    value = None if found is None else row.cells[found].estimate.value
    return value if value is not None and value >= 0 and value.denominator == 1 else None


def _allowed(span: Span, possible: Sequence[Span], printed: Number, scale: int) -> str:
    """The printed numbers next to the cell that are possible, with as many digits as it has."""
    unit = printed.half * 2 or Fraction(1)
    below = [part.high for part in possible if part.high is not None and part.high < span.low]
    above = [part.low for part in possible if part.low > span.high]
    words = []
    if below:
        last = math.floor((max(below) * scale + printed.half) / unit) * unit
        words.append(f"at most {_digits(last, unit)}")
    if above:
        first = math.ceil((min(above) * scale - printed.half) / unit) * unit
        words.append(f"at least {_digits(first, unit)}")
    return " or ".join(words)


def _digits(value: Fraction, unit: Fraction) -> str:
    decimals = 0
    while unit.denominator != 1:
        unit, decimals = unit * 10, decimals + 1
    sign, scaled = "-" * (value < 0), str(abs(int(value * 10**decimals))).zfill(decimals + 1)
    return sign + (f"{scaled[:-decimals]}.{scaled[-decimals:]}" if decimals else scaled)


def _doubtful(
    doubts: Mapping[tuple[Column, Relation], Sequence[str]], flagged: set[tuple[str, str]]
) -> Iterator[str]:
    """A note on each column and relation that holds only where something unsaid is so."""
    for (column, relation), rows in doubts.items():
        left = [row for row in rows if (row, column.header) not in flagged]
        if left:
            given = " and ".join(name for name in relation.given if name != "runs")
            yield (
                f"note: {column.header} against {given} ({relation.where}): possible only as "
                f"{relation.otherwise} in {', '.join(left)}"
            )
