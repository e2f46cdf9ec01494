"""A table of results as it is printed: which metric a column holds, and what a cell says."""

import csv
import dataclasses
import io
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

from medtl_jax.errors import UserError
from medtl_jax.metrics.plausible import COUNTS, ERRORS, SHARES, Span

# More than any table of results; what a larger file costs to check grows faster than the file.
MOST_BYTES, MOST_COLUMNS, MOST_LETTERS = 1 << 18, 100, 200

NAMES: dict[str, tuple[str, ...]] = {
    "accuracy": ("accuracy", "acc"),
    "precision": ("precision", "prec", "ppv", "positive predictive value"),
    "recall": ("recall", "sensitivity", "sens", "tpr", "true positive rate"),
    "specificity": ("specificity", "spec", "tnr", "true negative rate"),
    "npv": ("npv", "negative predictive value"),
    "f1": ("f1", "f1 score", "f1score", "f1 measure", "f score", "f measure"),
    "balanced_accuracy": ("balanced accuracy", "balanced acc", "bacc"),
    "auc": ("auc", "auroc", "roc auc", "auc roc"),
    "ap": ("ap", "map", "map50", "average precision", "mean average precision", "auprc", "pr auc"),
    "dice": (
        *("dice", "dsc", "dice score", "dice coefficient", "dice similarity"),
        "dice similarity coefficient",
    ),
    "iou": ("iou", "jaccard", "jaccard index", "intersection over union"),
    "mae": ("mae", "mean absolute error"),
    "mse": ("mse", "mean squared error", "mean square error"),
    "rmse": ("rmse", "root mean squared error", "root mean square error"),
    "range": ("range", "label range", "target range"),
    "hd95": ("hd95",),
    "ece": ("ece", "expected calibration error"),
    "brier": ("brier", "brier score"),
    "mcc": ("mcc",),
    "kappa": ("kappa", "cohen kappa", "cohens kappa"),
    "correlation": ("pearson", "spearman", "pearson r", "correlation"),
    "r2": ("r2", "r squared"),
    "prevalence": ("prevalence",),
    "n": ("n", "samples", "images", "cases", "n samples", "n images", "n cases"),
    "positives": ("positives", "n positive", "n positives", "n pos"),
    "negatives": ("negatives", "n negative", "n negatives", "n neg"),
    "runs": ("runs", "seeds", "repeats", "trials", "n runs", "n seeds"),
    "tp": ("tp", "true positives"),
    "fp": ("fp", "false positives"),
    "fn": ("fn", "false negatives"),
    "tn": ("tn", "true negatives"),
}
_BY_WORDS = {tuple(name.split()): metric for metric, names in NAMES.items() for name in names}
_LONGEST = max(map(len, _BY_WORDS))

_AVERAGES = {name: name for name in ("macro", "micro", "weighted")} | dict.fromkeys(
    ("mean", "avg", "average", "averaged"), "mean"
)
_ENDS = {**dict.fromkeys(("lower", "low", "lo"), "low"), **dict.fromkeys(("upper", "high"), "high")}
_SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val"}
_SPLITS |= {name: name for name in ("internal", "external")}
_SHORT = {"miou": ["mean", "iou"], "mdice": ["mean", "dice"]}
_SILENT = frozenset(("test", "testing", "overall", "percent", "score", "value"))
_OF_ENDS = frozenset(("ci", "ci95", "95", "bound", "limit"))
# An accuracy's standard deviation, rank or change is not an accuracy.
_NOT_THE_METRIC = frozenset(
    ("std", "sd", "se", "sem", "variance", "p", "rank", "loss", "change", "gain", "delta", "drop")
) | frozenset(("difference", "diff", "improvement", "gap"))

_DIGITS = r"(?:\d{1,15}(?:[.,]\d{1,15})?|[.,]\d{1,15})(?:[eE][-+]?\d{1,2})?"
_NUMBER = rf"[-+]?{_DIGITS}"
_SPREAD = rf"(?:±|\+/?-)\s*(?P<spread>{_NUMBER})\s*%?"
_CONFIDENCE = r"(?:\d+(?:\.\d+)?\s*%\s*)?(?:CI\s*[:=,]?\s*)?"
_INTERVAL = (
    rf"[(\[]\s*{_CONFIDENCE}(?P<low>{_NUMBER})\s*(?P<low_sign>%?)"
    rf"\s*(?:,|;|-|to)\s*(?P<high>{_NUMBER})\s*(?P<high_sign>%?)\s*[)\]]"
)
_CELL = re.compile(
    rf"(?P<value>{_NUMBER})\s*(?P<sign>%?)\s*(?:{_SPREAD}|[(\[]\s*(?:±\s*)?{_NUMBER}\s*%?\s*[)\]])?"
    rf"\s*(?:{_INTERVAL})?",
    re.IGNORECASE,
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+")
_ONLY_NUMBER = re.compile(rf"{_NUMBER}\s*%?")
_MISSING = frozenset(("", "-", "n/a", "na", "none", "nan"))


@dataclasses.dataclass(frozen=True)
class Number:
    """A printed number: `value`, half a unit of its last digit, and whether % stands behind it."""

    value: Fraction
    half: Fraction
    percent: bool

    def span(self, scale: int) -> Span:
        """The values that round to it, as parts of `scale`."""
        # The float behind a printed tie lies a little to either side of it.
        half = self.half and self.half + abs(self.value) / 10**12
        return Span((self.value - half) / scale, (self.value + half) / scale)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell as printed: its estimate, and its interval and spread where it has them."""

    text: str
    estimate: Number
    interval: tuple[Number, Number] | None
    spread: Number | None


@dataclasses.dataclass(frozen=True)
class Column:
    """What a header says.

    Attributes:
      place: number of the column, from 0.
      header: as written.
      metric: a key of `NAMES`.
      group: the split and what stands in brackets; only columns of one group are compared.
      average: "", "macro", "micro", "weighted" or "mean".
      unit: of an error, "" where none is said.
      percent: whether the header says so.
      end: "low" or "high" where the column is an end of an interval, else "".
    """

    place: int
    header: str
    metric: str
    group: tuple[str, ...]
    average: str
    unit: str
    percent: bool
    end: str

    @property
    def kind(self) -> tuple[str, tuple[str, ...], str]:
        """What an estimate shares with the ends of its interval."""
        return self.metric, self.group, self.average


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts: the columns that are understood, the others, and the rows."""

    columns: tuple[Column, ...]
    unknown: tuple[str, ...]
    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def read_table(path: pathlib.Path) -> Table:
    """The csv table in `path`; the columns are parted by commas, semicolons or tabs.

    Text columns before the first metric name the rows.

    Raises:
      UserError: no such file, too large, not text, no header, no row, rows of another length, a
        header that is there twice, or no column that is understood.
    """
    header, *rows = _rows(path)
    if len(header) > MOST_COLUMNS or max(map(len, header)) > MOST_LETTERS:
        raise UserError(
            f"{path} has more than {MOST_COLUMNS} columns, or a column name of more than "
            f"{MOST_LETTERS} letters: give one table of results"
        )
    if not any(re.search(r"[^\W\d_]", name) for name in header):
        raise UserError(f"{path} has no header: name the columns in its first line, as accuracy, n")
    if not rows:
        raise UserError(f"{path} has a header but no row below it")
    columns = tuple(filter(None, (read_header(name, at) for at, name in enumerate(header))))
    if not columns:
        names = ", ".join(NAMES)
        raise UserError(f"no column of {path} is a metric that can be checked; these are: {names}")
    first = min(column.place for column in columns)
    named = [at for at in range(first) if not any(_ONLY_NUMBER.fullmatch(row[at]) for row in rows)]
    understood = {column.place for column in columns}.union(named)
    return Table(
        columns,
        tuple(name or f"number {at + 1}" for at, name in enumerate(header) if at not in understood),
        tuple(", ".join(row[at] for at in named if row[at]) for row in rows),
        tuple(map(tuple, rows)),
    )


def _rows(path: pathlib.Path) -> list[list[str]]:
    if not path.is_file():
        raise UserError(f"{path} is not a file: give the path of a table as csv")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} is larger than {MOST_BYTES >> 10} KiB: give one table of results")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}): save it as csv") from None
    first = text.partition("\n")[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True
    )
    rows = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if rows and any(cells) and len(cells) != len(rows[0]):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells under a header of "
                    f"{len(rows[0])}; put a cell with a comma in quotes"
                )
            if any(cells):
                rows.append(cells)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty")
    twice = next((name for name in rows[0] if name and rows[0].count(name) > 1), None)
    if twice:
        raise UserError(f"{path} has the column '{twice}' twice: give each its own name")
    return rows


def read_header(header: str, place: int = 0) -> Column | None:
    """The column that `header` announces, None where it is no metric that can be checked."""
    text = unicodedata.normalize("NFKC", header).lower()
    text = re.sub(r"\d+(?:\.\d+)?\s*%\s*(?:ci|confidence interval)\b", " ci ", text)
    percent = "%" in text or "percent" in text
    inside = " ".join(re.findall(r"[(\[]([^)\]]*)[)\]]", text))
    words = _words(re.sub(r"[(\[][^)\]]*[)\]]?", " ", text))
    if not words and inside:  # The whole header stands in brackets.
        words, inside = _words(inside), ""
    found = _metric(words)
    if found is None:
        return None
    metric, rest = found
    marks = [word for word in _words(inside) if word not in _SILENT | _OF_ENDS]
    if not {"mean", "average"} & set(marks) and _NOT_THE_METRIC & set(marks):
        return None
    if _BY_WORDS.get(tuple(marks)) == metric:
        marks = []
    known = _SILENT | _AVERAGES.keys() | _ENDS.keys() | _SPLITS.keys() | _OF_ENDS
    ends = {_ENDS[word] for word in rest if word in _ENDS}
    if not known.issuperset(rest) or len(ends) > 1 or (not ends and _OF_ENDS & set(rest)):
        return None
    if percent and metric in COUNTS:  # A confusion matrix in percent has no counts.
        return None
    marks = [word for word in marks if word not in _NOT_THE_METRIC]
    averages = [_AVERAGES[word] for word in (*rest, *marks) if word in _AVERAGES]
    marks = [word for word in marks if word not in _AVERAGES]
    of_split = metric not in ERRORS or _SPLITS.keys() >= set(marks)
    unit = "" if of_split else "".join(marks)
    group = [word for word in rest if word in _SPLITS] + (marks if of_split else [])
    return Column(
        place,
        header,
        metric,
        tuple(sorted(_SPLITS.get(word, word) for word in group)),
        next((name for name in averages if name != "mean"), "mean" if averages else ""),
        unit,
        percent,
        ends.pop() if ends else "",
    )


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", text.replace("'", ""))
    return [part for word in words for part in _SHORT.get(word, [word])]


def _metric(words: list[str]) -> tuple[str, list[str]] | None:
    """The metric that the words begin or end with, and the other words; the longest name wins."""
    for length in range(min(_LONGEST, len(words)), 0, -1):
        for start in (len(words) - length, 0):
            metric = _BY_WORDS.get(tuple(words[start : start + length]))
            if metric:
                return metric, words[:start] + words[start + length :]
    return None


def comparable(one: Column, other: Column) -> bool:
    """Whether two errors are in one unit; nobody can tell what a percent of an MSE is."""
    if one.percent or other.percent:
        return False
    units = [
        column.unit.removesuffix("2") if column.metric == "mse" else column.unit
        for column in (one, other)
    ]
    return not all(units) or units[0] == units[1]


def column_scales(
    columns: Sequence[Column], rows: Sequence[Mapping[Column, Cell]]
) -> tuple[dict[Column, tuple[int, ...]], list[Column]]:
    """How the numbers without a percent sign are meant, and columns where that is in doubt.

    A scale is 1 or 100, what the numbers are parts of; a column that may be either has both.
    In doubt is a column with numbers up to 1 and above it.
    """
    unsigned = {
        column: [
            abs(row[column].estimate.value)
            for row in rows
            if column in row and not row[column].estimate.percent
        ]
        for column in columns
        if column.metric in SHARES and not column.percent
    }
    scales: dict[Column, tuple[int, ...]] = {column: (1,) for column in columns}
    scales.update((column, (100,)) for column in columns if column.percent)
    mixed = []
    for column, sizes in unsigned.items():
        above, below = sum(size > 1 for size in sizes), sum(0 < size <= 1 for size in sizes)
        scales[column] = (100,) if above and above >= below else (1,)
        mixed += [column] * bool(above and below)
    if any(scales[column] == (100,) for column in unsigned):
        # The caption may say that all are percent.
        scales.update((column, (1, 100)) for column in unsigned if scales[column] == (1,))
    elif any(column.percent for column in columns):
        fractions = (column for column in unsigned if column not in mixed)
        scales.update((column, (1, 100)) for column in fractions)
    return scales, mixed


def is_missing(text: str) -> bool:
    """Whether a cell says that there is no number: empty, a dash, n/a, none or nan."""
    return _plain(text).lower() in _MISSING


def read_cell(text: str, metric: str) -> Cell | None:
    """What a cell says, None where it is not one number with at most a spread and an interval.

    A percent of a count, and 1,234 as an error, are not read: nobody can tell what they are.

    >>> read_cell("86.2% (80.1-91.0)", "accuracy").estimate.value
    Fraction(431, 5)
    """
    plain = _plain(text)
    if _THOUSANDS.fullmatch(plain):
        if metric in ERRORS:
            return None
        plain = plain.replace(",", "" if metric in COUNTS else ".")
    found = _CELL.fullmatch(plain)
    if found is None or (metric in COUNTS and found["sign"]):
        return None
    estimate = _number(found["value"], found["sign"], exact=metric in COUNTS)
    interval = None
    if found["low"] is not None:
        # A sign behind the second number is meant for both.
        low_sign = found["low_sign"] or found["high_sign"]
        interval = (_number(found["low"], low_sign), _number(found["high"], found["high_sign"]))
    spread = _number(found["spread"], "") if found["spread"] is not None else None
    return Cell(text, estimate, interval, spread)


def _plain(text: str) -> str:
    # One blank at most in a row, for the patterns' sake too.
    text = " ".join(unicodedata.normalize("NFKC", text).split()).strip(" *†‡")
    return re.sub("[‐‑‒–—−]", "-", text)


def _number(text: str, sign: str, *, exact: bool = False) -> Number:
    decimal = Decimal(text.replace(",", "."))
    half = Fraction(0) if exact else Fraction(10) ** int(decimal.as_tuple().exponent) / 2
    return Number(Fraction(decimal), half, sign == "%")
